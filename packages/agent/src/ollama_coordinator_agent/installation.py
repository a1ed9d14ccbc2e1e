"""`install-ollama`: one release of Ollama, checked and put into a folder of the agent's own.

The names of archives, what is in them and `sha256sum.txt` are those of Ollama's release workflow.
"""

import asyncio
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import aiohttp
import platformdirs
from msgspec import Struct

from ollama_coordinator_common.error import OllamaCoordinatorError
from ollama_coordinator_common.network import cause_of

RELEASE = "0.24.0"
"""The release that this version of the agent was tried with."""

RELEASES = "https://github.com/ollama/ollama/releases/download"
SUMS = "sha256sum.txt"
"""The list beside each release's files: a SHA-256 and `./NAME` a line."""

SUMS_BYTES = 1024 * 1024
PIECE_BYTES = 1024 * 1024
SILENT_SECONDS = 30.0
TRIES = 5
"""Of a download that is cut: each goes on where the last one ended."""

UNPACKED_TIMES = 4
"""An archive needs so many times its size on the disk: itself, and what is in it."""

PROGRAMS = ("bin/ollama", "ollama", "ollama.exe")
"""In archives for Linux, macOS and Windows. Ollama looks for its libraries from there."""

INSTALLED, FRESH, BEFORE = "ollama", "ollama.new", "ollama.old"
"""Folders: what is installed, what is being unpacked, and what makes room for it at the end.

Where that end was cut off, by `kill -9` say, `BEFORE` is all that there is.
"""

Progress = Callable[[str, int, int | None], None]
"""Called with a name, the bytes that are here, and those that there are."""


class CannotInstallOllama(OllamaCoordinatorError):
    """Ollama is not installed; says why, and what to do. What was installed before stays."""


class Source(Struct, frozen=True):
    """An archive of Ollama, a file or a URL, and the SHA-256 that it has; empty: as listed."""

    place: str
    sha256: str = ""

    @property
    def name(self) -> str:
        """The name of its file."""
        return Path(urlsplit(self.place).path if self.is_url else self.place).name

    @property
    def is_url(self) -> bool:
        """Whether it has to be downloaded."""
        return self.place.startswith(("http://", "https://"))

    @property
    def sums(self) -> str:
        """Where the list with its checksum is: beside it."""
        if self.is_url:
            return f"{self.place.rpartition('/')[0]}/{SUMS}"
        return str(Path(self.place).parent / SUMS)


def own_folder() -> Path:
    """Where the agent keeps an Ollama that it installed: for all if root does, else its user's."""
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        return Path("/opt/ollama-coordinator-agent")
    return platformdirs.user_data_path("ollama-coordinator-agent", appauthor=False)


def installed_programs() -> list[Path]:
    """The programs that an installation may have left, this user's before the machine's."""
    folders = dict.fromkeys([own_folder(), Path("/opt/ollama-coordinator-agent")])
    places = [folder / place for folder in folders for place in (INSTALLED, BEFORE)]
    return [place / name for place in places for name in PROGRAMS]


def archives(
    release: str, *, rocm: bool, system: str = sys.platform, machine: str = platform.machine()
) -> list[Source]:
    """What has to be downloaded of a release; `rocm`: the libraries for AMD's GPUs too.

    Raises:
        CannotInstallOllama: there is none for this system or processor.
    """
    processor = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64"}.get(
        machine.lower()
    )
    names = {
        "linux": f"ollama-linux-{processor}.tar.zst",
        "darwin": "ollama-darwin.tgz",
        "win32": f"ollama-windows-{processor}.zip",
    }
    if processor is None or system not in names:
        raise CannotInstallOllama(f"Ollama has no program for {system} on {machine}")
    found = [names[system]]
    if rocm and processor == "amd64" and system != "darwin":
        found.append(names[system].replace("amd64", "amd64-rocm"))
    return [Source(f"{RELEASES}/v{release}/{name}") for name in found]


