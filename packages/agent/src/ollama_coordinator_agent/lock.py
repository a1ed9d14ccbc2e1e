"""One agent for one Ollama: the operating system's own file lock.

The kernel frees the lock when the process ends, however it ends, so there is no stale lock to
remove by hand, no port to reserve, and no dependency for twenty lines.
"""

import errno
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ollama_coordinator_common.error import OllamaCoordinatorError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

log = logging.getLogger(__name__)

HELD_BY_ANOTHER = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}


class AlreadyRunning(OllamaCoordinatorError):
    """Another agent on this machine looks after the same Ollama."""

    def __init__(self, file: Path) -> None:
        super().__init__(
            "another agent on this machine already looks after this Ollama"
            f" (it holds {file}); stop it, or set OLLAMA_PORT for a second Ollama"
        )


@contextmanager
def only_one(file: Path) -> Iterator[None]:
    """Hold `file` for as long as the block runs.

    A file system that cannot lock is told and survived.

    Raises:
        AlreadyRunning: another process holds it.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = file.open("a+b")
    except OSError as exc:
        log.warning("a second agent would go unnoticed", extra={"reason": str(exc)})
        yield
        return
    with handle:
        try:
            _lock(handle)
        except OSError as exc:
            if exc.errno in HELD_BY_ANOTHER:
                raise AlreadyRunning(file) from exc
            log.warning("a second agent would go unnoticed", extra={"reason": str(exc)})
        yield


def _lock(handle: IO[bytes]) -> None:
    if sys.platform == "win32":
        handle.seek(0)
        msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
