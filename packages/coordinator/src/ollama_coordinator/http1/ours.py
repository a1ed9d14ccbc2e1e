"""Our HTTP/1 on the connections that Hypercorn's worker accepts."""

import asyncio
from typing import cast

from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.config import Config
from hypercorn.typing import LifespanState
from starlette.types import ASGIApp, Scope

from .connection import Connection, Shared


class OurHttp:
    """Serves the connections of one server."""

    def __init__(self, app: ASGIApp, config: Config) -> None:
        self._shared = Shared(app, config)

    def close(self) -> None:
        """No further request: connections without one end now, the others after their answer."""
        self._shared.close()

    async def serve(
        self,
        context: WorkerContext,
        state: LifespanState,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """Serve a connection until it ends."""
        transport = cast(asyncio.Transport, writer.transport)
        scope = _scope(transport, self._shared.config, state)
        connection = Connection(self._shared, context, transport, scope)
        transport.set_protocol(connection)
        # Nothing has come so early, as event loops are; what had would otherwise be lost.
        reader.feed_eof()
        await connection.run(await reader.read())


def _scope(transport: asyncio.Transport, config: Config, state: LifespanState) -> Scope:
    """What the requests of a connection have in common."""
    return {
        "type": "http",
        "asgi": {"spec_version": "2.1", "version": "3.0"},
        "scheme": "http",
        "root_path": config.root_path,
        "client": _address(transport, "peername"),
        "server": _address(transport, "sockname"),
        "state": state,
    }


def _address(transport: asyncio.Transport, which: str) -> tuple[str, int] | None:
    address = transport.get_extra_info(which)
    return (address[0], address[1]) if isinstance(address, tuple) else None
