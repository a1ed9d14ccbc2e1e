"""How long a request may take to come, and what is known of a departure.

ASGI middleware: it reads none of the bytes.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ollama_coordinator.aio import Interrupt
from ollama_coordinator.http1.door import VISIT, Visit

from .errors import ClientLeft, HttpError


class Patience:
    """Who waits for a body of which nothing comes for `body_seconds` (0: ever) gets a 408.

    In HTTP/2, where one of many answers on a connection may stall, one that nobody takes for
    `stall_seconds` ends here; in HTTP/1 the connection does, at the door. Both are asked each time,
    since they may change.
    """

    def __init__(
        self, app: ASGIApp, body_seconds: Callable[[], float], stall_seconds: Callable[[], float]
    ) -> None:
        self._app = app
        self._body_seconds = body_seconds
        self._stall_seconds = stall_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["http_version"] == "2":
            send = self._unstalled(send)
        await self._app(scope, self._patient(scope, receive), send)

    def _unstalled(self, send: Send) -> Send:
        async def unstalled(message: Message) -> None:
            seconds = self._stall_seconds()
            try:
                async with asyncio.timeout(seconds or None):
                    await send(message)
            except TimeoutError as exc:
                text = f"the client took nothing of its answer for {seconds:g} s"
                raise ClientLeft(text) from exc

        return unstalled

    def _patient(self, scope: Scope, receive: Receive) -> Receive:
        is_whole = False

        async def patient() -> Message:
            nonlocal is_whole
            if is_whole:
                message = await receive()
            else:
                message = await self._part(receive)
                is_whole = not message.get("more_body", False)
            if message["type"] == "http.disconnect":
                visit: Visit | None = scope.get("state", {}).get(VISIT)
                message = {**message, "reason": visit.reason if visit is not None else ""}
            return message

        return patient

    async def _part(self, receive: Receive) -> Message:
        seconds = self._body_seconds()
        try:
            async with asyncio.timeout(seconds or None):
                return await receive()
        except TimeoutError as exc:
            text = f"nothing came of the request's body for {seconds:g} s"
            raise HttpError(408, text) from exc


@asynccontextmanager
async def until_disconnect(receive: Receive) -> AsyncIterator[None]:
    """Run a block that ends with `ClientLeft` when the client closes its connection.

    The body must have been read to its end before.
    """
    departure = Interrupt()

    async def watch() -> None:
        while (message := await receive())["type"] != "http.disconnect":
            pass
        departure.fire(ClientLeft(message.get("reason", "")))

    watcher = asyncio.create_task(watch())
    try:
        async with departure:
            yield
    finally:
        watcher.cancel()
