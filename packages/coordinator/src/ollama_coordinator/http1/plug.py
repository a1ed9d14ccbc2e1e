"""Our part in Hypercorn's server, for which it has no public hook.

Its worker looks up by name what serves a connection: `hypercorn.asyncio.run.TCPServer`, called with
the application, the loop, the settings, the worker's context, the lifespan's state and the streams,
and awaited. While a server of ours runs, that name leads here: every connection passes its door,
and is then served by our HTTP/1 or by Hypercorn's own. Connections of other servers in the process
go on to Hypercorn's. Importing this module fails where one of its parts is missing.
"""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import cast

from hypercorn.asyncio import run as worker
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.config import Config
from hypercorn.typing import AppWrapper, LifespanState
from msgspec import Struct

from .door import VISIT, Door
from .framing import Refusal

PARAMETERS = ["app", "loop", "config", "context", "state", "reader", "writer"]

Serve = Callable[
    [WorkerContext, LifespanState, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]
]


class _Ours(Struct, frozen=True):
    """One running server: its door, and who serves what comes through it (`None`: Hypercorn)."""

    door: Door
    serve: Serve | None


_ours: dict[Config, _Ours] = {}


def fits() -> bool:
    """Whether this Hypercorn serves connections as described above."""
    used = getattr(worker, "TCPServer", None)
    known = list(inspect.signature(TCPServer).parameters) == PARAMETERS
    return known and used in (TCPServer, _serve_connection)


@contextmanager
def plugged(config: Config, door: Door, serve: Serve | None) -> Iterator[None]:
    """Have Hypercorn serve what comes through `door`, wherever it is given `config`, by `serve`."""
    _ours[config] = _Ours(door, serve)
    vars(worker)["TCPServer"] = _serve_connection
    try:
        yield
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
    ours = _ours.get(config)
    if ours is None:
        await TCPServer(app, loop, config, context, state, reader, writer)
        return
    serve = ours.serve if writer.get_extra_info("ssl_object") is None else None
    transport = cast(asyncio.Transport, writer.transport)
    visit = ours.door.enter(transport, reader if serve is None else None)
    if visit is None:
        await ours.door.turn_away(_no_room(config), reader, writer)
        return
    state = cast(LifespanState, {**state, VISIT: visit})
    try:
        if serve is not None:
            await serve(context, state, reader, writer)
        else:
            await TCPServer(app, loop, config, context, state, reader, writer)
    finally:
        # Hypercorn lets go of a connection that does not close when it is cancelled twice.
        transport.abort()
        ours.door.leave(visit)


RETRY_AFTER_SECONDS = 5


def _no_room(config: Config) -> bytes:
    headers = [*config.response_headers("h11"), (b"retry-after", b"%d" % RETRY_AFTER_SECONDS)]
    lines = b"".join(b"%b: %b\r\n" % header for header in headers)
    return Refusal(503, "there is no room for another connection; try again").in_json(lines)
