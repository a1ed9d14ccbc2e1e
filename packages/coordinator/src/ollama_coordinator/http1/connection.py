"""One client connection: its bytes, its requests one after the other, and its end.

A connection has one task, which owns those of its requests. A client that does not read makes
`send` wait, one whose body nobody wants yet is not read from: memory stays bounded both ways.
"""

import asyncio
import contextlib
import logging
from collections import deque

from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.config import Config
from starlette.types import ASGIApp, Scope

from .alarm import Alarm
from .exchange import Exchange
from .framing import Dates, Refusal
from .incoming import PLENTY_BYTES, Incoming, Reader
from .line import Line

log = logging.getLogger(__name__)

HEAD_SECONDS = 30.0
"""A request's head must be complete so soon after its first byte."""

LINGER_SECONDS = 2.0
"""How long a client that still sends may take to read why it is sent away."""

SLICE_BYTES = 16 * 1024
"""Parsed at once; what is requested beyond it waits as bytes while an answer is under way."""


class Shared:
    """What the connections of one server have in common."""

    def __init__(self, app: ASGIApp, config: Config) -> None:
        self.app = app
        self.config = config
        self.dates = Dates(config)
        self.closing = False
        self.open: set[Connection] = set()

    def close(self) -> None:
        """No further request: connections without one end now, the others after their answer."""
        self.closing = True
        for connection in list(self.open):
            connection.close_if_idle()


class Connection(asyncio.Protocol):
    """An accepted connection; `scope` is what its requests have in common."""

    def __init__(
        self, shared: Shared, context: WorkerContext, transport: asyncio.Transport, scope: Scope
    ) -> None:
        self._shared = shared
        self._context = context
        self._transport = transport
        self._scope = scope
        self._line = Line(transport, shared.dates)
        self._reader = Reader(self._begun, shared.config.h11_max_incomplete_size)
        self._unread = b""
        self._reading: Incoming | None = None
        self._queue: deque[Incoming] = deque()
        self._exchange: Exchange | None = None
        self._refusal: Refusal | None = None
        self._requests = 0
        self._head_begun = False
        self._paused = False
        self._unsent = 0
        self._departed = False
        self._ended = False
        self._alarm = Alarm(self._too_late)
        self._lost = asyncio.Event()

    async def run(self, early: bytes) -> None:
        """Serve until the connection ends; `early` came before the connection was handed over."""
        self._shared.open.add(self)
        self._alarm.set(self._shared.config.keep_alive_timeout)
        try:
            async with asyncio.TaskGroup() as self._tasks:
                if early:
                    self.data_received(early)
                try:
                    await self._lost.wait()
                finally:
                    self._ended = True
        finally:
            self._shared.open.discard(self)
            self._alarm.end()
            self._transport.abort()

    # ── what the socket tells ─────────────────────────────────────────────────────────────────

    def data_received(self, data: bytes) -> None:
        """Bytes are here; nobody reads those behind a refusal."""
        if self._refusal is None and not self._ended:
            self._unread = self._unread + data if self._unread else data
            self._read_on()

    def eof_received(self) -> bool:
        """The client sends no more, which counts as its departure, here as in Ollama's server."""
        self._departed = True
        for incoming in (self._reading, *self._queue):
            if incoming is not None:
                incoming.leave()
        if self._exchange is not None:
            self._exchange.incoming.leave()
        # It may have closed its own half only: what is answered all the same still goes out.
        return self._exchange is not None or bool(self._queue)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is no more."""
        self._ended = True
        self.eof_received()
        self._queue.clear()
        self._line.clear()
        self._lost.set()

    def pause_writing(self) -> None:
        """The client does not read."""
        self._line.choke()

    def resume_writing(self) -> None:
        """The client reads again."""
        self._line.clear()
        self._advance()

    # ── requests ──────────────────────────────────────────────────────────────────────────────

    def _advance(self) -> None:
        self._serve_next()
        self._read_on()

    def _read_on(self) -> None:
        """Parse as far as somebody has use for it; the rest waits here, and then at the client."""
        while self._unread and self._has_use():
            part, self._unread = self._unread[:SLICE_BYTES], self._unread[SLICE_BYTES:]
            try:
                self._reader.feed(part)
            except Refusal as refusal:
                self._refuse(refusal)
        if self._ended:
            return
        if self._paused == self._has_use():
            self._paused = not self._paused
            (self._transport.pause_reading if self._paused else self._transport.resume_reading)()
        if self._exchange is None and self._reader.unfinished_bytes and not self._head_begun:
            self._head_begun = True
            self._alarm.set(min(HEAD_SECONDS, self._shared.config.keep_alive_timeout))

    def _has_use(self) -> bool:
        enough = self._reading is not None and self._reading.held >= PLENTY_BYTES
        return not self._queue and not enough

    def _begun(self, incoming: Incoming) -> None:
        self._reading = incoming
        self._head_begun = False
        self._queue.append(incoming)
        self._serve_next()

    def _refuse(self, refusal: Refusal) -> None:
        self._refusal = refusal
        self._unread = b""
        if self._reading is not None and not self._reading.complete:
            self._reading.leave(refusal)  # who serves it will answer, or does already
        else:
            self._serve_next()

    def _serve_next(self) -> None:
        if self._exchange is not None or self._line.choked or self._ended:
            return
        if self._queue:
            self._exchange = Exchange(self._queue.popleft(), self._line, self._read_on)
            self._alarm.silence()
            self._tasks.create_task(self._serve(self._exchange))
        elif self._refusal is not None:
            self._line.write(self._refusal.answer(self._line.common_headers()))
            self._end()

    async def _serve(self, exchange: Exchange) -> None:
        self._requests += 1
        most = self._shared.config.keep_alive_max_requests
        self._line.ending = self._shared.closing or self._requests > most
        try:
            await self._context.mark_request()
            scope = exchange.scope(self._scope)
            await self._shared.app(scope, exchange.receive, exchange.send)
        except Exception:
            log.exception("the application failed")
        finally:
            exchange.finish()
            self._exchange = None
            self._after(exchange)

    def _after(self, exchange: Exchange) -> None:
        over = self._shared.closing or (self._departed and not self._queue)
        if over or not exchange.keeps_connection:
            self._end(abruptly=exchange.looks_whole)
        elif not self._ended:
            self._alarm.set(self._shared.config.keep_alive_timeout)
            self._advance()

    # ── the end ───────────────────────────────────────────────────────────────────────────────

    def close_if_idle(self) -> None:
        """End the connection unless an answer is under way or due."""
        if self._exchange is None and not self._queue:
            self._end()

    def _too_late(self) -> None:
        unsent = self._transport.get_write_buffer_size()
        if unsent != self._unsent:
            self._unsent = unsent  # the client reads, if slowly
            self._alarm.set(self._shared.config.keep_alive_timeout)
        elif self._ended or unsent:
            self._transport.abort()
        else:
            self._end()

    def _end(self, *, abruptly: bool = False) -> None:
        """Send what is still to be sent and close; a client that still sends gets to read it."""
        if self._ended:
            return
        self._ended = True
        self._queue.clear()
        if abruptly:
            self._transport.abort()
        elif self._departed or not (self._unread or self._expects_more()):
            self._transport.close()
            self._alarm.set(self._shared.config.keep_alive_timeout)
        else:
            with contextlib.suppress(OSError):  # it was reset meanwhile
                self._transport.write_eof()
            if self._paused:
                self._transport.resume_reading()
            self._alarm.set(LINGER_SECONDS)

    def _expects_more(self) -> bool:
        if self._refusal is not None:
            return True
        return self._reading is not None and not self._reading.complete
