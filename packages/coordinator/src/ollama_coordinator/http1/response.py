"""How a response is put on the wire: its head, the end of its body, and the socket.

RFC 9112 sections 4 (status line), 6 (message body) and 9.6 (connection close).
"""

import asyncio
import json
import time
from collections.abc import Iterable
from enum import Enum
from http import HTTPStatus

from hypercorn.config import Config

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

CLOSE = b"connection: close\r\n"

KEEP_ALIVE = b"connection: keep-alive\r\n"
"""What an HTTP/1.0 client that asked for it wants to read."""

_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status} {status.phrase}\r\n".encode() for status in HTTPStatus
}


def status_line(status: int) -> bytes:
    """The first line of a response; a status without a name, such as 499, gets none."""
    return _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status


class Refusal(Exception):
    """A request that the application does not get; the connection ends after its response."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status

    def response(self, common: bytes) -> bytes:
        """The whole response, its text as Go's HTTP server writes it."""
        text = f"{self.status} {HTTPStatus(self.status).phrase}: {self}"
        return self._whole(common, b"text/plain; charset=utf-8", text.encode())

    def response_in_json(self, common: bytes) -> bytes:
        """The whole response, with an error object as Ollama writes it."""
        body = json.dumps({"error": str(self)}, ensure_ascii=False)
        return self._whole(common, b"application/json; charset=utf-8", body.encode())

    def _whole(self, common: bytes, content_type: bytes, body: bytes) -> bytes:
        return b"%b%bcontent-type: %b\r\ncontent-length: %d\r\n%b\r\n%b" % (
            status_line(self.status),
            common,
            content_type,
            len(body),
            CLOSE,
            body,
        )


class CommonHeaders:
    """The headers that Hypercorn's settings add to each response (date), made once a second."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._second = 0
        self._lines = b""

    def lines(self) -> bytes:
        """The header lines of this second."""
        second = int(time.time())
        if second != self._second:
            headers = self._config.response_headers("h11")
            self._lines = b"".join(b"%b: %b\r\n" % header for header in headers)
            self._second = second
        return self._lines


class ClientWriter:
    """Writes to one connection. `paused` while the client does not read."""

    __slots__ = ("_resumed", "common", "last_response", "paused", "transport")

    def __init__(self, transport: asyncio.Transport, common: CommonHeaders) -> None:
        self.transport = transport
        self._resumed = asyncio.Event()
        self.common = common
        self.paused = False
        self.last_response = False
        """The connection ends after the response that begins next."""

    def write(self, data: bytes) -> None:
        """Send; the transport keeps what the socket does not take. Ignored once it is closing."""
        if not self.transport.is_closing():
            self.transport.write(data)

    def pause(self) -> None:
        """The client does not read."""
        self.paused = True
        self._resumed.clear()

    def resume(self) -> None:
        """The client reads again, or has left."""
        self.paused = False
        self._resumed.set()

    async def resumed(self) -> None:
        """Wait until the client reads again."""
        await self._resumed.wait()


class BodyEnd(Enum):
    """Where a response's body ends (RFC 9112 section 6.3)."""

    NO_BODY = "it has none"
    BY_LENGTH = "after Content-Length bytes"
    BY_CHUNK = "with an empty chunk"
    BY_CLOSE = "with the connection"


class ResponseFraming:
    """The head of one response, and its body piece by piece.

    `whole_bytes`: the size of the body where it is complete already. `common`: the header lines
    of every response. `closes`: whether the connection ends after it.

    Raises:
        ValueError: a header would break the head, or the length is no number.
    """

    __slots__ = ("_left_bytes", "closes", "end", "head")

    def __init__(
        self,
        status: int,
        headers: Iterable[tuple[bytes, bytes]],
        *,
        method: str,
        version: str,
        whole_bytes: int | None,
        closes: bool,
        common: bytes,
    ) -> None:
        self.closes = closes
        self._left_bytes: int | None = None
        lines = [status_line(status)]
        self._add_headers(lines, headers)
        bodiless = method == "HEAD" or status in (204, 304)
        if self._left_bytes is None and whole_bytes is not None and not bodiless:
            self._left_bytes = whole_bytes
            lines.append(b"content-length: %d\r\n" % whole_bytes)
        self.end = self._body_end(bodiless, version)
        if self.end is BodyEnd.BY_CHUNK:
            lines.append(b"transfer-encoding: chunked\r\n")
        head = b"".join(lines)
        if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines) or b"\0" in head:
            raise ValueError("a header of the answer has a control character")
        kept = KEEP_ALIVE if version == "1.0" else b""
        self.head = b"%b%b%b\r\n" % (head, common, CLOSE if self.closes else kept)

    def _add_headers(self, lines: list[bytes], headers: Iterable[tuple[bytes, bytes]]) -> None:
        """The application's headers but those that this server decides on."""
        for name, value in headers:
            match name.lower():
                case b"content-length":
                    self._left_bytes = int(value)
                case b"transfer-encoding":
                    continue
                case b"connection":
                    self.closes = self.closes or value.lower() == b"close"
                    continue
            lines.append(b"%b: %b\r\n" % (name, value))

    def _body_end(self, bodiless: bool, version: str) -> BodyEnd:
        if bodiless:
            return BodyEnd.NO_BODY
        if self._left_bytes is not None:
            return BodyEnd.BY_LENGTH
        if version == "1.1":
            return BodyEnd.BY_CHUNK
        self.closes = True
        return BodyEnd.BY_CLOSE

    def piece(self, data: bytes, *, last: bool) -> bytes:
        """A piece of the body as it is sent.

        Raises:
            ValueError: it is more or less than the announced length.
        """
        if self.end is BodyEnd.BY_CHUNK:
            chunk = b"%x\r\n%b\r\n" % (len(data), data) if data else b""
            return chunk + b"0\r\n\r\n" if last else chunk
        if self.end is BodyEnd.NO_BODY:
            return b""
        if self._left_bytes is not None:
            self._left_bytes -= len(data)
            if self._left_bytes < 0 or (last and self._left_bytes):
                raise ValueError("the answer's body is not as long as its Content-Length says")
        return data
