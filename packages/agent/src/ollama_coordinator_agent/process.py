"""An `ollama serve` that we start: its program, its process, and the file with its output.

The server writes to the file itself, not through a pipe: the agent's death neither ends it nor
makes it wait. So the file cannot be exchanged while it runs; it is copied and emptied in place.
That works because the server appends: each write goes to where the end is by then.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from msgspec import Struct

from ollama_coordinator_common.network import cause_of, netloc

from .installation import installed_programs
from .ollama import serve_host

log = logging.getLogger(__name__)

KILLED_WITHIN_SECONDS = 2.0
"""How long the system may take to end a killed process."""

LARGEST_BYTES = 10 * 1024 * 1024
"""Some hours of Ollama's usual output; three files of it are little on any disk."""

OLDER_FILES = 2
"""`.log.1`, `.log.2`: the output of earlier starts, or earlier output of this one."""

GIBIBYTE = 2**30

PIECE_BYTES = 1024 * 1024
"""What is copied at once: the agent runs on machines with little memory to spare."""


def find_binary(configured: Path | None, environ: Mapping[str, str]) -> Path | None:
    """The `ollama` program: the configured one, else one that this agent installed, else one on
    PATH, else where Ollama's own installers put it.
    """
    search_path = environ.get("PATH")
    candidates = [configured] if configured else []
    if configured is None:
        candidates = [*installed_programs(), Path("ollama"), *_installed_at(environ)]
    for candidate in candidates:
        if found := shutil.which(str(candidate), path=search_path):
            return Path(found)
    return None


def _installed_at(environ: Mapping[str, str]) -> list[Path]:
    """Where Ollama's installers put the program; the PATH of a service often lacks these."""
    if sys.platform == "win32":
        local = environ.get("LOCALAPPDATA")
        return [Path(local, "Programs", "Ollama", "ollama.exe")] if local else []
    folders = ["/usr/local/bin", "/usr/bin"]
    if sys.platform == "darwin":
        folders += ["/opt/homebrew/bin", "/Applications/Ollama.app/Contents/Resources"]
    return [Path(folder, "ollama") for folder in folders]


class Child:
    """One `ollama serve` that we started and may end; `created` and `pid` together identify it."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self.pid = process.pid
        self.created = process.create_time()
        self._is_over = False
        self.exit_code: int | None = None  # negative: the signal that ended it

    @classmethod
    def reclaim(cls, pid: int, created: float) -> "Child | None":
        """The child of an earlier agent that could not end it; `None` if it runs no more."""
        try:
            child = cls(psutil.Process(pid))
        except psutil.Error:
            return None
        return child if abs(child.created - created) < 0.1 and child.is_alive() else None

    def is_alive(self) -> bool:
        """Whether it still runs; if not, `exit_code` is set and the runners it left are ended."""
        if self._is_over:
            return False
        try:
            self.exit_code = self._process.wait(timeout=0)
        except psutil.TimeoutExpired:
            return True
        self._is_over = True
        if isinstance(
            self._process, psutil.Popen
        ):  # we waited for it, so no other process has its number yet
            _end_group(self.pid)
        return False

    async def stop(self, grace_seconds: float) -> None:
        """Terminate it, and kill it after `grace_seconds`; its model runners never outlive it."""
        family = self._family()
        try:
            self._process.terminate()
            async with asyncio.timeout(grace_seconds):
                while self.is_alive():  # noqa: ASYNC110 (a process sets no event)
                    await asyncio.sleep(0.02)
        except TimeoutError:
            log.warning("ollama serve ignores the request to end; killing it")
        except psutil.NoSuchProcess:
            pass
        finally:
            _kill(family)
            with contextlib.suppress(psutil.TimeoutExpired):
                self.exit_code = self._process.wait(timeout=KILLED_WITHIN_SECONDS)

    def _family(self) -> list[psutil.Process]:
        try:
            return [*self._process.children(recursive=True), self._process]
        except psutil.Error:
            return [self._process]


def _end_group(leader: int) -> None:
    """Kill the model runners that a crashed server left: they would keep the GPU's memory."""
    if sys.platform != "win32":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(leader, signal.SIGKILL)


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        try:
            if process.is_running():
                process.kill()
        except psutil.Error:
            continue


def orphaned_runners() -> dict[int, int]:
    """Model runners without an Ollama: their process ids, and the main memory of each in bytes.

    They are processes of their own, which outlive an Ollama that is killed (`kill -9`).
    """
    found = {}
    for process in psutil.process_iter():
        try:
            if _is_ollama(process) and _is_runner(process) and not _is_ollama(process.parent()):
                found[process.pid] = process.memory_info().rss
        except psutil.Error:
            continue  # it has ended, or is not ours to see
    return found


