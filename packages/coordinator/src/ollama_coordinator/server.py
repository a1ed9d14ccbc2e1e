"""Serving the application with Hypercorn: the sockets, the signals, and an orderly end.

A request to stop closes the listening sockets at once; answers under way may go on for the drain
time-out and are then ended with an error record. A second request to stop ends them now. Whatever
clients do, what the coordinator consists of is closed in order at the end.
"""

import asyncio
import contextlib
import errno
import gc
import logging
import signal
import socket
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from types import FrameType
from typing import Any

from hypercorn.config import Config
from starlette.applications import Starlette
from starlette.types import ASGIApp

from ollama_coordinator_common.error import ConfigError
from ollama_coordinator_common.network import keep_alive, netloc
from ollama_coordinator_common.settings import CoordinatorConfig

from .aio import beside, first_of
from .app import create_app, running, takeover_of
from .carry import Takeover
from .clock import Clock
from .cluster import Cluster
from .db import DatabaseError, SharedDatabase, Store, database_of
from .front import Front
from .http1 import BACKLOG, ConnectionLimits, capacity, serve
from .identity import announce
from .parts import Parts
from .settings import Settings
from .tls import Tls
from .upstream import Upstreams

log = logging.getLogger(__name__)

STOPPING = ("SIGINT", "SIGTERM", "SIGBREAK")
"""Ctrl-C, service managers, and Ctrl-Break on Windows."""

LAST_RECORDS_SECONDS = 2.0
"""For sending the error records that end the last answers: clients that read need milliseconds."""

ABORTED_SECONDS = 5.0
"""For the server to end once its connections are cut; there is nothing left to wait for."""

CLOSING_SECONDS = 60.0
"""For the parts to close; the last writes to the database, on a slow disk, are among it."""

IDLE_SECONDS = 180
"""An idle connection stays open so long: proxies keep theirs for 60 to 120 s, and whoever closes
first should be the side that sends the requests."""

MOST_REQUESTS = 1_000_000_000
"""A connection serves any number of requests: closing one under load costs a request its retry."""

NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""The system has no such address, or no addresses of its kind."""

HEAD_BYTES = 64 * 1024
"""For a request's head; browsers behind single sign-on send 16 KiB of cookies."""


LOOPBACK = "127.0.0.1"

EVERYWHERE = ("", "0.0.0.0", "::")
"""Values of `COORDINATOR_HOST` that are no address at which others reach this machine."""


def listen(host: str, port: int) -> list[socket.socket]:
    """The listening sockets, one an address of the host.

    Raises:
        ConfigError: the host has no address here, or the port is taken or not allowed.
    """
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (socket.gaierror, UnicodeError) as exc:
        expected = "give an address of this machine, or 0.0.0.0 for all"
        raise ConfigError("COORDINATOR_HOST", host, expected) from exc
    sockets: list[socket.socket] = []
    try:
        for family, _, _, _, address in dict.fromkeys(found):
            sockets.append(_listener(family, address))
    except OSError as exc:
        for sock in sockets:
            sock.close()
        if exc.errno in NOT_HERE:
            expected = f"{exc.strerror}; give an address of this machine, or 0.0.0.0 for all"
            raise ConfigError("COORDINATOR_HOST", host, expected) from exc
        taken = "stop what uses it or " if exc.errno == errno.EADDRINUSE else ""
        expected = f"cannot listen on {host} port {port}: {exc.strerror}; {taken}give another"
        raise ConfigError("COORDINATOR_PORT", port, expected) from exc
    return sockets


def _listener(family: int, address: object) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
            # Windows lets a second program take over a port that merely has SO_REUSEADDR.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted connections inherit both: a silent answer is not forgotten by a router, a client
        # whose machine vanished is noticed, and no token waits for the next one.
        keep_alive(sock)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)  # type: ignore[arg-type]
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def hypercorn_config(sockets: list[socket.socket], backlog: int) -> Config:
    """Hypercorn's settings; it takes the sockets over and closes them.

    `backlog`: how many connections may be accepted before any of them is served.
    """
    config = Config()
    config.bind = [f"fd://{sock.detach()}" for sock in sockets]
    config.backlog = backlog
    config.keep_alive_timeout = IDLE_SECONDS
    config.keep_alive_max_requests = MOST_REQUESTS
    config.h11_max_incomplete_size = HEAD_BYTES
    config.include_server_header = False
    config.errorlog = logging.getLogger("hypercorn.error")
    return config


async def run(config: CoordinatorConfig, listening: Iterable[socket.socket] = ()) -> None:
    """Serve until a signal, then end in order; on sockets that listen already, if any are given.

    Raises:
        ConfigError: the address cannot be listened on, or the certificate not used.
        DatabaseError: the database cannot be opened.
    """
    tls, stop = await asyncio.to_thread(Tls, config), Stop()
    with contextlib.ExitStack() as sockets, stop.on_signals():
        listening = list(listening) or listen(config.host, config.port)
        for sock in listening:
            sockets.enter_context(sock)
        await Process(config, tls, stop, listening).run()


