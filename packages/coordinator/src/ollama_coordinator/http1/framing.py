"""How an answer is put on the wire: its head, and where its body ends."""

import json
import time
from collections.abc import Iterable
from enum import Enum
from http import HTTPStatus

from hypercorn.config import Config

VERSIONS = ("1.1", "1.0")

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

Headers = list[tuple[bytes, bytes]]


class Refusal(Exception):
    """A request that is not for the application: what to answer, then the connection ends."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status

    def answer(self, common: bytes) -> bytes:
        """The whole answer; its text is shaped as Go's HTTP server shapes it."""
        text = f"{self.status} {HTTPStatus(self.status).phrase}: {self}"
        return self._whole(common, b"text/plain; charset=utf-8", text.encode())

    def in_json(self, common: bytes) -> bytes:
        """The whole answer; its text is shaped as Ollama shapes errors."""
        body = json.dumps({"error": str(self)}, ensure_ascii=False)
        return self._whole(common, b"application/json; charset=utf-8", body.encode())

    def _whole(self, common: bytes, kind: bytes, body: bytes) -> bytes:
        return b"%b%bcontent-type: %b\r\ncontent-length: %d\r\n%b\r\n%b" % (
            status_line(self.status),
            common,
            kind,
            len(body),
            CLOSE,
            body,
        )


CLOSE = b"connection: close\r\n"

_LINES = {status.value: f"HTTP/1.1 {status} {status.phrase}\r\n".encode() for status in HTTPStatus}


def status_line(status: int) -> bytes:
    """The first line of an answer; clients may see a status without a name, such as 499."""
    return _LINES.get(status) or b"HTTP/1.1 %d \r\n" % status


class Dates:
    """The headers that Hypercorn's settings add to each answer, made once a second."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._second = 0
        self._lines = b""

    def lines(self) -> bytes:
        """The lines as they are now."""
        second = int(time.time())
        if second != self._second:
            headers = self._config.response_headers("h11")
            self._lines = b"".join(b"%b: %b\r\n" % header for header in headers)
            self._second = second
        return self._lines


class Ends(Enum):
    """Where a body ends."""

    AT_ONCE = "it has none"
    BY_LENGTH = "after Content-Length bytes"
    BY_CHUNK = "with an empty chunk"
    BY_CLOSE = "with the connection"


class Framing:
    """The head of one answer, and its body piece by piece.

    `whole` is the size of the body where it is complete already, `common` what all answers have.

    Raises:
        ValueError: a header would break the head, or the length is no number.
    """

    __slots__ = ("_left", "closes", "ends", "head")

    def __init__(
        self,
        status: int,
        headers: Iterable[tuple[bytes, bytes]],
        *,
        method: str,
        version: str,
        whole: int | None,
        closes: bool,
        common: bytes,
    ) -> None:
        self.closes = closes
        self._left: int | None = None
        lines = [status_line(status), *self._lines(headers)]
        bodiless = method == "HEAD" or status in (204, 304)
        if self._left is None and whole is not None and not bodiless:
            self._left = whole
            lines.append(b"content-length: %d\r\n" % whole)
        self.ends = self._ending(bodiless, version)
        if self.ends is Ends.BY_CHUNK:
            lines.append(b"transfer-encoding: chunked\r\n")
        head = b"".join(lines)
        if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines) or b"\0" in head:
            raise ValueError("a header of the answer has a control character")
        self.head = b"%b%b%b\r\n" % (head, common, CLOSE if self.closes else b"")

    def _lines(self, headers: Iterable[tuple[bytes, bytes]]) -> Iterable[bytes]:
        for name, value in headers:
            match name.lower():
                case b"content-length":
                    self._left = int(value)
                case b"transfer-encoding":
                    continue  # ours to choose
                case b"connection":
                    self.closes = self.closes or value.lower() == b"close"
                    continue
            yield b"%b: %b\r\n" % (name, value)

    def _ending(self, bodiless: bool, version: str) -> Ends:
        if bodiless:
            return Ends.AT_ONCE
        if self._left is not None:
            return Ends.BY_LENGTH
        if version == "1.1":
            return Ends.BY_CHUNK
        self.closes = True
        return Ends.BY_CLOSE

    def piece(self, data: bytes, *, last: bool) -> bytes:
        """A piece of the body as it is sent.

        Raises:
            ValueError: it is more or less than the announced length.
        """
        if self.ends is Ends.BY_CHUNK:
            chunk = b"%x\r\n%b\r\n" % (len(data), data) if data else b""
            return chunk + b"0\r\n\r\n" if last else chunk
        if self.ends is Ends.AT_ONCE:
            return b""
        if self._left is not None:
            self._left -= len(data)
            if self._left < 0 or (last and self._left):
                raise ValueError("the answer's body is not as long as its Content-Length says")
        return data
