"""Ollama is installed from archives as it publishes them: checked, resumed, unpacked."""

import asyncio
import gzip
import hashlib
import io
import signal
import sys
import tarfile
import zipfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import zstandard
from aiohttp import web
from typer.testing import CliRunner

from ollama_coordinator_agent import installation
from ollama_coordinator_agent.installation import (
    CannotInstallOllama,
    Source,
    archives,
    install_ollama,
)
from ollama_coordinator_agent.main import app
from ollama_coordinator_agent.process import find_binary
from support.agent_world import free_port
from support.disks import disk, fill

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the program is a script for sh")

PROGRAM = b"#!/bin/sh\necho 'Warning: no server'\necho client version is 0.24.0\n"
FILLING = b"".join(hashlib.sha256(bytes([n % 256, n // 256])).digest() for n in range(20_000))
"""Of a library: nothing compresses it."""


def tar(members: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as made:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o755
            made.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            made.addfile(member)
    return packed.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as made:
        for name, content in members.items():
            made.writestr(name, content)
    return packed.getvalue()


def gzipped(content: bytes) -> bytes:
    return gzip.compress(content, 1)


LINUX = {"./bin/ollama": PROGRAM, "./lib/ollama/libggml.so.1": FILLING}
ARCHIVES: dict[str, Callable[[], bytes]] = {
    "ollama-linux-amd64.tar.zst": lambda: zstandard.compress(
        tar(LINUX, {"./lib/ollama/libggml.so": "libggml.so.1"}), 1
    ),
    "ollama-darwin.tgz": lambda: gzipped(tar({"ollama": PROGRAM, "libggml.dylib": FILLING})),
    "ollama-windows-amd64.zip": lambda: zipped(
        {"ollama.exe": PROGRAM, "lib/ollama/ggml.dll": FILLING}
    ),
}


class Shelf:
    """Gives files away as the releases do; `cuts`: that many answers end after half of the rest."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cuts = 0
        self.ranges: list[str] = []
        self.port = free_port()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/v1/{name}"

    def list_sums(self, **wrong: str) -> None:
        digests = {name: hashlib.sha256(body).hexdigest() for name, body in self.files.items()}
        lines = [f"{digest}  ./{name}" for name, digest in {**digests, **wrong}.items()]
        self.files["sha256sum.txt"] = "\n".join(lines).encode()

    async def serve(self, request: web.Request) -> web.StreamResponse:
        body = self.files.get(request.match_info["name"])
        if body is None:
            return web.Response(status=404)
        wanted = request.headers.get("Range", "")
        start = int(wanted.removeprefix("bytes=").rstrip("-") or 0)
        if not request.path.endswith(".txt"):
            self.ranges.append(wanted)
        if start >= len(body):
            return web.Response(status=416)
        answer = web.StreamResponse(status=206 if wanted else 200)
        answer.content_length = len(body) - start
        await answer.prepare(request)
        if self.cuts and not request.path.endswith(".txt"):
            self.cuts -= 1
            await answer.write(body[start : (start + len(body)) // 2])
            assert request.transport is not None
            request.transport.close()
            return answer
        await answer.write(body[start:])
        return answer


@pytest.fixture
async def shelf() -> AsyncIterator[Shelf]:
    made = Shelf()
    server = web.Application()
    server.router.add_get("/v1/{name}", made.serve)
    runner = web.AppRunner(server, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", made.port).start()
    yield made
    await runner.cleanup()


def quiet(name: str, here: int, total: int | None) -> None:
    assert total is None or here <= total


@pytest.mark.spec("AGENT-70")
@pytest.mark.parametrize("name", ARCHIVES)
async def test_an_archive_of_each_system_is_installed_and_found(
    shelf: Shelf, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.files[name] = ARCHIVES[name]()
    shelf.list_sums()
    program, version = await install_ollama([Source(shelf.url(name))], tmp_path, quiet)
    assert version == "0.24.0"
    assert FILLING in {file.read_bytes() for file in program.parents[1].rglob("*ggml*")}
    monkeypatch.setattr(installation, "own_folder", lambda: tmp_path)
    assert find_binary(None, {"PATH": "/nowhere"}) == program
    assert [one.name for one in tmp_path.iterdir()] == ["ollama"]


@pytest.mark.spec("AGENT-70")
async def test_a_wrong_checksum_installs_nothing_and_leaves_what_was_there(
    shelf: Shelf, tmp_path: Path
) -> None:
    name = "ollama-linux-amd64.tar.zst"
    shelf.files[name] = ARCHIVES[name]()
    shelf.list_sums()
    program, _ = await install_ollama([Source(shelf.url(name))], tmp_path, quiet)
    shelf.list_sums(**{name: "0" * 64})
    with pytest.raises(CannotInstallOllama, match="was changed, or is another file"):
        await install_ollama([Source(shelf.url(name))], tmp_path, quiet)
    assert program.read_bytes() == PROGRAM
    assert not list((tmp_path / "downloads").iterdir())
    with pytest.raises(CannotInstallOllama, match="does not list other"):
        await install_ollama([Source(shelf.url("other"))], tmp_path, quiet)


@pytest.mark.spec("AGENT-70")
async def test_a_download_that_is_cut_goes_on_where_it_ended(shelf: Shelf, tmp_path: Path) -> None:
    name = "ollama-linux-amd64.tar.zst"
    body = shelf.files[name] = ARCHIVES[name]()
    shelf.list_sums()
    shelf.cuts = installation.TRIES + 2
    with pytest.raises(CannotInstallOllama, match=r"it was cut; .* MB are here"):
        await install_ollama([Source(shelf.url(name))], tmp_path, quiet)
    (part,) = (tmp_path / "downloads").iterdir()
    assert body.startswith(part.read_bytes())
    assert part.stat().st_size > len(body) * 0.9
    before, size = shelf.ranges.copy(), part.stat().st_size
    assert before[0] == ""
    assert all(one.startswith("bytes=") for one in before[1:])
    await install_ollama([Source(shelf.url(name))], tmp_path, quiet)
    assert shelf.ranges[len(before)] == f"bytes={size}-"


@pytest.mark.spec("AGENT-70")
async def test_what_is_not_there_is_told_by_its_cause(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/ollama.tgz"
    for source in (Source(url), Source(url, "0" * 64)):
        with pytest.raises(CannotInstallOllama, match="connection refused"):
            await install_ollama([source], tmp_path, quiet)


@pytest.mark.spec("AGENT-71")
def test_a_file_of_ones_own_is_installed_without_a_network(tmp_path: Path) -> None:
    name = "ollama-darwin.tgz"
    file, into = tmp_path / name, tmp_path / "into"
    body = ARCHIVES[name]()
    file.write_bytes(body)
    digest = hashlib.sha256(body).hexdigest()

    def install(*more: str) -> tuple[int, str]:
        given = ["install-ollama", "--from", str(file), "--into", str(into), *more]
        done = CliRunner().invoke(app, given)
        return done.exit_code, " ".join(done.output.split())

    assert install()[0] == 1
    assert "--sha256" in install()[1]
    code, text = install("--sha256", "1" * 64)
    assert (code, "should have" in text, into.joinpath("ollama").exists()) == (1, True, False)
    code, text = install("--sha256", digest.upper())
    assert (code, "Ollama 0.24.0 is installed" in text) == (0, True)
    (tmp_path / "sha256sum.txt").write_text(f"{digest}  ./{name}\n")
    assert install()[0] == 0
    assert file.exists()
    file.write_bytes(body[: len(body) // 2])
    half = hashlib.sha256(file.read_bytes()).hexdigest()
    code, text = install("--sha256", half)
    assert (code, "cannot be unpacked" in text) == (1, True)
    assert (into / "ollama" / "ollama").read_bytes() == PROGRAM


@pytest.mark.spec("AGENT-71")
@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"../../outside": b"x", "ollama": PROGRAM}, "cannot be unpacked"),
        ({"readme": b"x"}, "has no ollama in it"),
        ({"ollama": b"#!/bin/sh\necho no GLIBC >&2; exit 1\n"}, "does not run here: no GLIBC"),
    ],
)
async def test_an_archive_that_is_not_ollamas_changes_nothing(
    tmp_path: Path, members: dict[str, bytes], words: str
) -> None:
    file = tmp_path / "a" / "ollama.tgz"
    file.parent.mkdir()
    file.write_bytes(gzipped(tar(members)))
    source = Source(str(file), hashlib.sha256(file.read_bytes()).hexdigest())
    with pytest.raises(CannotInstallOllama, match=words):
        await install_ollama([source], tmp_path / "b" / "c", quiet)
    assert not (tmp_path / "outside").exists()
    assert [one.name for one in (tmp_path / "b" / "c").iterdir()] == ["downloads"]


@pytest.mark.spec("AGENT-70")
def test_the_archives_are_those_of_the_release() -> None:
    def names(system: str, machine: str, *, rocm: bool = False) -> list[str]:
        found = archives("0.24.0", rocm=rocm, system=system, machine=machine)
        assert all("/download/v0.24.0/ollama-" in one.place for one in found)
        return [one.name for one in found]

    assert names("linux", "x86_64", rocm=True) == [
        "ollama-linux-amd64.tar.zst", "ollama-linux-amd64-rocm.tar.zst"
    ]  # fmt: skip
    assert names("linux", "aarch64", rocm=True) == ["ollama-linux-arm64.tar.zst"]
    assert names("darwin", "arm64") == ["ollama-darwin.tgz"]
    assert names("win32", "AMD64") == ["ollama-windows-amd64.zip"]
    with pytest.raises(CannotInstallOllama, match="riscv64"):
        names("linux", "riscv64")


KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from ollama_coordinator_agent import installation

def die(*given):
    os.kill(os.getpid(), signal.SIGKILL)

when, url, folder = sys.argv[1:]
progress, rename = lambda *given: None, Path.rename
if when == "downloading":
    progress = die
elif when == "trying":
    installation._tried = die
else:
    Path.rename = lambda old, new: die() if old.name == "ollama.new" else rename(old, new)
asyncio.run(installation.install_ollama([installation.Source(url)], Path(folder), progress))
"""

NEWER = b"#!/bin/sh\necho client version is 0.25.0\n"


@pytest.fixture
async def newer(shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """A release that is newer than the one that is installed in `tmp_path/agent`."""
    name = "ollama-linux-amd64.tar.zst"
    source = Source(shelf.url(name))
    folder = tmp_path / "agent"
    monkeypatch.setattr(installation, "own_folder", lambda: folder)
    for program in (PROGRAM, NEWER):
        shelf.files[name] = zstandard.compress(tar({**LINUX, "./bin/ollama": program}), 1)
        shelf.list_sums()
        if program is PROGRAM:
            await install_ollama([source], folder, quiet)
    return source


def installed(folder: Path) -> bytes:
    """The program that the agent would start."""
    program = find_binary(None, {"PATH": "/nowhere"})
    assert program is not None
    assert folder in program.parents
    assert (program.parents[1] / "lib/ollama/libggml.so.1").read_bytes() == FILLING
    return program.read_bytes()


@pytest.mark.spec("AGENT-70")
@pytest.mark.parametrize("when", ["downloading", "trying", "taking its place"])
async def test_an_installation_that_is_killed_leaves_what_was_there_and_is_done_by_the_next_run(
    newer: Source, tmp_path: Path, when: str
) -> None:
    folder = tmp_path / "agent"
    command = (sys.executable, "-c", KILLED, when, newer.place, str(folder))
    killed = await asyncio.create_subprocess_exec(*command)
    assert await killed.wait() == -signal.SIGKILL
    assert installed(folder) == PROGRAM
    _, version = await install_ollama([newer], folder, quiet)
    assert version == "0.25.0"
    assert installed(folder) == NEWER
    assert [one.name for one in folder.iterdir()] == ["ollama"]


@pytest.mark.spec("AGENT-70")
@pytest.mark.parametrize("while_it_comes", [True, False], ids=["downloading", "unpacking"])
async def test_a_disk_that_becomes_full_leaves_what_was_there_and_is_said(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, while_it_comes: bool
) -> None:
    with disk(tmp_path / "agent", 5000) as folder:
        monkeypatch.setattr(installation, "own_folder", lambda: folder)
        name = "ollama-linux-amd64.tar.zst"
        shelf.files[name] = ARCHIVES[name]()
        shelf.list_sums()
        source = Source(shelf.url(name))
        await install_ollama([source], folder, quiet)

        def full(name: str, here: int, total: int | None) -> None:
            if while_it_comes or here == total:
                fill(folder)

        with pytest.raises(CannotInstallOllama, match=r"nothing was installed: .*(?i:no space)"):
            await install_ollama([source], folder, full)
        assert installed(folder) == PROGRAM
        assert not (folder / "ollama.new").exists()
        (folder / "filler").unlink()
        await install_ollama([source], folder, quiet)
        assert [one.name for one in folder.iterdir()] == ["ollama"]
