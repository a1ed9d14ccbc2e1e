"""The output of an `ollama serve` that we started: a file, kept within bounds while it runs.

The server writes to the file itself, not through a pipe of ours: our death neither ends it nor
makes it wait. So the file cannot be exchanged under it; it is copied and emptied in place, which
takes that everything is written at its end, wherever that is then.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

LARGEST_BYTES = 10 * 1024 * 1024
OLDER_FILES = 2
"""`.log.1`, `.log.2`: those of the starts before, or earlier output of the same one."""

PIECE_BYTES = 1024 * 1024


@contextmanager
def fresh(file: Path) -> Iterator[int]:
    """A descriptor that appends to an empty log file; what was in it is kept beside it.

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
    """Empty a log file that has grown too large; its last part is kept beside it.

    What is written between the copy and the emptying is lost. On a disk that takes no copy the
    file is emptied all the same, for else it would fill what is left of it.
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
            log.warning("output of ollama serve not kept", extra={"reason": str(exc)})
        os.truncate(file, 0)
    except OSError as exc:
        log.debug("output of ollama serve not looked at", extra={"reason": str(exc)})


def _older(file: Path, number: int) -> Path:
    return file.with_suffix(f".log.{number}")


def _shift(file: Path) -> None:
    """Make room beside the file for one more older one."""
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
    SHARED = 0x0007  # to be read, written, and renamed by others meanwhile
    OPEN_ALWAYS = 4

    def _appending(file: Path) -> int:
        """Python's own way to append only seeks to the end before it writes; a child does not."""
        access = FILE_APPEND_DATA | SYNCHRONIZE
        null = _winapi.NULL
        handle = _winapi.CreateFile(str(file), access, SHARED, null, OPEN_ALWAYS, 0, null)
        return msvcrt.open_osfhandle(handle, os.O_APPEND)

else:

    def _appending(file: Path) -> int:
        return os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
