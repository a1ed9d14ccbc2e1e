"""The hook into Hypercorn: connections pass the limits, then our HTTP/1 or Hypercorn's serves them.

Hypercorn has no public hook for this. Its asyncio worker looks up by name what serves a connection:
`hypercorn.asyncio.run.TCPServer`, called with the application, the loop, the settings, the
worker's context, the lifespan's state and the two streams, and awaited. While a server of ours
runs, that name is `_serve_connection` below. Other servers in the process, known by their settings,
go on to Hypercorn's `TCPServer`.

Where a release of Hypercorn does it differently (`_misfit` says how), or httptools is missing, a
warning says so, and Hypercorn serves alone: slower, and in the first case without the limits.
Tested with the Hypercorn releases in `TESTED_RELEASES`; others are used if they fit.
"""

import asyncio
import importlib.metadata
import inspect
import logging
import ssl
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import hypercorn.asyncio
from hypercorn.config import Config
from msgspec import Struct
from starlette.types import ASGIApp

from .limits import CLIENT_CONNECTION, ConnectionLimits, secured
from .response import Refusal

if TYPE_CHECKING:
    from hypercorn.asyncio.worker_context import WorkerContext
    from hypercorn.typing import AppWrapper, LifespanState

    from .connection import Http1Server

log = logging.getLogger(__name__)

TESTED_RELEASES = ("0.17.0", "0.17.3", "0.18.0")

NAME = "TCPServer"


async def _absent() -> None:
    """In place of what this release of Hypercorn does not have."""


WORKER = vars(sys.modules.get("hypercorn.asyncio.run", object))
"""The names of Hypercorn's worker."""

HYPERCORNS: Callable[..., Awaitable[None]] = WORKER.get(NAME, _absent)

PARAMETERS = ["app", "loop", "config", "context", "state", "reader", "writer"]

RETRY_AFTER_SECONDS = 5
"""For a client over the limit: connections end within seconds, and a second more harms nobody."""


HANDSHAKE_SECONDS = 10.0
"""For a client to agree on TLS: two round trips."""


class Secured(Protocol):
    """What connections are secured with: `context` for the next one, `None` for no TLS.

    `files` are those of its certificate and key.
    """

    @property
    def context(self) -> ssl.SSLContext | None: ...

    @property
    def files(self) -> tuple[Path, Path] | None: ...


async def serve(
    app: ASGIApp,
    config: Config,
    asked_to_stop: Callable[[], Awaitable[object]],
    *,
    http: str,
    limits: ConnectionLimits | None = None,
    tls: Secured | None = None,
) -> None:
    """Serve until `asked_to_stop` returns; `http` is the value of `COORDINATOR_HTTP`."""
    misfit = _misfit()
    if misfit:
        _warn(misfit)
        if tls is not None and tls.files is not None:
            config.certfile, config.keyfile = (str(file) for file in tls.files)
            config.alpn_protocols = ["http/1.1"]
        await hypercorn.asyncio.serve(app, config, shutdown_trigger=asked_to_stop)  # type: ignore[arg-type]
        return
    limits = ConnectionLimits() if limits is None else limits
    http1 = _http1_server(app, config) if http == "auto" else None

    async def asked() -> None:
        try:
            await asked_to_stop()
        finally:
            limits.close()
            if http1 is not None:
                http1.close()

    with _hooked(config, _Served(limits, http1, tls)):
        async with limits.watched():
            await hypercorn.asyncio.serve(app, config, shutdown_trigger=asked)  # type: ignore[arg-type]


def _misfit() -> str:
    """How this Hypercorn differs from what the hook needs; empty where it fits."""
    if HYPERCORNS is _absent:
        return f"its worker does not use {NAME}"
    if list(inspect.signature(HYPERCORNS).parameters) != PARAMETERS:
        return f"its {NAME} has other parameters"
    if WORKER[NAME] not in (HYPERCORNS, _serve_connection):
        return f"another library has replaced its {NAME}"
    return ""


def _http1_server(app: ASGIApp, config: Config) -> "Http1Server | None":
    try:
        from .connection import Http1Server
    except ImportError as exc:
        _warn(str(exc))
        return None
    return Http1Server(app, config)


def _warn(reason: str) -> None:
    release = importlib.metadata.version("hypercorn")
    extra = {"reason": reason, "hypercorn": release, "tested": ", ".join(TESTED_RELEASES)}
    log.warning("serving with Hypercorn's own HTTP/1, which is slower", extra=extra)


class _Served(Struct, frozen=True):
    """One running server: its limits, our HTTP/1 (`None`: Hypercorn's), and its TLS."""

    limits: ConnectionLimits
    http1: "Http1Server | None"
    tls: Secured | None = None


_served: dict[Config, _Served] = {}


@contextmanager
def _hooked(config: Config, served: _Served) -> Iterator[None]:
    """Serve every connection that Hypercorn accepts with these settings by `served`."""
    _served[config] = served
    WORKER[NAME] = _serve_connection
    try:
        yield
    finally:
        del _served[config]
        if not _served:
            WORKER[NAME] = HYPERCORNS


async def _serve_connection(
    app: "AppWrapper",
    loop: asyncio.AbstractEventLoop,
    config: Config,
    worker: "WorkerContext",
    state: "LifespanState",
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    served = _served.get(config)
    if served is None:
        await HYPERCORNS(app, loop, config, worker, state, reader, writer)
        return
    http1, context = served.http1, served.tls.context if served.tls is not None else None
    transport = cast(asyncio.Transport, writer.transport)
    connection = served.limits.admit(transport, reader if http1 is None else None)
    if connection is None:
        await served.limits.refuse(_too_many(config), reader, writer, context)
        return
    state = cast("LifespanState", {**state, CLIENT_CONNECTION: connection})
    try:
        # It is counted by now, and nothing is read of it yet: no loop reads before this step.
        if context is not None:
            try:
                reader, writer = await secured(writer, context, HANDSHAKE_SECONDS)
            except OSError as exc:
                extra = {"client": writer.get_extra_info("peername"), "reason": str(exc)}
                log.debug("no TLS with a client", extra=extra)
                return
            connection.reader = None if http1 is not None else reader
        if http1 is not None:
            await http1.serve(state, reader, writer)
        else:
            await HYPERCORNS(app, loop, config, worker, state, reader, writer)
    finally:
        # Hypercorn leaves a connection open that does not close, when it is cancelled twice.
        transport.abort()
        served.limits.ended(connection)


def _too_many(config: Config) -> bytes:
    headers = [*config.response_headers("h11"), (b"retry-after", b"%d" % RETRY_AFTER_SECONDS)]
    lines = b"".join(b"%b: %b\r\n" % header for header in headers)
    refusal = Refusal(503, "there is no room for another connection; try again")
    return refusal.response_in_json(lines)
