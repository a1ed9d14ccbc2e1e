"""`ollama-coordinator-agent upgrade`: the version of the coordinator, in the same environment.

The coordinator's join script installs it, as it did the first time.
"""

import asyncio
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import aiohttp

from ollama_coordinator_common.error import OllamaCoordinatorError

from .client import CoordinatorClient

MARK = "joined-to"
"""The file in which the join script writes to which coordinator an environment belongs."""


class CannotUpgrade(OllamaCoordinatorError):
    """The agent cannot be brought to its coordinator's version from here; says what to do."""


def joined_to(folder: Path) -> tuple[str, str]:
    """The URL of the coordinator whose join script made an environment, and its certificate.

    That is the SHA-256 of one that the coordinator has made itself, else empty.

    Raises:
        CannotUpgrade: it was made otherwise.
    """
    try:
        url, certificate, *_ = [*(folder / MARK).read_text("utf-8").splitlines(), "", ""]
    except OSError as exc:
        raise CannotUpgrade(
            f"this agent, in {folder}, was not installed by its coordinator's join line: upgrade it"
            " as it was installed, from a clone with `git pull` and"
            " `uv tool install --reinstall ./packages/agent`; or start it with that line"
        ) from exc
    return url, certificate


async def upgrade(
    url: str, folder: Path, environ: Mapping[str, str], *, certificate: str = ""
) -> None:
    """Install the version of the coordinator at `url` into an environment that it made.

    Raises:
        CannotUpgrade: the script fails; what it said is on the terminal.
        CoordinatorError: the coordinator does not answer, or has no agent to give away.
    """
    is_windows = sys.platform == "win32"
    async with aiohttp.ClientSession() as session:
        client = CoordinatorClient(session, url, certificate=certificate)
        script = await client.join_script("powershell" if is_windows else "sh")
    shell = ["powershell", "-ExecutionPolicy", "Bypass", "-File"] if is_windows else ["sh"]
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / ("join.ps1" if is_windows else "join.sh")
        file.write_bytes(script)
        # Windows PowerShell would look for its modules among those of the shell that started us.
        kept = {name: value for name, value in environ.items() if name.upper() != "PSMODULEPATH"}
        added = {**kept, "JOIN_FOLDER": str(folder), "JOIN_START": "no"}
        process = await asyncio.create_subprocess_exec(*shell, str(file), env=added)
        code = await process.wait()
    if code != 0:
        raise CannotUpgrade(f"the join script of {url} failed (exit code {code})")
