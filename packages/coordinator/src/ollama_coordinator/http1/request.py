"""A client's bytes as requests: llhttp's strict parser, and the limits and refusals around it.

llhttp itself refuses the means of request smuggling: both or several of Content-Length and
Transfer-Encoding, folded headers, a line that ends in one of CR and LF, control characters.
"""

import asyncio
import re
from collections.abc import Callable

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

from .response import Refusal

VERSIONS = ("1.1", "1.0")

MAX_HEADERS = 256
"""Clients send about ten, browsers behind several proxies about fifty."""

PLENTY_BYTES = 128 * 1024
"""So much of a body may wait for the application before the client has to: two socket reads."""

UNWANTED_BYTES = 256 * 1024
"""Of a body that nobody wants: more is not waited for, the connection ends instead."""

HOST = re.compile(rb"[A-Za-z0-9!$%&()*+,\-.:;=\[\]'_~]*")
"""The characters of a Host header, as Go's servers check them; an empty one is right."""

BAD_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")
"""Go's servers refuse such a path, and take any query."""

FRAMING = (b"content-length", b"transfer-encoding")

CONTINUE = b"100-continue"

Headers = list[tuple[bytes, bytes]]


class IncomingRequest:
    """One request as it arrives: its head, and the part of its body that is not taken yet.

    `complete`: the whole body has arrived. `ended_early`: no more of it arrives, since the client
    left or sent what is no HTTP (then with a `refusal`); `on_early_end` is called then. `changed`
    is set at each of these and by each piece of body.
    """

    __slots__ = (
        *("method", "target", "version", "headers", "keep_alive", "expects_continue"),
        *("_pieces", "waiting_bytes", "complete", "ended_early", "refusal", "changed"),
        *("on_early_end", "_discards"),
    )

    def __init__(
        self, method: str, target: bytes, version: str, headers: Headers, *, keep_alive: bool
    ) -> None:
        self.method = method
        self.target = target
        self.version = version
        self.headers = headers
        self.keep_alive = keep_alive
        self.expects_continue = False
        self._pieces: list[bytes] = []
        self.waiting_bytes = 0
        self.complete = False
        self.ended_early = False
        self.refusal: Refusal | None = None
        self.changed = asyncio.Event()
        self.on_early_end: Callable[[], None] | None = None
        self._discards = False

    def add(self, data: bytes) -> None:
        """A piece of the body arrived."""
        if self._discards:
            return
        self._pieces.append(data)
        self.waiting_bytes += len(data)
        self.changed.set()

    def finish(self) -> None:
        """The whole body has arrived."""
        self.complete = True
        self.changed.set()

    def end_early(self, refusal: Refusal | None = None) -> None:
        """Nothing more arrives."""
        self.ended_early = True
        self.refusal = self.refusal or refusal
        self.changed.set()
        if self.on_early_end is not None:
            self.on_early_end()

    def discard(self) -> None:
        """Nobody wants the rest of the body."""
        self._discards = True
        self.take()

    def can_be_followed(self) -> bool:
        """Whether another request may come on the connection, wherever its body is now.

        As in Go's servers, a small rest of a body that nobody wants is read and dropped. A client
        that waits to be asked for its body sends none.
        """
        if not self.keep_alive or self.complete:
            return self.keep_alive
        announced = dict(self.headers).get(b"content-length", b"")
        if self.expects_continue or not 0 < len(announced) <= len(str(UNWANTED_BYTES)):
            return False
        return int(announced) <= UNWANTED_BYTES

    def take(self) -> bytes:
        """The part of the body that arrived since the last call."""
        taken = b"".join(self._pieces)
        self._pieces.clear()
        self.waiting_bytes = 0
        return taken


