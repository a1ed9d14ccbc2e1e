"""The `ollama serve` process: where its program is, starting it, ending it, knowing it again."""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil
from msgspec import Struct

from .network import netloc
from .server_log import fresh
from .server_settings import serve_host

log = logging.getLogger(__name__)

KILLED_WITHIN_SECONDS = 2.0


def find_binary(configured: Path | None, environ: Mapping[str, str]) -> Path | None:
    """The `ollama` program: the configured one, else on PATH, else where its installers put it."""
    search_path = environ.get("PATH")
    candidates = [configured] if configured else [Path("ollama"), *_installed_at(environ)]
    for candidate in candidates:
        if found := shutil.which(str(candidate), path=search_path):
            return Path(found)
    return None


def _installed_at(environ: Mapping[str, str]) -> list[Path]:
    """Where Ollama's installers put the program; a service often has no PATH to speak of."""
    if sys.platform == "win32":
        local = environ.get("LOCALAPPDATA")
        return [Path(local, "Programs", "Ollama", "ollama.exe")] if local else []
    folders = ["/usr/local/bin", "/usr/bin"]
    if sys.platform == "darwin":
        folders += ["/opt/homebrew/bin", "/Applications/Ollama.app/Contents/Resources"]
    return [Path(folder, "ollama") for folder in folders]


class Child:
    """One `ollama serve` that is ours to end; `created` tells it from a later one with its pid."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self.pid = process.pid
        self.created = process.create_time()
        self._is_over = False
        self.exit_code: int | None = None  # negative: the signal that ended it

    @classmethod
    def reclaim(cls, pid: int, created: float) -> "Child | None":
        """The child of an earlier agent that was killed and could not end it, if it still runs."""
        try:
            child = cls(psutil.Process(pid))
        except psutil.Error:
            return None
        return child if abs(child.created - created) < 0.1 and child.is_alive() else None

    def is_alive(self) -> bool:
        """Whether it still runs; when it does not, its exit code and its runners are collected."""
        if self._is_over:
            return False
        try:
            self.exit_code = self._process.wait(timeout=0)
        except psutil.TimeoutExpired:
            return True
        self._is_over = True
        if isinstance(self._process, psutil.Popen):  # we reaped it, so the number is still its own
            _end_group(self.pid)
        return False

    async def stop(self, grace_seconds: float) -> None:
        """Ask it to end, then end it; its model runners never outlive it."""
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
    """End what a crashed server left behind: model runners that would keep the GPU's memory."""
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
    """What keeps a terminal's Ctrl-C, and on Windows a console window, away from a process."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}
    return {"start_new_session": True}