@contextlib.asynccontextmanager
async def _empty_lifespan(app: Starlette) -> AsyncIterator[None]:
    yield


class Process:
    """This process while it serves: one server, and a coordinator as long as this one leads.

    Where the database cannot be shared, that is always.
    """

    def __init__(
        self,
        config: CoordinatorConfig,
        tls: Tls,
        stop: "Stop",
        listening: list[socket.socket],
    ) -> None:
        self._config = config
        self._tls = tls
        self._stop = stop
        self._listening = listening
        self._port = self._port_of_this = int(listening[0].getsockname()[1])
        self._database = database_of(config.database_url)
        self._is_worker = config.workers > 1
        self._clock = Clock()
        self._parts: Parts | None = None
        self._front: Front | None = None
        self._capacity = capacity()
        self._limits = ConnectionLimits(
            most=self._capacity.connections,
            shared=lambda at: self._parts is None or self._parts.access.is_shared(at),
            known=lambda at: self._parts is None or self._parts.access.is_known(at),
            stall_seconds=lambda: self._in_force.stall_timeout,
            now=self._clock.now,
        )
        self._ready = asyncio.Event()
        self._ended = asyncio.Event()

    @property
    def _in_force(self) -> CoordinatorConfig:
        return self._config if self._parts is None else self._parts.settings.config

    async def run(self) -> None:
        """Serve until a signal, then end in order.

        Raises:
            DatabaseError: the database cannot be opened.
        """
        with self._clock.watching():
            async with beside(self._tls.run()):
                shared = self._database
                if isinstance(shared, SharedDatabase) and (shared.of_machines or self._is_worker):
                    await self._share(shared)
                else:
                    async with self._leading(None) as app:
                        await self._serve(app)

    @contextlib.asynccontextmanager
    async def _leading(self, cluster: Cluster | None) -> AsyncIterator[Starlette]:
        """A coordinator, open during the block and closed after it, however it ends.

        Raises:
            DatabaseError: the database cannot be opened, or another coordinator leads.
        """
        # In a thread: the database's server is asked for the settings that are kept there.
        app = await asyncio.to_thread(create_app, self._config, cluster, self._tls)
        parts: Parts = app.state.parts
        # Hypercorn skips the end of a lifespan when it is cancelled, so the lifespan is held here.
        app.router.lifespan_context = _empty_lifespan
        try:
            async with (
                asyncio.timeout(None) as closing,
                running(parts),
                beside(*self._announcing(parts)),
            ):
                self._parts, parts.connections = parts, self._limits
                try:
                    yield app
                finally:
                    closing.reschedule(asyncio.get_running_loop().time() + CLOSING_SECONDS)
        except TimeoutError:
            log.error("not everything could be closed", extra={"within_seconds": CLOSING_SECONDS})
        finally:
            self._parts = None

    def _announcing(self, parts: Parts) -> Iterator[Coroutine[Any, Any, None]]:
        """What tells the network where this coordinator is, while it leads."""
        if self._config.announce:
            scheme = "http" if self._tls.context is None else "https"
            yield announce(parts.identity, self._config.host, self._port, scheme)

    # ── one of several ────────────────────────────────────────────────────────────────────────

    async def _share(self, shared: SharedDatabase) -> None:
        if self._is_worker:
            # Clients connect to any of the processes; the others need this one.
            host = LOOPBACK if not shared.of_machines else self._config.host
            own = listen(host, 0)
            self._listening = [*self._listening, *own]
            self._port_of_this = int(own[0].getsockname()[1])
        cluster = Cluster(shared, self._url_at, lambda: self._tls.shown)
        settings = await asyncio.to_thread(Settings, self._config, Store(shared))
        upstreams = Upstreams(self._clock)
        front = self._front = Front(cluster, upstreams, settings, self._clock)
        async with upstreams, beside(front.run()):
            part = asyncio.create_task(self._take_part(cluster, front))
            ready = asyncio.create_task(self._ready.wait())
            try:
                await asyncio.wait({part, ready}, return_when=asyncio.FIRST_COMPLETED)
                if not part.done():
                    await self._serve(front)
                    await front.settle()
                self._ended.set()
                await part
            finally:
                ready.cancel()
                part.cancel()

    def _url_at(self, address: str) -> str:
        """Where the others reach this one, at its address towards the database."""
        config = self._config
        if config.advertise and not self._is_worker:
            return config.advertise.rstrip("/")
        scheme = "http" if self._tls.context is None else "https"
        host = address if config.host in EVERYWHERE or address == LOOPBACK else config.host
        return f"{scheme}://{netloc(host, self._port_of_this)}"

    async def _take_part(self, cluster: Cluster, front: Front) -> None:
        """Lead as often as nobody else does, until the server has ended."""
        while not self._stop.asked.is_set():
            try:
                async with self._leading(cluster) as app, takeover_of(app).running():
                    app.state.parts.pass_on = front.take_back
                    front.lead(app, takeover_of(app))
                    await self._lead(cluster, front, takeover_of(app))
            except DatabaseError as exc:
                if not (exc.in_use or self._ready.is_set()):
                    raise
                if not exc.in_use:
                    log.error("cannot lead", extra={"problem": str(exc)})
            finally:
                front.follow()
            if not self._stop.asked.is_set():
                await self._follow(cluster, front)

    async def _lead(self, cluster: Cluster, front: Front, takeover: Takeover) -> None:
        """Lead until the server has ended, or another coordinator has the database."""
        if self._parts is None:
            raise RuntimeError("nothing serves")
        self._ready.set()
        lost, served = self._parts.store.lost, front.own

        def pause(is_paused: bool) -> None:
            if is_paused:
                log.error("cut off from the database, and another one may lead: nothing is granted")
            else:
                log.warning("the database answers again: grants go on")
            front.pause(None if is_paused else served)
            takeover.pause(is_paused=is_paused)

        keeping = cluster.keep_lead(front.queries.may_lead, pause)
        async with beside(keeping):
            await first_of(lost.wait(), self._stop.asked.wait())
        if self._stop.asked.is_set():
            self._parts.operations.hand_over()
            with contextlib.suppress(DatabaseError):  # the others see that nobody answers
                await cluster.give_way(self._parts.store)
            await first_of(self._ended.wait(), self._hand_over(cluster, front, takeover))
            await self._ended.wait()
        else:
            log.warning("another coordinator leads now; what runs through this one ends")
            front.follow()
            takeover.hand_over()
            self._parts.stop_serving("another coordinator leads now")

    async def _hand_over(self, cluster: Cluster, front: Front, takeover: Takeover) -> None:
        """Leave what waits and runs to the next leader, once there is one that takes it."""
        await cluster.changed()
        if await front.takes_over():
            front.follow(takeover.hand_over())

    async def _follow(self, cluster: Cluster, front: Front) -> None:
        """Pass requests on until nobody leads, or a signal comes."""
        log.info("coordinator stands by", extra={"database": self._database.name})
        self._ready.set()
        await first_of(cluster.follow(front.queries.still_leads), self._stop.asked.wait())

    # ── the server ────────────────────────────────────────────────────────────────────────────

    async def _serve(self, app: ASGIApp) -> None:
        collect_seldom()
        config = self._in_force
        server = hypercorn_config(self._listening, self._capacity.backlog)

        async def asked() -> None:
            await self._stop.asked.wait()
            # Hypercorn reads it only now; the setting may have changed while serving.
            drain = self._in_force.drain_timeout
            server.graceful_timeout = drain + LAST_RECORDS_SECONDS + ABORTED_SECONDS

        log.info(
            "coordinator listens",
            extra={
                "host": config.host,
                "port": config.port,
                "connections": self._capacity.connections,
                "database": self._database.name,
                "tls": config.tls.partition(",")[0],
            },
        )
        serving = asyncio.create_task(
            serve(app, server, asked, http=config.http, limits=self._limits, tls=self._tls)
        )
        ending = asyncio.create_task(self._end_in_order())
        try:
            await asyncio.wait({serving, ending}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({serving}, timeout=ABORTED_SECONDS)
            if not serving.done():
                log.warning("the server does not end by itself; it is made to")
                serving.cancel()
                await asyncio.wait({serving}, timeout=ABORTED_SECONDS)
            if serving.done() and not serving.cancelled():
                serving.result()
        finally:
            serving.cancel()
            ending.cancel()
            await asyncio.wait({serving, ending}, timeout=ABORTED_SECONDS)

    async def _end_in_order(self) -> None:
        stop, limits = self._stop, self._limits
        await stop.asked.wait()
        if self._front is not None:
            self._front.stopping = True
        parts, under_way = self._parts, limits.open
        if parts is not None:
            parts.begin_stopping()
            under_way = len(list(parts.scheduler.leases()))
        seconds = self._in_force.drain_timeout
        log.info(
            "coordinator stops", extra={"answers_under_way": under_way, "at_most_seconds": seconds}
        )
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await stop.insisted.wait()
        if parts is not None:
            parts.stop_serving("the coordinator is shutting down")
        await asyncio.sleep(LAST_RECORDS_SECONDS)
        # Only clients that do not read their answer are left. Closing would wait for them.
        limits.end_all("the coordinator is shutting down")


def collect_seldom() -> None:
    """Collect garbage seldom: requests leave no cycles, and it took a fifth of the CPU.

    Objects that exist by now stay for good, and are not scanned again.
    """
    gc.collect()
    gc.freeze()
    # Allocations before a young collection (700 by default), and younger ones before an older one.
    gc.set_threshold(10_000, 20, 20)


class Stop:
    """The requests to stop: the first asks, the second insists."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.insisted = asyncio.Event()

    def _again(self) -> None:
        (self.insisted if self.asked.is_set() else self.asked).set()

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Listen to Ctrl-C and to service managers; also on Windows, hence no loop handlers."""
        loop = asyncio.get_running_loop()

        def heard(number: int, frame: FrameType | None) -> None:
            loop.call_soon_threadsafe(self._again)

        numbers = [getattr(signal, name) for name in STOPPING if hasattr(signal, name)]
        before = {number: signal.signal(number, heard) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
