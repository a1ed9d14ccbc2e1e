"""The last lines of the agent's log and of the `ollama serve` it started, for the dashboard.

They leave this machine only when the coordinator asks: while an operator looks at them there.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

from ollama_coordinator_common.commandline import EventFormatter
from ollama_coordinator_common.protocol import LogLine, LogReport

LINES = 500
"""Lines of each log: what an operator reads at most, at a page of the dashboard."""

LINE_CHARACTERS = 2000
"""A longer line is cut: with `LINES` of them a report stays below a few megabytes."""

TAIL_BYTES = 128 * 1024
"""What is read of the server's output to find its last lines."""


class Recent(logging.Handler):
    """Keeps the last records of the log. Numbers begin with the time, so that they always grow."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(EventFormatter("%(message)s"))
        self._lines: deque[LogLine] = deque(maxlen=LINES)
        self._number = time.time_ns() // 1_000_000

    def emit(self, record: logging.LogRecord) -> None:
        """Remember one record; logging serialises the calls."""
        try:
            text = self.format(record)[:LINE_CHARACTERS]
        except Exception:  # noqa: BLE001
            self.handleError(record)  # as every handler does: a log call raises nothing
            return
        self._number += 1
        at = datetime.fromtimestamp(record.created, UTC)
        self._lines.append(LogLine(self._number, at, record.levelname.lower(), text))

    def after(self, number: int) -> list[LogLine]:
        """The lines with greater numbers, the oldest first."""
        return [line for line in self._lines.copy() if line.number > number]


class Logs:
    """What is sent of both logs; `server_file` is the one that `ollama serve` writes to."""

    def __init__(self, recent: Recent, server_file: Path) -> None:
        self._recent = recent
        self._server_file = server_file
        self._sent: object = None

    @asynccontextmanager
    async def news(self, after: int) -> AsyncIterator[LogReport]:
        """The lines after a number, and the server's last ones if there are new ones.

        `after` is 0 for a coordinator that has nothing yet. The server's lines count as sent once
        the block ends in order.
        """
        stamp = await asyncio.to_thread(_stamp, self._server_file)
        server = None
        if stamp is not None and (after == 0 or stamp != self._sent):
            server = await asyncio.to_thread(tail, self._server_file)
        yield LogReport(lines=self._recent.after(after), server=server)
        self._sent = stamp


def tail(file: Path) -> list[str]:
    """The last lines of a text file; none of one that cannot be read."""
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, 2)
            start = max(0, size - TAIL_BYTES)
            stream.seek(start)
            text = stream.read(TAIL_BYTES).decode("utf-8", "replace")
    except OSError:
        return []
    lines = text.splitlines()
    if start:
        del lines[:1]  # most likely the end of one
    return [line[:LINE_CHARACTERS] for line in lines[-LINES:]]


def _stamp(file: Path) -> tuple[int, int] | None:
    """What changes with the file; `None` when there is none: no server was ever started."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