class RequestParser:
    """Feeds llhttp; `on_request` gets each request as soon as its head is complete.

    `head_limit_bytes` bounds a head, and whatever else a client sends without an end to it.
    `unfinished_bytes` are those since the last thing that was complete.
    """

    def __init__(
        self, on_request: Callable[[IncomingRequest], None], head_limit_bytes: int
    ) -> None:
        self._on_request = on_request
        self._limit = head_limit_bytes
        self._parser = HttpRequestParser(self)
        self._current: IncomingRequest | None = None
        self._refusal: Refusal | None = None
        self._over = False
        self._raw = b""
        self.unfinished_bytes = 0
        self._start_anew()

    def _start_anew(self) -> None:
        self._current = None
        self._target = b""
        self._headers: Headers = []
        self._head_bytes = 0

    def feed(self, data: bytes) -> None:
        """Parse more bytes. Those after the last request of a connection are ignored.

        Raises:
            Refusal: they are no HTTP/1, or more than the limits allow.
        """
        while data and not self._over:
            self.unfinished_bytes += len(data)
            self._raw = data if self._current is not None else self._raw + data
            try:
                self._parser.feed_data(data)
                data = b""
            except HttpParserUpgrade as exc:
                self._ignore_upgrade()
                data = data[exc.args[0] :]
            except HttpParserError as exc:
                if not self._over:
                    raise self._refusal or Refusal(400, str(exc)) from exc
        if self.unfinished_bytes > self._limit:
            raise Refusal(400 if self._current else 431, "too much without an end")

    def _ignore_upgrade(self) -> None:
        """Go on in HTTP/1.1: llhttp reads no body after an upgrade, so a new parser does.

        Java's HTTP client offers h2c with every request, also with those that have a body.
        """
        self._parser = HttpRequestParser(self)
        if self._current is not None:
            framing = [pair for pair in self._current.headers if pair[0] in FRAMING]
            lines = b"".join(b"%b: %b\r\n" % pair for pair in framing)
            self._parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n" % lines)

    # ── llhttp's callbacks; trailers, and the head that `_ignore_upgrade` made up, are ignored ──

    def on_url(self, part: bytes) -> None:
        if self._current is None:
            self._target += part

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._current is not None:
            return
        self._headers.append((name.lower(), value.rstrip(b" \t")))
        self._head_bytes += len(name) + len(value) + 4  # ": " and CRLF
        if self._head_bytes > self._limit or len(self._headers) > MAX_HEADERS:
            self._refuse(431, "too many headers, or too long")

    def on_headers_complete(self) -> None:
        if self._current is not None:
            return
        self.unfinished_bytes = 0
        method, version = self._parser.get_method().decode(), self._parser.get_http_version()
        fields = dict(self._headers)
        self._check_line(method)
        self._check(method, version, fields)
        keep_alive = self._parser.should_keep_alive()
        self._current = IncomingRequest(
            method, self._target, version, self._headers, keep_alive=keep_alive
        )
        self._current.expects_continue = b"expect" in fields and version == "1.1"
        self._on_request(self._current)

    def on_body(self, data: bytes) -> None:
        self.unfinished_bytes = 0
        if self._current is not None:
            self._current.add(data)

    def on_message_complete(self) -> None:
        if self._current is None or self._parser.should_upgrade():
            return
        self.unfinished_bytes = 0
        self._over = not self._current.keep_alive
        self._current.finish()
        self._start_anew()

    def _check_line(self, method: str) -> None:
        """Refuse a request line with more than one space between its parts; llhttp skips them.

        `_raw` are the bytes since the last request's line, but for those of whole pieces of body.
        """
        line = b"%b %b HTTP/" % (method.encode(), self._target)
        at = self._raw.find(line)
        if at < 0:
            self._refuse(400, "malformed request line")
        self._raw = self._raw[at + len(line) :]

    def _check(self, method: str, version: str, fields: dict[bytes, bytes]) -> None:
        """Refuse what llhttp accepts and RFC 9112 does not."""
        if version not in VERSIONS:
            self._refuse(505, f"HTTP/{version}")
        if len(self._target) + self._head_bytes > self._limit:
            self._refuse(431, "too long")
        if BAD_ESCAPE.search(self._target.partition(b"?")[0]):
            self._refuse(400, "malformed escape in the path")
        if method == "CONNECT":
            self._refuse(405, "this is no proxy")
        if fields.get(b"expect", CONTINUE).lower() != CONTINUE:
            self._refuse(417, "the only expectation is 100-continue")
        self._check_host(version, fields)
        if b"transfer-encoding" in fields:
            if version != "1.1":
                self._refuse(400, "Transfer-Encoding needs HTTP/1.1")
            if fields[b"transfer-encoding"].lower() != b"chunked":
                self._refuse(501, "the only transfer encoding is chunked")

    def _check_host(self, version: str, fields: dict[bytes, bytes]) -> None:
        hosts = [name for name, _ in self._headers].count(b"host")
        if hosts > 1 or (hosts == 0 and version == "1.1"):
            self._refuse(400, "exactly one Host header is required")
        if hosts and HOST.fullmatch(fields[b"host"]) is None:
            self._refuse(400, "malformed Host header")

    def _refuse(self, status: int, reason: str) -> None:
        # httptools replaces an exception of a callback by one of its own: `feed` raises this one.
        self._refusal = Refusal(status, reason)
        raise self._refusal
