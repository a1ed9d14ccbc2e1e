"""Who is connected: how many may be, who does not read what it is sent, and an end to all of them.

It knows no HTTP, so it is the same for ours and for Hypercorn's.
"""

import asyncio
import contextlib
import logging
import struct
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

log = logging.getLogger(__name__)

VISIT = "visit"
"""Where an application finds, in its scope's state, the `Visit` that a request belongs to."""

LOOKS = 10
"""A stall is looked for so often within the time that makes one."""

LONGEST_LOOK_SECONDS = 1.0
"""Also how soon another time counts."""

TURNED_AWAY_AT_ONCE = 32
"""So many of those for whom there is no room may be told why at the same time."""


if sys.platform == "win32":

    def _in_kernel(descriptor: int) -> int:
        """Not known there."""
        return 0

else:
    import fcntl
    import termios

    def _in_kernel(descriptor: int) -> int:
        """Bytes that the kernel has not yet delivered; 0 where it does not tell."""
        with contextlib.suppress(OSError, ValueError):  # it is closed, or of another kind
            return int(struct.unpack("i", fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(4)))[0])
        return 0


class Visit:
    """One connection. `reason`: why we ended it, empty where we did not."""

    __slots__ = ("_reader", "_transport", "_unsent", "_unsent_since", "client", "reason")

    def __init__(
        self, transport: asyncio.Transport, reader: asyncio.StreamReader | None, now: float
    ) -> None:
        self._transport = transport
        self._reader = reader
        self._unsent = 0
        self._unsent_since = now
        self.client = transport.get_extra_info("peername")
        self.reason = ""

    def stalled_seconds(self, now: float) -> float:
        """How long nothing of what waits to be sent has gone out, as far as was looked."""
        unsent = self._transport.get_write_buffer_size()
        if unsent > 0:
            # A large kernel buffer takes no more from us for long after its other end was read.
            unsent += _in_kernel(self._transport.get_extra_info("socket").fileno())
        if unsent == 0 or unsent < self._unsent:
            self._unsent_since = now
        self._unsent = unsent
        return now - self._unsent_since

    def is_gone(self) -> bool:
        """Whether the client has left, as far as can be seen."""
        return self._transport.is_closing() or (self._reader is not None and self._reader.at_eof())

    def end(self, reason: str) -> None:
        """End the connection now; what was not sent is lost."""
        self.reason = self.reason or reason
        self._transport.abort()


class Door:
    """The connections of one server.

    `most` may be there at once (`None`: any number). One whose client takes nothing of its answer
    for `stall_seconds` is ended (0: never); asked anew at each look, since it may change.
    """

    def __init__(
        self, *, most: int | None = None, stall_seconds: Callable[[], float] = lambda: 0.0
    ) -> None:
        self.most = most
        self._stall_seconds = stall_seconds
        self._visits: set[Visit] = set()
        self._full = False
        self._leaving = 0
        self.closing = False

    def __len__(self) -> int:
        return len(self._visits)

    def enter(
        self, transport: asyncio.Transport, reader: asyncio.StreamReader | None = None
    ) -> Visit | None:
        """Let a new connection in; `None` when there is no room, or nobody is let in any more.

        `reader` is where what the client sends can be read, if it stays there.
        """
        if self.most is not None and len(self._visits) >= self.most:
            self._see_off()
        has_room = self.most is None or len(self._visits) < self.most
        if not has_room and not self._full:
            log.warning("as many connections as there can be", extra={"connections": self.most})
        self._full = not has_room
        if self.closing or not has_room:
            return None
        visit = Visit(transport, reader, asyncio.get_running_loop().time())
        self._visits.add(visit)
        return visit

    def _see_off(self) -> None:
        """End the connections of those who are gone: Hypercorn keeps theirs for a while."""
        for visit in [visit for visit in self._visits if visit.is_gone()]:
            visit.end("the client left")
            self._visits.discard(visit)

    def leave(self, visit: Visit) -> None:
        """A connection has ended."""
        self._visits.discard(visit)

    async def turn_away(
        self, answer: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """End a connection that was not let in; tell it why if not too many are told already."""
        try:
            if not self.closing and self._leaving < TURNED_AWAY_AT_ONCE:
                self._leaving += 1
                try:
                    await _tell(answer, reader, writer)
                finally:
                    self._leaving -= 1
        finally:
            writer.transport.abort()

    def close(self) -> None:
        """Let nobody in any more."""
        self.closing = True

    def end_all(self, reason: str) -> None:
        """End every connection now."""
        for visit in list(self._visits):
            visit.end(reason)

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """End the connections that stall, as long as the block runs."""
        watching = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            pause = self._stall_seconds() / LOOKS or LONGEST_LOOK_SECONDS
            await asyncio.sleep(min(pause, LONGEST_LOOK_SECONDS))
            self._look(loop.time(), self._stall_seconds() or float("inf"))

    def _look(self, now: float, most: float) -> None:
        """End who stalls for `most` seconds; where that is never, still see when a stall begins."""
        for visit in list(self._visits):
            if not visit.reason and visit.stalled_seconds(now) >= most:
                reason = f"the client took nothing of its answer for {most:g} s"
                log.warning("connection ended", extra={"client": visit.client, "why": reason})
                visit.end(reason)


TELLING_SECONDS = 1.0


async def _tell(answer: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send an answer and read on for a moment: an end under what is still unread would undo it."""
    try:
        async with asyncio.timeout(TELLING_SECONDS):
            writer.write(answer)
            writer.write_eof()
            while await reader.read(65536):
                pass
    except (OSError, TimeoutError):
        return