async def install_ollama(
    sources: list[Source], folder: Path, progress: Progress
) -> tuple[Path, str]:
    """Put the archives' contents into `folder/ollama`; the program there, and its version.

    Raises:
        CannotInstallOllama: an archive cannot be had, or is not what it should be.
    """
    try:
        (folder / "downloads").mkdir(parents=True, exist_ok=True)
        files = [await _checked(source, folder / "downloads", progress) for source in sources]
        done = await asyncio.to_thread(_put, files, folder / INSTALLED)
        await asyncio.to_thread(shutil.rmtree, folder / "downloads", ignore_errors=True)
    except OSError as exc:
        raise CannotInstallOllama(f"nothing was installed: {cause_of(exc)}") from exc
    return done


# ── getting archives ──────────────────────────────────────────────────────────────────────────


async def _checked(source: Source, downloads: Path, progress: Progress) -> Path:
    """The archive's file, with the right checksum."""
    if not source.is_url:
        wanted = source.sha256 or _listed(await asyncio.to_thread(_read_sums, source), source)
        file = Path(source.place)
        await asyncio.to_thread(_compare, file, wanted, source)
        return file
    timeout = aiohttp.ClientTimeout(
        total=None, sock_connect=SILENT_SECONDS, sock_read=SILENT_SECONDS
    )
    # Proxies of the environment count here: this is the internet.
    async with aiohttp.ClientSession(
        timeout=timeout,
        trust_env=True,
        headers={"Accept-Encoding": "identity"},
        auto_decompress=False,  # a .tgz is to stay one, whatever a server says of it
    ) as session:
        wanted = source.sha256 or _listed(await _fetch_sums(session, source), source)
        file = downloads / f"{wanted[:16]}-{source.name}"
        await _download(session, source, file, progress)
    try:
        await asyncio.to_thread(_compare, file, wanted, source)
    except CannotInstallOllama:
        file.unlink(missing_ok=True)
        raise
    return file


async def _download(
    session: aiohttp.ClientSession, source: Source, file: Path, progress: Progress
) -> None:
    """Download into a file, going on with what is in it (RFC 9110, section 14)."""
    for last in range(1, TRIES + 1):
        have = _size(file)
        try:
            async with session.get(
                source.place, headers={"Range": f"bytes={have}-"} if have else {}
            ) as response:
                if response.status == 416:  # all of it is here already
                    return
                if response.status not in (200, 206):
                    text = f"{source.place} answers {response.status}"
                    raise CannotInstallOllama(f"nothing was installed: {text}")
                have = have if response.status == 206 else 0
                await _write(response, file, have, source.name, progress)
                return
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as exc:
            if last < TRIES and isinstance(exc, aiohttp.ClientPayloadError):
                continue
            cause = "it was cut" if isinstance(exc, aiohttp.ClientPayloadError) else cause_of(exc)
            kept = _size(file)
            text = f"nothing was installed: no download from {source.place}: {cause}"
            if kept:
                text += f"; {kept / 1e6:.1f} MB are here, and the same command goes on from there"
            raise CannotInstallOllama(text) from exc


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


async def _write(
    response: aiohttp.ClientResponse, file: Path, have: int, name: str, progress: Progress
) -> None:
    left = response.content_length
    total = None if left is None else have + left
    free = shutil.disk_usage(file.parent).free
    if total is not None and free < UNPACKED_TIMES * total - have:
        needs = f"{UNPACKED_TIMES * total / 1e9:.1f} GB"
        raise CannotInstallOllama(f"{file.parent} has {free / 1e9:.1f} GB free; it takes {needs}")
    with file.open("r+b" if have else "wb") as stream:
        stream.seek(have)
        stream.truncate()
        async for piece in response.content.iter_chunked(PIECE_BYTES):
            stream.write(piece)
            have += len(piece)
            progress(name, have, total)


