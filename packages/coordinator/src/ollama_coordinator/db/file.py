"""A process's claim to SQLite's file."""

import logging
import time
from pathlib import Path

from filelock import FileLock, Timeout

from .database import InUse

log = logging.getLogger(__name__)

BESIDE = ("-wal", "-shm")
"""SQLite's own files beside a database, while somebody has it open."""


class FileClaim:
    """The claim of one process to a database's file; a database in memory needs none.

    Two coordinators on one file would overwrite each other. The lock is on a file beside it: SQLite
    loses its own locks when its process closes another handle of the same file.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = None if path is None else path.resolve()
        self._files: list[tuple[int, int] | None] = []
        self._lock: FileLock | None = None
        if self._path is not None:
            self._lock = FileLock(f"{self._path}.lock", thread_local=False)

    def take(self) -> None:
        """Be the only process with this file.

        The system frees the lock when the process ends, however it ends. Where the folder cannot
        lock, that is logged.

        Raises:
            InUse: another process has it.
        """
        if self._path is None or self._lock is None or not self._path.parent.is_dir():
            return  # a missing folder would be made
        try:
            self._lock.acquire(blocking=False)
        except Timeout as exc:
            raise InUse from exc
        except (OSError, NotImplementedError) as exc:
            extra = {"database": str(self._path), "reason": str(exc)}
            log.warning("a second coordinator on this database would go unnoticed", extra=extra)

    def release(self) -> None:
        """Leave the file to others."""
        if self._lock is not None:
            self._lock.release()

    def note(self) -> None:
        """Remember which files these are now."""
        self._files = self._identities()

    def is_true(self) -> bool:
        """Whether the path still names the files that were noted, by their device and inode.

        Without its `-wal`, a database lacks what was written last.
        """
        return self._identities() == self._files

    def put_aside(self) -> Path | None:
        """Move away what another has put in the file's place; its new name, if there was any.

        What SQLite wrote beside the noted file is of no use any more, and would spoil a new one.
        The noted file itself stays, for the new one to replace it in one step.
        """
        if self._path is None:
            return None
        aside = self._path.with_name(f"{self._path.name}.replaced-{time.time_ns()}")
        for suffix, known, found in zip(
            ("", *BESIDE), self._files, self._identities(), strict=True
        ):
            file = Path(f"{self._path}{suffix}")
            if suffix and found is not None and found == known:
                file.unlink()
            elif found is not None and found != known:
                file.rename(f"{aside}{suffix}")
        return aside if aside.exists() else None

    def _identities(self) -> list[tuple[int, int] | None]:
        if self._path is None:
            return []
        return [_identity(Path(f"{self._path}{suffix}")) for suffix in ("", *BESIDE)]


def _identity(file: Path) -> tuple[int, int] | None:
    try:
        facts = file.stat()
    except OSError:
        return None
    return facts.st_dev, facts.st_ino
