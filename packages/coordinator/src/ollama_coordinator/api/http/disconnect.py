"""Notice that a client left, which an ASGI server tells only to who asks."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import Receive

from ollama_coordinator.aio import Interrupt

from .errors import ClientLeft


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