def _is_ollama(process: psutil.Process | None) -> bool:
    return process is not None and "ollama" in process.name().lower()


def _is_runner(process: psutil.Process) -> bool:
    """Whether it is `ollama runner`; before 0.5.8 runners were a program of their own."""
    return "runner" in process.cmdline()[1:3] or process.name().startswith("ollama_llama")


def left_behind(runners: Mapping[int, int]) -> str:
    """The sentence on such runners for the operator."""
    what = (
        "a model runner that still holds" if len(runners) == 1 else "model runners that still hold"
    )
    pids = ", ".join(map(str, sorted(runners)))
    size = sum(runners.values()) / GIBIBYTE
    return (
        f"a killed Ollama left {what} memory ({size:.1f} GiB, and what is on a GPU): end process"
        f" {pids}"
    )


class ServeCommand(Struct, frozen=True):
    """How this agent starts its Ollama."""

    binary: Path
    environ: Mapping[str, str]
    port: int
    log_file: Path

    def start(self) -> Child:
        """Start `ollama serve` apart from our terminal, its output in the log file.

        A Ctrl-C in the terminal then reaches only the agent, which says goodbye first.

        Raises:
            OSError: the program or the log file cannot be opened, or it ended at once.
        """
        listen = netloc(serve_host(self.environ), self.port)
        with fresh(self.log_file) as output:
            process = psutil.Popen(
                [str(self.binary), "serve"],
                env={**self.environ, "OLLAMA_HOST": listen},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                **_apart(),
            )
        try:
            return Child(process)
        except psutil.NoSuchProcess as exc:
            raise OSError(f"it ended at once; see {self.log_file}") from exc


def _apart() -> dict[str, Any]:
    """Arguments that keep a terminal's Ctrl-C, and on Windows a console window, from a process."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}
    return {"start_new_session": True}


@contextmanager
def fresh(file: Path) -> Iterator[int]:
    """A descriptor that appends to an empty log file; what was in it moves to an older file.

    Raises:
        OSError: the file cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists():
        _shift(file)
        file.replace(_older(file, 1))
    descriptor = _appending(file)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def keep_small(file: Path) -> None:
    """Empty a log file that has grown too large; its last part becomes an older file.

    What is written between the copy and the emptying is lost. Where the disk has no room for the
    copy the file is emptied all the same: it would fill the rest of the disk.
    """
    try:
        size = file.stat().st_size
        if size <= LARGEST_BYTES:
            return
        try:
            _shift(file)
            _copy_end(file, _older(file, 1), size)
        except OSError as exc:
            _older(file, 1).unlink(missing_ok=True)
            log.warning("output of ollama serve not kept", extra={"reason": cause_of(exc)})
        os.truncate(file, 0)
    except OSError as exc:
        log.debug("output of ollama serve not looked at", extra={"reason": cause_of(exc)})


def _older(file: Path, number: int) -> Path:
    return file.with_suffix(f".log.{number}")


def _shift(file: Path) -> None:
    """Rename each older file to the next number; the last one is replaced."""
    for number in range(OLDER_FILES, 1, -1):
        if _older(file, number - 1).exists():
            _older(file, number - 1).replace(_older(file, number))


def _copy_end(source: Path, target: Path, size: int) -> None:
    with source.open("rb") as old, target.open("wb") as new:
        old.seek(max(0, size - LARGEST_BYTES))
        left = LARGEST_BYTES
        while left > 0 and (piece := old.read(min(left, PIECE_BYTES))):
            new.write(piece)
            left -= len(piece)


if sys.platform == "win32":
    import _winapi
    import msvcrt

    FILE_APPEND_DATA = 0x0004
    SYNCHRONIZE = 0x0010_0000
    SHARED = 0x0007  # others may read, write and rename it meanwhile
    OPEN_ALWAYS = 4

    def _appending(file: Path) -> int:
        """Python appends by a seek to the end before each write, which a child process does not."""
        access = FILE_APPEND_DATA | SYNCHRONIZE
        null = _winapi.NULL
        handle = _winapi.CreateFile(str(file), access, SHARED, null, OPEN_ALWAYS, 0, null)
        return msvcrt.open_osfhandle(handle, os.O_APPEND)

else:

    def _appending(file: Path) -> int:
        return os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
