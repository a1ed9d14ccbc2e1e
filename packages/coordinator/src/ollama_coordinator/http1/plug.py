"""Our HTTP/1 in the place of Hypercorn's, for which Hypercorn has no public hook.

Its worker looks up by name what serves a connection: `hypercorn.asyncio.run.TCPServer`, called with
the application, the loop, the settings, the worker's context, the lifespan's state and the streams,
and awaited. While a server of ours runs, that name leads here; connections of other servers in the
process go on to Hypercorn's own. Importing this module fails where one of its parts is missing.
"""

import asyncio
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from hypercorn.asyncio import run as worker
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.config import Config
from hypercorn.typing import AppWrapper, LifespanState
from starlette.types import ASGIApp, Scope

from .connection import Connection, Shared

PARAMETERS = ["app", "loop", "config", "context", "state", "reader", "writer"]

_ours: dict[Config, Shared] = {}


def fits() -> bool:
    """Whether this Hypercorn serves connections as described above."""
    used = getattr(worker, "TCPServer", None)
    known = list(inspect.signature(TCPServer).parameters) == PARAMETERS
    return known and used in (TCPServer, _serve_connection)


@contextmanager
def plugged(app: ASGIApp, config: Config) -> Iterator[Shared]:
    """Have Hypercorn serve `app` with our HTTP/1 wherever it is given `config`."""
    shared = _ours[config] = Shared(app, config)
    vars(worker)["TCPServer"] = _serve_connection
    try:
        yield shared
    finally:
        del _ours[config]
        if not _ours:
            vars(worker)["TCPServer"] = TCPServer


async def _serve_connection(
    app: AppWrapper,
    loop: asyncio.AbstractEventLoop,
    config: Config,
    context: WorkerContext,
    state: LifespanState,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    shared = _ours.get(config)
    if shared is None or writer.get_extra_info("ssl_object") is not None:
        await TCPServer(app, loop, config, context, state, reader, writer)
        return
    transport = cast(asyncio.Transport, writer.transport)
    scope = _scope(transport, config, state)
    connection = Connection(shared, context, transport, scope)
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
