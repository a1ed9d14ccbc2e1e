"""A connection to the coordinator that is parked until the coordinator sends a request over it."""

import asyncio

from ollama_coordinator_common.pump import Pipe
from ollama_coordinator_common.websocket import (
    PONG,
    SMALL_BYTES,
    FrameReader,
    NotWebSocket,
    head_of,
)

from .dial import Dialled


class Tunnel(Pipe):
    """One end of a connection inside a WebSocket; the other pipe has the plain bytes.

    `used` is set when the first bytes have come, or the connection has ended.
    """

    def __init__(self, dialled: Dialled) -> None:
        super().__init__()
        self.used = asyncio.Event()
        self._frames = FrameReader()
        dialled.transport.set_protocol(self)
        self.connection_made(dialled.transport)
        if dialled.rest:
            self.data_received(dialled.rest)
        if not self.used.is_set():
            dialled.transport.resume_reading()

    def begins_with(self, *starts: bytes) -> bool:
        """Whether what has come begins with one of these."""
        return self._early.startswith(starts)

    def send(self, data: bytes) -> None:
        """Send what the other one read."""
        if self._transport is None or self._transport.is_closing():
            return
        head = head_of(len(data), masked=True)
        if len(data) <= SMALL_BYTES:
            self._transport.write(head + data)
        else:
            self._transport.write(head)
            self._transport.write(data)

    def finish(self) -> None:
        """Close it: half of a WebSocket cannot be closed."""
        if self._transport is not None:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        try:
            payload = self._frames.feed(data)
        except NotWebSocket:
            self.reset()
            return
        if payload:
            super().data_received(payload)
            self.used.set()
        if self._frames.pings and self._transport is not None:
            for ping in self._frames.pings:
                self._transport.write(head_of(len(ping), PONG, masked=True) + ping)
            self._frames.pings.clear()
        if self._frames.closed:
            self.finish()

    def eof_received(self) -> bool:
        """The coordinator has left: there is nobody to answer."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """It is closed: a request that is under way ends."""
        self.used.set()
        other = self._other
        super().connection_lost(exc)
        if other is not None:
            other.reset()