async def _fetch_sums(session: aiohttp.ClientSession, source: Source) -> str:
    try:
        async with session.get(source.sums) as response:
            if response.status == 200:
                return (await response.content.read(SUMS_BYTES)).decode("utf-8", "replace")
            text = f"it is answered with {response.status}"
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as exc:
        text = cause_of(exc)
    raise CannotInstallOllama(
        f"nothing was installed: there is no list of checksums at {source.sums}: {text}; where"
        " there is no internet give an archive with --from, and its --sha256"
    )


def _read_sums(source: Source) -> str:
    try:
        return Path(source.sums).read_text("utf-8")
    except OSError as exc:
        raise CannotInstallOllama(
            f"nothing was installed: the SHA-256 of {source.name} is not known: give --sha256, or"
            f" put the release's {SUMS} beside it"
        ) from exc


def _listed(sums: str, source: Source) -> str:
    """The checksum of an archive in a list."""
    for line in sums.splitlines():
        digest, _, name = line.partition(" ")
        if name.strip().removeprefix("*").removeprefix("./") == source.name:
            return digest.lower()
    raise CannotInstallOllama(f"nothing was installed: {source.sums} does not list {source.name}")


def _compare(file: Path, wanted: str, source: Source) -> None:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != wanted.lower():
        raise CannotInstallOllama(
            f"nothing was installed: {source.place} has the SHA-256 {found}, and should have"
            f" {wanted.lower()}: it was changed, or is another file"
        )


# ── unpacking them ────────────────────────────────────────────────────────────────────────────


def _put(files: list[Path], target: Path) -> tuple[Path, str]:
    """Unpack archives beside the target, try the program, and only then take the target's place."""
    fresh, old = target.with_name(FRESH), target.with_name(BEFORE)
    _put_back(old, target)
    for folder in (fresh, old):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        for file in files:
            _unpack(file, fresh)
        program = next((fresh / name for name in PROGRAMS if (fresh / name).is_file()), None)
        if program is None:
            raise CannotInstallOllama(f"nothing was installed: {files[0]} has no ollama in it")
        program.chmod(0o755)
        version = _tried(program)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        _put_back(old, target)
    shutil.rmtree(old, ignore_errors=True)
    return target / program.relative_to(fresh), version


def _put_back(old: Path, target: Path) -> None:
    """Give what was installed before its place again, where nothing took it."""
    if old.exists() and not target.exists():
        old.rename(target)


def _unpack(file: Path, target: Path) -> None:
    """Unpack an archive; no name in it leads out of the folder."""
    try:
        if file.name.endswith(".zip"):
            with zipfile.ZipFile(file) as packed:
                packed.extractall(target)  # noqa: S202 (it drops what leads out)
        elif file.name.endswith(".zst"):
            import zstandard  # for this command alone

            with file.open("rb") as stream:
                decoder = zstandard.ZstdDecompressor(max_window_size=2**31)
                with decoder.stream_reader(stream) as plain:
                    _untar(plain, target)
        else:
            with file.open("rb") as stream:
                _untar(stream, target)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, ValueError, RuntimeError) as exc:
        text = f"{file} cannot be unpacked: {cause_of(exc)}"
        raise CannotInstallOllama(f"nothing was installed: {text}") from exc


def _untar(stream: BinaryIO, target: Path) -> None:
    if not hasattr(tarfile, "data_filter"):
        raise CannotInstallOllama("nothing was installed: that takes Python 3.11.4 or later")
    with tarfile.open(fileobj=stream, mode="r|*") as packed:
        packed.extractall(target, filter="data")


def _tried(program: Path) -> str:
    """The version that the program says it has: it runs on this machine."""
    try:
        done = subprocess.run(  # noqa: S603 (it has the right checksum)
            [program, "--version"], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        why = cause_of(exc) if isinstance(exc, OSError) else "it does not end"
        raise CannotInstallOllama(f"nothing was installed: it does not run here: {why}") from exc
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise CannotInstallOllama(f"nothing was installed: it does not run here: {said}")
    found = re.search(r"version is (\S+)", done.stdout)
    return found[1] if found else "unknown"
