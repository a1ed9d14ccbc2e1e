"""A client's bytes as requests: llhttp's strict reading, and the limits and refusals around it.

llhttp refuses by itself what requests are smuggled with: both or several of Content-Length and
Transfer-Encoding, folded headers, a line that ends in one of CR and LF, control characters.
"""

import asyncio
from collections.abc import Callable

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

from .framing import VERSIONS, Headers, Refusal

MAX_HEADERS = 256
PLENTY_BYTES = 128 * 1024
"""So much of a body may wait for the application before the client has to."""

FRAMING = (b"content-length", b"transfer-encoding")


class Incoming:
    """One request as it arrives: its head, and the part of its body that nobody has taken yet."""

    __slots__ = (
        *("method", "target", "version", "headers", "keep_alive", "expects_continue"),
        *("_parts", "held", "complete", "gone", "refusal", "news"),
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
        self._parts: list[bytes] = []
        self.held = 0
        self.complete = False
        self.gone = False
        self.refusal: Refusal | None = None
        self.news = asyncio.Event()

    def add(self, data: bytes) -> None:
        """More of the body is here."""
        self._parts.append(data)
        self.held += len(data)
        self.news.set()

    def end(self) -> None:
        """All of the body is here."""
        self.complete = True
        self.news.set()

    def leave(self, refusal: Refusal | None = None) -> None:
        """Nothing comes any more: the client left, or what it sends cannot be understood."""
        self.gone = True
        self.refusal = self.refusal or refusal
        self.news.set()

    def take(self) -> bytes:
        """What has arrived of the body since the last time."""
        taken = b"".join(self._parts)
        self._parts.clear()
        self.held = 0
        return taken


class Reader:
    """Feeds llhttp; `begun` hears of each request as soon as its head is complete."""

    def __init__(self, begun: Callable[[Incoming], None], head_limit: int) -> None:
        self._begun = begun
        self._limit = head_limit
        self._parser = HttpRequestParser(self)
        self._current: Incoming | None = None
        self._refusal: Refusal | None = None
        self._over = False
        self.unfinished_bytes = 0
        self._start_anew()

    def _start_anew(self) -> None:
        self._current = None
        self._target = b""
        self._headers: Headers = []
        self._head_bytes = 0

    def feed(self, data: bytes) -> None:
        """Read on. What follows the last request of a connection is passed over.

        Raises:
            Refusal: it is no HTTP/1, or more than the limits allow.
        """
        while data and not self._over:
            self.unfinished_bytes += len(data)
            try:
                self._parser.feed_data(data)
                data = b""
            except HttpParserUpgrade as exc:
                self._pass_over_upgrade()
                data = data[exc.args[0] :]
            except HttpParserError as exc:
                if not self._over:
                    raise self._refusal or Refusal(400, str(exc)) from exc
        if self.unfinished_bytes > self._limit:
            raise Refusal(400 if self._current else 431, "too much without an end")

    def _pass_over_upgrade(self) -> None:
        """Answer as HTTP/1.1: llhttp reads no body behind an upgrade, so another parser does.

        Java's HTTP client offers h2c with every request, also with those that have a body.
        """
        self._parser = HttpRequestParser(self)
        if self._current is not None:
            framing = [pair for pair in self._current.headers if pair[0] in FRAMING]
            lines = b"".join(b"%b: %b\r\n" % pair for pair in framing)
            self._parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n" % lines)

    # ── what llhttp finds; a head or a trailer behind the complete head means nothing ─────────

    def on_url(self, part: bytes) -> None:
        if self._current is None:
            self._target += part

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._current is not None:
            return
        self._headers.append((name.lower(), value.rstrip(b" \t")))
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes > self._limit or len(self._headers) > MAX_HEADERS:
            self._refuse(431, "too many headers, or too long")

    def on_headers_complete(self) -> None:
        if self._current is not None:
            return
        self.unfinished_bytes = 0
        method, version = self._parser.get_method().decode(), self._parser.get_http_version()
        self._check(method, version)
        keep_alive = version == "1.1" and self._parser.should_keep_alive()
        self._current = Incoming(
            method, self._target, version, self._headers, keep_alive=keep_alive
        )
        expected = dict(self._headers).get(b"expect", b"") if version == "1.1" else b""
        self._current.expects_continue = expected.lower() == b"100-continue"
        self._begun(self._current)

    def on_body(self, data: bytes) -> None:
        self.unfinished_bytes = 0
        if self._current is not None:
            self._current.add(data)

    def on_message_complete(self) -> None:
        if self._current is None or self._parser.should_upgrade():
            return
        self.unfinished_bytes = 0
        self._over = not self._current.keep_alive
        self._current.end()
        self._start_anew()

    def _check(self, method: str, version: str) -> None:
        """What llhttp lets pass and RFC 9112 does not."""
        names = [name for name, _ in self._headers]
        if version not in VERSIONS:
            self._refuse(505, f"HTTP/{version}")
        if len(self._target) + self._head_bytes > self._limit:
            self._refuse(431, "too long")
        if method == "CONNECT":
            self._refuse(405, "this is no proxy")
        hosts = names.count(b"host")
        if hosts > 1 or (hosts == 0 and version == "1.1"):
            self._refuse(400, "exactly one Host header is required")
        if b"transfer-encoding" in names:
            if version != "1.1":
                self._refuse(400, "Transfer-Encoding needs HTTP/1.1")
            if dict(self._headers)[b"transfer-encoding"].lower() != b"chunked":
                self._refuse(501, "the only transfer encoding is chunked")

    def _refuse(self, status: int, reason: str) -> None:
        # llhttp's binding turns what a callback raises into an error of its own.
        self._refusal = Refusal(status, reason)
        raise self._refusal
