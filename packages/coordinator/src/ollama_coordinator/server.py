"""Serving the application with Hypercorn: the sockets, the signals, and an orderly end.

A request to stop closes the listening sockets at once; answers under way may go on for the drain
time-out and are then ended with an error record. A second request to stop ends them now.
"""

import asyncio
import contextlib
import gc
import logging
import signal
import socket
from collections.abc import Iterator
from types import FrameType

from hypercorn.config import Config
from hypercorn.utils import LifespanFailureError

from ollama_coordinator_common.config import CoordinatorConfig
from ollama_coordinator_common.error import ConfigError

from .app import Coordinator, create_app
from .http1 import serve

log = logging.getLogger(__name__)

STOPPING = ("SIGINT", "SIGTERM", "SIGBREAK")
BACKLOG = 1024
LAST_WORDS_SECONDS = 2.0
"""How long the error records that end the last answers may take to be sent."""


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
        expected = f"cannot listen on {host} port {port}: {exc.strerror}; stop what uses it or"
        raise ConfigError("COORDINATOR_PORT", port, f"{expected} give another") from exc
    return sockets


def _listener(family: int, address: object) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
            # Windows lets a second program take over a port that merely has SO_REUSEADDR.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Inherited by accepted connections: a client whose machine vanished is noticed.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)  # type: ignore[arg-type]
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def hypercorn_config(sockets: list[socket.socket]) -> Config:
    """Hypercorn's settings; it takes the sockets over and closes them."""
    config = Config()
    config.bind = [f"fd://{sock.detach()}" for sock in sockets]
    config.backlog = BACKLOG
    config.keep_alive_timeout = 75
    config.keep_alive_max_requests = 1_000_000_000
    config.h11_max_incomplete_size = 64 * 1024
    config.include_server_header = False
    config.errorlog = logging.getLogger("hypercorn.error")
    return config


async def run(config: CoordinatorConfig) -> None:
    """Serve until a signal, then end in order.

    Raises:
        ConfigError: the address cannot be listened on.
        DatabaseError: the database cannot be opened.
    """
    app = create_app(config)
    coordinator: Coordinator = app.state.coordinator
    _collect_seldom()
    server = hypercorn_config(listen(config.host, config.port))
    stop = Stop()

    async def asked() -> None:
        await stop.asked.wait()
        # Hypercorn reads it from now on; it may have been changed while serving.
        server.graceful_timeout = coordinator.config.drain_timeout + LAST_WORDS_SECONDS

    with stop.on_signals():
        log.info("coordinator listens", extra={"host": config.host, "port": config.port})
        serving = asyncio.create_task(serve(app, server, asked, http=config.http))
        ending = asyncio.create_task(_end_in_order(coordinator, stop, serving))
        try:
            await serving
        except LifespanFailureError as exc:
            raise coordinator.failure or exc from exc
        except asyncio.CancelledError:
            if not ending.done():
                raise
        finally:
            ending.cancel()
            await asyncio.gather(ending, return_exceptions=True)


def _collect_seldom() -> None:
    """Look for unreachable cycles less often: requests leave none, and it took a fifth of the CPU.

    What exists already stays, and is not looked at again.
    """
    gc.collect()
    gc.freeze()
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


async def _end_in_order(coordinator: Coordinator, stop: Stop, serving: asyncio.Task[None]) -> None:
    await stop.asked.wait()
    coordinator.begin_stopping()
    under_way = len(list(coordinator.scheduler.leases()))
    seconds = coordinator.config.drain_timeout
    log.info(
        "coordinator stops", extra={"answers_under_way": under_way, "at_most_seconds": seconds}
    )
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await stop.insisted.wait()
    coordinator.stop_serving("the coordinator is shutting down")
    await asyncio.sleep(LAST_WORDS_SECONDS)
    # Only a client that does not read its answer is still there.
    serving.cancel()
