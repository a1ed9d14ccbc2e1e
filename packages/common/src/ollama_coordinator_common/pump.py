"""Two connections as one: what arrives on either goes out on the other.

Protocols and not streams, which cost half as much again for each token. A side that does not read
slows the other one down. The end of one direction is passed on as a half-close, a reset as a reset.
"""

import asyncio
import contextlib
import math
import re
import socket
import struct
from typing import cast

from .network import keep_alive

RESET_ON_CLOSE = struct.pack("hh" if hasattr(socket, "SO_EXCLUSIVEADDRUSE") else "ii", 1, 0)
"""SO_LINGER on with no time: the close sends a reset (the fields are shorts on Windows)."""


HEAD_BYTES = 64 * 1024
"""A longer head of an answer is not read to its end."""

INTERIM = re.compile(rb"HTTP/1\.1 1\d\d ")
BODILESS = re.compile(rb"HTTP/1\.[01] (?:204|304) ")
CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,18})", re.IGNORECASE)
CHUNKED = re.compile(rb"\r\ntransfer-encoding:[^\r]*chunked", re.IGNORECASE)
LAST_CHUNK = b"\r\n0\r\n\r\n"


class Pipe(asyncio.Protocol):
    """One of two connections; what comes before it is joined with the other one waits for that.

    `ended` is set when it is closed.
    """

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self._transport: asyncio.Transport | None = None
        self._other: Pipe | None = None
        self._early = b""
        self._heard_all = False

    def join(self, other: "Pipe") -> None:
        """Pass everything on between the two, beginning with what has come."""
        self._other, other._other = other, self
        for pipe, opposite in ((self, other), (other, self)):
            early, pipe._early = pipe._early, b""
            if pipe.ended.is_set():
                opposite.reset()
            elif pipe._transport is not None:
                pipe._transport.resume_reading()
                if early:
                    opposite.send(early)

    def send(self, data: bytes) -> None:
        """Send what the other one read."""
        # uvloop's transports refuse what comes after their end; asyncio's ignore it.
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def finish(self) -> None:
        """Send no more; what was sent goes out."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if transport.can_write_eof():
            with contextlib.suppress(OSError):  # it is gone already
                transport.write_eof()
        else:
            transport.close()

    def reset(self) -> None:
        """Close it now, with a reset."""
        if self._transport is None or self.ended.is_set():
            return
        with contextlib.suppress(OSError):  # it may be gone already
            sock = self._transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self._transport.abort()

    # ── asyncio's callbacks ───────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is connected."""
        # Not by its class: uvloop's transports are none of asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        keep_alive(transport.get_extra_info("socket"))

    def data_received(self, data: bytes) -> None:
        """Bytes came; the first ones may come before anybody can take them.

        To pause in `connection_made` does not prevent that: uvloop begins to read after it.
        """
        if self._other is not None:
            self._other.send(data)
        elif data and self._transport is not None:
            self._early += data
            self._transport.pause_reading()

    def eof_received(self) -> bool:
        """No more comes; whether the other direction goes on."""
        other, self._heard_all = self._other, True
        if other is None:
            return False
        other.finish()
        if other._heard_all and other._transport is not None:
            other._transport.close()
        return not other._heard_all

    def connection_lost(self, exc: Exception | None) -> None:
        """It is closed; with an error if it was reset."""
        self.ended.set()
        other, self._other = self._other, None
        if other is None:
            return
        if exc is not None:
            other.reset()
        elif other._transport is not None:
            other._transport.close()

    def pause_writing(self) -> None:
        """The other side of this connection does not read."""
        if self._other is not None and self._other._transport is not None:
            self._other._transport.pause_reading()

    def resume_writing(self) -> None:
        """It reads again."""
        if self._other is not None and self._other._transport is not None:
            self._other._transport.resume_reading()


class Framing:
    """Sees where the answers on one connection begin and end: is a request in progress?

    Of HTTP only what says how long an answer is gets read (RFC 9112, section 6.3). An answer that
    is not understood is over when its connection ends.
    """

    def __init__(self) -> None:
        self.in_progress = False
        self._is_head_request = False
        self._head: bytes | None = b""  # of the answer; `None` once it is complete
        self._left = math.inf  # bytes of the answer's body, unless it is in chunks
        self._end: bytes | None = None  # the last bytes of an answer in chunks

    def asked(self, chunk: bytes) -> None:
        """Note bytes of a request."""
        if not self.in_progress:
            self.in_progress = True
            self._is_head_request = chunk.startswith(b"HEAD ")
            self._head = b""

    def answered(self, chunk: bytes) -> None:
        """Note bytes of an answer."""
        if self._head is not None:
            chunk = self._read_head(self._head + chunk)
            if self._head is not None:
                return
        if self._end is not None:
            self._end = (self._end + chunk[-len(LAST_CHUNK) :])[-len(LAST_CHUNK) :]
            self.in_progress = self._end != LAST_CHUNK
        else:
            self._left -= len(chunk)
            self.in_progress = self._left > 0

    def _read_head(self, data: bytes) -> bytes:
        """What follows the head of the answer, whose framing is then known."""
        while INTERIM.match(data) and b"\r\n\r\n" in data:
            data = data.partition(b"\r\n\r\n")[2]
        self._head, end, body = data.partition(b"\r\n\r\n")
        if not end and len(data) <= HEAD_BYTES:
            return b""
        length = CONTENT_LENGTH.search(self._head)
        self._end = b"\r\n" if CHUNKED.search(self._head) else None
        self._left = int(length[1]) if length else math.inf
        if self._is_head_request or BODILESS.match(self._head):
            self._end, self._left = None, 0
        self._head = None
        return body


class HttpPipe(Pipe):
    """The connection to an HTTP server; requests go out on it, and answers come."""

    def __init__(self, framing: Framing) -> None:
        super().__init__()
        self._framing = framing

    def send(self, data: bytes) -> None:
        self._framing.asked(data)
        super().send(data)

    def data_received(self, data: bytes) -> None:
        self._framing.answered(data)
        super().data_received(data)


async def carry(near: Pipe, target: tuple[str, int], framing: Framing) -> None:
    """Join a connection with a new one to the Ollama at `target`, until both have ended.

    Where nobody listens there, the connection is reset: what its peer would meet at the target.
    """
    far = HttpPipe(framing)
    try:
        with contextlib.suppress(OSError):
            await asyncio.get_running_loop().create_connection(lambda: far, *target)
            near.join(far)
            await near.ended.wait()
            await far.ended.wait()
    finally:
        near.reset()
        far.reset()
