"""How long a request's body may take to come, and how a handler learns that its client left."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from math import inf

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ollama_coordinator.aio import Interrupt
from ollama_coordinator.clock import Clock
from ollama_coordinator.http1 import CLIENT_CONNECTION, EXCHANGE, ClientConnection, Exchange
from ollama_coordinator.memory import BodyRoom
from ollama_coordinator.settings import Settings

from .errors import ClientLeft, HttpError

LEAST_BYTES_A_SECOND = 1024
"""Of a body as a whole, less than any modem sends."""

GRACE_SECONDS = 60.0
"""For so long a body may be slower, beside the time that its bytes have earned."""

LENGTH_DIGITS = 20
"""Of a Content-Length; Python refuses to convert thousands of them."""

STREAMED = "/api/blobs/"
"""Where a body goes to the disk as it comes."""


class BodyTimeout:
    """Answers 408 where nothing comes of a body for the setting `body_timeout` (seconds; 0: ever),
    or less than `LEAST_BYTES_A_SECOND`, and 503 where there is no room for it.

    In HTTP/2, where one of many answers on a connection may stall, an answer of which the client
    takes nothing for `stall_timeout` seconds ends here; in HTTP/1 the server ends its connection.
    A time in which the coordinator did not run does not count.
    """

    def __init__(self, app: ASGIApp, settings: Settings, room: BodyRoom, clock: Clock) -> None:
        self._app = app
        self._settings = settings
        self._room = room
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        exchange = _exchange(scope)
        if scope["type"] != "http" or (exchange is not None and exchange.request.complete):
            await self._app(scope, receive, send)
            return
        if scope["http_version"] == "2":
            send = self._unstalled(send)
        room = None if scope["path"].startswith(STREAMED) else self._room
        body = _Body(receive, self._settings, room, _announced(scope), self._clock)
        try:
            await self._app(scope, body.receive, send)
        finally:
            body.free()

    def _unstalled(self, send: Send) -> Send:
        async def unstalled(message: Message) -> None:
            seconds = self._settings.config.stall_timeout
            try:
                async with self._clock.timeout(seconds or inf):
                    await send(message)
            except TimeoutError as exc:
                text = f"the client took nothing of its answer for {seconds:g} s"
                raise ClientLeft(text) from exc

        return unstalled


class _Body:
    """The body of one request as it comes; `room` is `None` where nobody keeps it.

    Room is taken for all that is announced, so that no two bodies wait for each other half-way.
    """

    def __init__(
        self,
        receive: Receive,
        settings: Settings,
        room: BodyRoom | None,
        announced: int,
        clock: Clock,
    ) -> None:
        self._receive = receive
        self._settings = settings
        self._room = room
        self._announced = announced
        self._clock = clock
        self._taken = 0
        self._size = 0
        self._waited = 0.0
        self._is_whole = False

    async def receive(self) -> Message:
        """The next part, once there is room for it.

        Raises:
            HttpError: 408, it comes too slowly.
            NoRoom: there is no room for it.
        """
        if self._is_whole:
            return await self._receive()
        message = await self._part()
        self._is_whole = not message.get("more_body", False)
        self._size += len(message.get("body", b""))
        if self._room is not None and self._size > self._taken:
            wanted = min(self._announced, self._settings.config.max_body_bytes)
            more = max(wanted, self._size) - self._taken
            await self._room.take(more)
            self._taken += more
        return message

    async def _part(self) -> Message:
        seconds = self._settings.config.body_timeout
        if not seconds:
            return await self._receive()
        began = self._clock.now()
        left = GRACE_SECONDS + self._size / LEAST_BYTES_A_SECOND - self._waited
        try:
            async with self._clock.timeout(min(seconds, left)):
                return await self._receive()
        except TimeoutError as exc:
            text = f"nothing came of the request's body for {seconds:g} s"
            if left < seconds:
                text = f"the request's body comes at under {LEAST_BYTES_A_SECOND} bytes a second"
            raise HttpError(408, text) from exc
        finally:
            self._waited += self._clock.now() - began

    def free(self) -> None:
        """The request is over."""
        if self._room is not None:
            self._room.give_back(self._taken)


@asynccontextmanager
async def until_disconnect(scope: Scope, receive: Receive) -> AsyncIterator[None]:
    """Run a block that ends with `ClientLeft` when the client closes its connection.

    The body must have been read to its end before. Hypercorn's own server tells of a disconnect
    only who waits for its next message: there a task does.
    """
    disconnected = Interrupt()

    def left() -> None:
        client: ClientConnection | None = scope.get("state", {}).get(CLIENT_CONNECTION)
        disconnected.fire(ClientLeft("" if client is None else client.end_reason))

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        left()

    exchange = _exchange(scope)
    watcher = asyncio.create_task(watch()) if exchange is None else None
    if exchange is not None:
        exchange.on_disconnect(left)
    try:
        async with disconnected:
            yield
    finally:
        if exchange is not None:
            exchange.on_disconnect(None)
        if watcher is not None:
            watcher.cancel()


def _announced(scope: Scope) -> int:
    """The bytes that a body's head says it has; 0 where it does not say."""
    length = dict(scope["headers"]).get(b"content-length", b"")
    return int(length) if length.isdigit() and len(length) <= LENGTH_DIGITS else 0


def _exchange(scope: Scope) -> Exchange | None:
    """The request at our own HTTP/1 server; `None` at Hypercorn's."""
    exchange: Exchange | None = scope.get("state", {}).get(EXCHANGE)
    return exchange
