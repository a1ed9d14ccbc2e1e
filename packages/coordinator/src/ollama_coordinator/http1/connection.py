"""One client connection: its bytes, its requests one after the other, and its end.

Each connection has one task, which owns those of its requests. A client that does not read makes
`send` wait; a body that the application does not read is not read from the socket. So memory
stays bounded both ways.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from hypercorn.config import Config
from starlette.types import ASGIApp, Scope

from .exchange import Exchange
from .request import PLENTY_BYTES, IncomingRequest, RequestParser
from .response import ClientWriter, CommonHeaders, Refusal

if TYPE_CHECKING:
    from hypercorn.typing import LifespanState

log = logging.getLogger(__name__)

HEAD_SECONDS = 30.0
"""From the first byte of a request's head to its last: a head is one packet or a few."""

LINGER_SECONDS = 2.0
"""How long a client that still sends may take to read the response that ends the connection."""

SLICE_BYTES = 16 * 1024
"""Parsed at once, so that pipelined requests behind the current one wait as bytes, not parsed."""


class Http1Server:
    """What the connections of one server share."""

    def __init__(self, app: ASGIApp, config: Config) -> None:
        self.app = app
        self.config = config
        self.common_headers = CommonHeaders(config)
        self.closing = False
        self.open: set[Http1Connection] = set()

    def close(self) -> None:
        """End connections without a request now, the others after their response."""
        self.closing = True
        for connection in list(self.open):
            connection.close_if_idle()

    async def serve(
        self, state: "LifespanState", reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Serve one connection until it ends; it came with these streams, which it leaves."""
        transport = cast(asyncio.Transport, writer.transport)
        connection = Http1Connection(self, transport, _scope(transport, self.config, state))
        transport.set_protocol(connection)
        # Bytes that the stream has buffered would not reach the new protocol.
        reader.feed_eof()
        await connection.run(await reader.read())


def _scope(transport: asyncio.Transport, config: Config, state: "LifespanState") -> Scope:
    """What the scopes of a connection's requests share."""
    return {
        "type": "http",
        "asgi": {"spec_version": "2.1", "version": "3.0"},
        "scheme": "http" if transport.get_extra_info("ssl_object") is None else "https",
        "root_path": config.root_path,
        "client": _address(transport, "peername"),
        "server": _address(transport, "sockname"),
        "state": state,
    }


def _address(transport: asyncio.Transport, which: str) -> tuple[str, int] | None:
    address = transport.get_extra_info(which)
    return (address[0], address[1]) if isinstance(address, tuple) else None


LATE_SECONDS = 0.5
"""A timer that is so late fires later: what came meanwhile may not have been read yet."""


class MovingTimer:
    """A timer that is moved at each request and seldom fires: moving it is an assignment."""

    def __init__(self, on_reached: Callable[[], None]) -> None:
        self._on_reached = on_reached
        self._loop = asyncio.get_running_loop()
        self._due: float | None = None
        # Its own time: one that is due at once is no timer on uvloop, and knows none.
        self._timer: asyncio.Handle | None = None
        self._timer_at = 0.0

    def set(self, seconds: float) -> None:
        """Fire after so many seconds, and not before."""
        self._due = self._loop.time() + seconds
        if self._timer is None or self._timer_at > self._due:
            self._schedule(self._due)

    def clear(self) -> None:
        """Do not fire."""
        self._due = None

    def close(self) -> None:
        """Leave no timer behind."""
        self._due = None
        if self._timer is not None:
            self._timer.cancel()

    def _schedule(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at, self._timer = when, self._loop.call_at(when, self._check)

    def _check(self) -> None:
        self._timer = None
        if self._due is None:
            return
        now = self._loop.time()
        if now - self._timer_at > LATE_SECONDS:
            self._due = max(self._due, now + LATE_SECONDS)
        if self._due > now:
            self._schedule(self._due)
        else:
            self._due = None
            self._on_reached()


class Http1Connection(asyncio.Protocol):
    """An accepted connection; `scope` has what the scopes of its requests share."""

    def __init__(self, server: Http1Server, transport: asyncio.Transport, scope: Scope) -> None:
        self._server = server
        self._transport = transport
        self._scope = scope
        self._writer = ClientWriter(transport, server.common_headers)
        self._parser = RequestParser(self._on_request, server.config.h11_max_incomplete_size)
        self._unparsed = b""
        self._newest: IncomingRequest | None = None
        self._queue: deque[IncomingRequest] = deque()
        self._exchange: Exchange | None = None
        self._refusal: Refusal | None = None
        self._served = 0
        self._head_begun = False
        self._reading_paused = False
        self._unsent_bytes = 0
        self._client_left = False
        self._ended = False
        self._deadline = MovingTimer(self._on_deadline)
        self._lost = asyncio.Event()

    async def run(self, early: bytes) -> None:
        """Serve until the connection ends; `early` are bytes that came before."""
        self._server.open.add(self)
        self._deadline.set(self._server.config.keep_alive_timeout)
        try:
            async with asyncio.TaskGroup() as self._tasks:
                if early:
                    self.data_received(early)
                try:
                    await self._lost.wait()
                finally:
                    self._ended = True
        finally:
            self._server.open.discard(self)
            self._deadline.close()
            # A collection may come late; until then the connection keeps none of a client's bytes.
            self._unparsed, self._newest, self._exchange = b"", None, None
            self._transport.abort()

    # ── asyncio's callbacks ───────────────────────────────────────────────────────────────────

    def data_received(self, data: bytes) -> None:
        """Bytes arrived; those after a refusal are not read."""
        if self._refusal is None and not self._ended:
            self._unparsed = self._unparsed + data if self._unparsed else data
            self._parse()

    def eof_received(self) -> bool:
        """The client sends no more. It counts as having left, here as in Ollama's server."""
        self._client_left = True
        for request in (self._newest, *self._queue):
            if request is not None:
                request.end_early()
        if self._exchange is not None:
            self._exchange.request.end_early()
        # It may have closed only its own half, which TLS has not: what is still made goes out.
        under_way = self._exchange is not None or bool(self._queue)
        return under_way and self._transport.can_write_eof()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended."""
        self._ended = True
        self.eof_received()
        self._queue.clear()
        self._writer.resume()
        self._lost.set()

    def pause_writing(self) -> None:
        """The client does not read."""
        self._writer.pause()

    def resume_writing(self) -> None:
        """The client reads again."""
        self._writer.resume()
        self._serve_next()
        self._parse()

    # ── requests ──────────────────────────────────────────────────────────────────────────────

    def _parse(self) -> None:
        """Parse as much as is wanted. The rest waits in `_unparsed`, and then at the client."""
        wanted = self._wants_more()
        while self._unparsed and wanted:
            part, self._unparsed = self._unparsed[:SLICE_BYTES], self._unparsed[SLICE_BYTES:]
            try:
                self._parser.feed(part)
            except Refusal as refusal:
                self._refuse(refusal)
            wanted = self._wants_more()
        if self._ended:
            return
        if self._reading_paused == wanted:
            self._reading_paused = not wanted
            (self._transport.resume_reading if wanted else self._transport.pause_reading)()
        if self._exchange is None and self._parser.unfinished_bytes and not self._head_begun:
            self._head_begun = True
            self._deadline.set(min(HEAD_SECONDS, self._server.config.keep_alive_timeout))

    def _wants_more(self) -> bool:
        """Whether no request waits behind the current one, and its body has room."""
        if self._queue:
            return False
        return self._newest is None or self._newest.waiting_bytes < PLENTY_BYTES

    def _on_request(self, request: IncomingRequest) -> None:
        self._newest = request
        self._head_begun = False
        self._queue.append(request)
        self._serve_next()

    def _refuse(self, refusal: Refusal) -> None:
        self._refusal = refusal
        self._unparsed = b""
        if self._newest is not None and not self._newest.complete:
            self._newest.end_early(refusal)  # the response to this request will be the refusal
        else:
            self._serve_next()

    def _serve_next(self) -> None:
        """Begin the next exchange, or send the refusal, unless another one is under way."""
        if self._exchange is not None or self._writer.paused or self._ended:
            return
        if self._queue:
            self._exchange = Exchange(self._queue.popleft(), self._writer, self._parse)
            self._deadline.clear()
            self._tasks.create_task(self._serve(self._exchange))
        elif self._refusal is not None:
            self._writer.write(self._refusal.response(self._writer.common.lines()))
            self._end()

    async def _serve(self, exchange: Exchange) -> None:
        self._served += 1
        most = self._server.config.keep_alive_max_requests
        self._writer.last_response = self._server.closing or self._served > most
        try:
            scope = exchange.scope(self._scope)
            await self._server.app(scope, exchange.receive, exchange.send)
        except Exception:
            log.exception("the application failed")
        finally:
            exchange.finish()
            self._exchange = None
            if exchange.handed_over:  # its end was told to another protocol
                self._transport.abort()
                self.connection_lost(None)
            else:
                self._after(exchange)

    def _after(self, exchange: Exchange) -> None:
        over = self._server.closing or (self._client_left and not self._queue)
        if over or not exchange.keeps_connection:
            self._end(abruptly=exchange.looks_whole)
        elif not self._ended:
            self._deadline.set(self._server.config.keep_alive_timeout)
            self._serve_next()
            self._parse()

    # ── the end ───────────────────────────────────────────────────────────────────────────────

    def close_if_idle(self) -> None:
        """End the connection unless a response is under way or due."""
        if self._exchange is None and not self._queue:
            self._end()

    def _on_deadline(self) -> None:
        unsent = self._transport.get_write_buffer_size()
        if unsent != self._unsent_bytes:
            self._unsent_bytes = unsent  # the client reads, if slowly
            self._deadline.set(self._server.config.keep_alive_timeout)
        elif self._ended or unsent:
            self._transport.abort()
        else:
            self._end()

    def _end(self, *, abruptly: bool = False) -> None:
        """Send what is unsent and close. A client that still sends gets time to read it."""
        if self._ended:
            return
        self._ended = True
        self._queue.clear()
        if abruptly:
            self._transport.abort()
        elif self._client_left or not (self._unparsed or self._expects_more()):
            self._transport.close()
            self._deadline.set(self._server.config.keep_alive_timeout)
        else:
            if self._transport.can_write_eof():
                with contextlib.suppress(OSError):  # it was reset meanwhile
                    self._transport.write_eof()
            if self._reading_paused:
                self._transport.resume_reading()
            self._deadline.set(LINGER_SECONDS)

    def _expects_more(self) -> bool:
        if self._refusal is not None:
            return True
        return self._newest is not None and not self._newest.complete
