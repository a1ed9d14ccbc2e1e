"""Two versions that follow each other serve as one, so that coordinators are upgraded one by one.

The other version is the last release, else the commit before; without a history of commits the test
is skipped.
"""

import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from support import programs
from support.cluster import CHAT, Coordinator, started
from support.databases import PostgresSchema
from support.ollama import StandIn

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(sys.platform == "win32", reason="signals there are another matter"),
]

ROOT = Path(__file__).parents[2]
SOURCES = ("packages/common/src", "packages/coordinator/src")


def git(*arguments: str) -> bytes | None:
    """What git says; `None` where there is no git, or it fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=False)
    except OSError:
        return None
    return None if done.returncode else done.stdout


@pytest.fixture
def before(tmp_path: Path) -> str:
    """A `PYTHONPATH` with the version before this one."""
    release = git("describe", "--tags", "--abbrev=0", "HEAD^")
    commit = "HEAD^" if release is None else release.decode().strip()
    archive = git("archive", commit, *SOURCES)
    if archive is None:
        pytest.skip("no history of commits: there is no other version to run")
    folder = tmp_path / "before"
    folder.mkdir()
    subprocess.run(["tar", "-x"], cwd=folder, input=archive, check=True)
    return ":".join(str(folder / path) for path in SOURCES)


@asynccontextmanager
async def both(
    folder: Path, url: str, *paths: str | None
) -> AsyncIterator[tuple[Coordinator, Coordinator]]:
    """Two coordinators of which the first one leads, each with a `PYTHONPATH` or this version."""
    first, second = ({} if path is None else {"PYTHONPATH": path} for path in paths)
    async with started(folder / "first", url, **first) as leader:
        await leader.program.says("coordinator leads")
        async with started(folder / "second", url, **second) as front:
            await front.program.says("stands by")
            yield leader, front


@pytest.mark.spec("CLUSTER-14")
@pytest.mark.parametrize("leads", ["before", "after"])
async def test_both_versions_serve_and_the_other_one_takes_over(
    tmp_path: Path, postgres: PostgresSchema, before: str, leads: str
) -> None:
    paths = (before, None) if leads == "before" else (None, before)
    async with StandIn() as ollama, both(tmp_path, postgres.url, *paths) as (leader, front):
        await front.register(ollama, "one")
        for one in (leader, front):
            assert (await one.chat())[0] == 200
        ollama.hold(after=1)
        async with front.session.post(f"{front.url}/api/chat", json=CHAT) as response:
            await response.content.readline()
            [row] = await leader.get("/api/requests")
            assert row["agent"] == "one"
            leader.program.send(programs.TERMINATE)
            await front.leads(epoch=2)
            ollama.release()
            assert b'"done":true' in await response.read()
        assert await leader.program.ended() == 0
        assert (await front.chat())[0] == 200
        await front.history(4)
