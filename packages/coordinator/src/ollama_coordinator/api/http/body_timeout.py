"""How long a request's body may take to come, and how a handler learns that its client left."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ollama_coordinator.aio import Interrupt
from ollama_coordinator.http1 import CLIENT_CONNECTION, EXCHANGE, ClientConnection, Exchange
from ollama_coordinator.settings import Settings

from .errors import ClientLeft, HttpError


class BodyTimeout:
    """Answers 408 where nothing comes of a body for the setting `body_timeout` (seconds; 0: ever).

    In HTTP/2, where one of many answers on a connection may stall, an answer of which the client
    takes nothing for `stall_timeout` seconds ends here; in HTTP/1 the server ends its connection.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        exchange = _exchange(scope)
        if scope["type"] != "http" or (exchange is not None and exchange.request.complete):
            await self._app(scope, receive, send)
            return
        is_whole = False

        async def timed() -> Message:
            nonlocal is_whole
            message = await (receive() if is_whole else self._part(receive))
            is_whole = is_whole or not message.get("more_body", False)
            return message

        if scope["http_version"] == "2":
            send = self._unstalled(send)
        await self._app(scope, timed, send)

    async def _part(self, receive: Receive) -> Message:
        seconds = self._settings.config.body_timeout
        try:
            async with asyncio.timeout(seconds or None):
                return await receive()
        except TimeoutError as exc:
            text = f"nothing came of the request's body for {seconds:g} s"
            raise HttpError(408, text) from exc

    def _unstalled(self, send: Send) -> Send:
        async def unstalled(message: Message) -> None:
            seconds = self._settings.config.stall_timeout
            try:
                async with asyncio.timeout(seconds or None):
                    await send(message)
            except TimeoutError as exc:
                text = f"the client took nothing of its answer for {seconds:g} s"
                raise ClientLeft(text) from exc

        return unstalled


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


def _exchange(scope: Scope) -> Exchange | None:
    """The request at our own HTTP/1 server; `None` at Hypercorn's."""
    exchange: Exchange | None = scope.get("state", {}).get(EXCHANGE)
    return exchange
