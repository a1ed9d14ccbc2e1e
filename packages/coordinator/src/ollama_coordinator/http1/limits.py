"""Client connections: how many may be open, which clients do not read, and an end to all of them.

No HTTP here: the limits hold for our HTTP/1 and for Hypercorn's.
"""

import asyncio
import contextlib
import logging
import ssl
import struct
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from msgspec import Struct

from ollama_coordinator_common.network import client_network

log = logging.getLogger(__name__)

CLIENT_CONNECTION = "client_connection"
"""The key of a request's `ClientConnection` in its ASGI scope's state."""

CHECKS_PER_STALL = 10
"""A stall is noticed at most a tenth of its time too late."""

LONGEST_PAUSE_SECONDS = 1.0
"""Between two checks; a changed stall time-out applies that soon."""

SHARE = 0.5
"""Of all connections, for one address: a room with some browsers behind one router fits."""

KEPT = 0.125
"""Of all connections, for agents and operators: heartbeats, links, and who looks what is wrong."""

LOG_SECONDS = 60.0

REFUSED_AT_ONCE = 32
"""More refusals at the same time get no answer: each needs a descriptor until its client reads."""

REFUSAL_SECONDS = 1.0
"""How long a refused client may take to read why: a round trip, and not a second more."""


if sys.platform == "win32":

    def _unacknowledged_bytes(descriptor: int) -> int:
        """Windows does not report it."""
        return 0

else:
    import fcntl
    import termios

    def _unacknowledged_bytes(descriptor: int) -> int:
        """Bytes in the kernel's send buffer; 0 where the kernel does not report it."""
        with contextlib.suppress(OSError, ValueError):  # closed, or not a TCP socket
            return int(struct.unpack("i", fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(4)))[0])
        return 0


class ClientConnection:
    """One open connection. `end_reason`: why the coordinator ended it; empty where it did not.

    `reader`: the stream that shows the end of the client's bytes, where one is in use. `of_link`:
    it belongs to an agent's link. It is no client's: the connections of clients to agents go over
    it, it is not counted, and while stopping it lasts as long as a client is there.
    """

    __slots__ = (
        *("_transport", "reader", "_unsent", "_unsent_since", "client", "end_reason"),
        *("address", "network", "of_link"),
    )

    def __init__(
        self, transport: asyncio.Transport, reader: asyncio.StreamReader | None, now: float
    ) -> None:
        self._transport = transport
        self.reader = reader
        self._unsent = 0
        self._unsent_since = now
        self.client = transport.get_extra_info("peername")
        self.address = str(self.client[0]) if isinstance(self.client, tuple) else ""
        self.network = client_network(self.address)
        self.end_reason = ""
        self.of_link = False

    def stalled_seconds(self, now: float) -> float:
        """How long nothing of the unsent bytes has gone out, as far as checks have seen."""
        unsent = self._transport.get_write_buffer_size()
        if unsent > 0:
            # The kernel takes bytes in large steps: its own buffer shows that the client reads.
            unsent += _unacknowledged_bytes(self._transport.get_extra_info("socket").fileno())
        if unsent == 0 or unsent < self._unsent:
            self._unsent_since = now
        self._unsent = unsent
        return now - self._unsent_since

    def client_has_left(self) -> bool:
        """Whether the client closed the connection, as far as can be seen."""
        return self._transport.is_closing() or (self.reader is not None and self.reader.at_eof())

    def end(self, reason: str) -> None:
        """End the connection now; unsent bytes are lost."""
        self.end_reason = self.end_reason or reason
        self._transport.abort()


def nobody(address: str) -> bool:
    """None of the addresses."""
    return False


def everybody(address: str) -> bool:
    """All addresses."""
    return True


class ConnectionLimits:
    """The client connections of one server.

    `most` may be open at once (`None`: any number). Of these an address, or a network of 64 bits,
    may have a `SHARE`, unless it is `shared` by many clients, such as a proxy's; and `KEPT` are for
    addresses that are `known` as those of agents or operators. One whose client reads nothing of
    its answer for `stall_seconds` is ended (0: never). Each check calls `stall_seconds` anew, since
    the setting can change. `now` are monotonic seconds, without those in which this process did
    not run.
    """

    def __init__(
        self,
        *,
        most: int | None = None,
        shared: Callable[[str], bool] = everybody,
        known: Callable[[str], bool] = everybody,
        stall_seconds: Callable[[], float] = lambda: 0.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.most = most
        self._shared = shared
        self._known = known
        self._full_for_again = 0.0
        self._stall_seconds = stall_seconds
        self._now = now
        self._open: set[ClientConnection] = set()
        self._was_full = False
        self._refusals_under_way = 0
        self.closing = False

    @property
    def open(self) -> int:
        """How many connections are open, those of agents' links too."""
        return len(self._open)

    def admit(
        self, transport: asyncio.Transport, reader: asyncio.StreamReader | None = None
    ) -> ClientConnection | None:
        """Count a new connection; `None` where the limit is reached, or while stopping.

        `reader`: the stream that shows the end of the client's bytes, where one is in use.
        """
        if self._is_full():
            self._end_those_left()
        full = self._is_full()
        if full and not self._was_full:
            log.warning("as many connections as there can be", extra={"connections": self.most})
        self._was_full = full
        connection = ClientConnection(transport, reader, self._now())
        if self.closing or full or not self._has_place(connection):
            return None
        self._open.add(connection)
        return connection

    def _has_place(self, connection: ClientConnection) -> bool:
        """Whether a client's address has a place left; what it has is counted where few are."""
        most, address = self.most, connection.address
        if most is None or len(self._open) < min(most * SHARE, most * (1 - KEPT)):
            return True
        own = sum(one.network == connection.network for one in self._open if not one.of_link)
        if own >= most * SHARE and not self._shared(address):
            self._log_once("as many connections of one address as it may have", address)
            return False
        if self._clients() >= most * (1 - KEPT) and not self._known(address):
            self._log_once("the last connections are kept for agents and operators", address)
            return False
        return True

    def _log_once(self, text: str, address: str) -> None:
        """One line a minute: whoever is refused tries again."""
        if self._now() >= self._full_for_again:
            self._full_for_again = self._now() + LOG_SECONDS
            log.warning(text, extra={"client": address})

    def _is_full(self) -> bool:
        most = self.most
        return most is not None and len(self._open) >= most and self._clients() >= most

    def _clients(self) -> int:
        return sum(not connection.of_link for connection in self._open)

    def _end_those_left(self) -> None:
        """End the connections of clients that left: Hypercorn keeps theirs for a while."""
        for connection in [each for each in self._open if each.client_has_left()]:
            connection.end("the client left")
            self._open.discard(connection)

    def ended(self, connection: ClientConnection) -> None:
        """A connection has ended; it counts no more."""
        self._open.discard(connection)
        self._end_links_of_none()

    def _end_links_of_none(self) -> None:
        """While stopping: end the links once there is no client whose answer may need them."""
        if self.closing and not self._clients():
            self.end_all("the coordinator is shutting down")

    async def refuse(
        self,
        answer: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        context: ssl.SSLContext | None = None,
    ) -> None:
        """End a connection that was not admitted, with `answer` unless too many are refused now."""
        try:
            if not self.closing and self._refusals_under_way < REFUSED_AT_ONCE:
                self._refusals_under_way += 1
                try:
                    await _answer_and_read_on(answer, reader, writer, context)
                finally:
                    self._refusals_under_way -= 1
        finally:
            writer.transport.abort()

    def close(self) -> None:
        """Admit no connection any more."""
        self.closing = True
        self._end_links_of_none()

    def end_all(self, reason: str) -> None:
        """End every connection now."""
        for connection in list(self._open):
            connection.end(reason)

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """End stalled connections while the block runs."""
        watching = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            pause = self._stall_seconds() / CHECKS_PER_STALL or LONGEST_PAUSE_SECONDS
            await asyncio.sleep(min(pause, LONGEST_PAUSE_SECONDS))
            self._check(self._now(), self._stall_seconds() or float("inf"))

    def _check(self, now: float, most_seconds: float) -> None:
        """End each connection that stalls for `most_seconds`.

        With an infinite time-out the check still notes when each stall began.
        """
        for connection in list(self._open):
            stalled = connection.stalled_seconds(now) >= most_seconds
            if stalled and not connection.end_reason and not connection.of_link:
                reason = f"the client took nothing of its answer for {most_seconds:g} s"
                log.warning("connection ended", extra={"client": connection.client, "why": reason})
                connection.end(reason)


async def _answer_and_read_on(
    answer: bytes,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    context: ssl.SSLContext | None,
) -> None:
    """Send an answer and read for a moment.

    Closing with bytes unread resets the connection, and the client would lose the answer.
    """
    try:
        async with asyncio.timeout(REFUSAL_SECONDS):
            if context is not None:
                reader, writer = await secured(writer, context, REFUSAL_SECONDS)
            writer.write(answer)
            if writer.can_write_eof():
                writer.write_eof()
            while await reader.read(65536):
                pass
    except (OSError, TimeoutError):
        return


class _SecuredProtocol(asyncio.StreamReaderProtocol):
    """asyncio's protocol of a stream, which learns too late that half of TLS cannot be closed."""

    def eof_received(self) -> bool:
        super().eof_received()
        return False


async def secured(
    writer: asyncio.StreamWriter, context: ssl.SSLContext, seconds: float
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Agree on TLS with a client of which nothing was read yet; the streams inside it.

    Raises:
        OSError: the client does not agree; a TimeoutError is one, and an ssl.SSLError.
    """
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(loop=loop)
    protocol = _SecuredProtocol(reader, loop=loop)
    transport = await loop.start_tls(
        writer.transport, protocol, context, server_side=True, ssl_handshake_timeout=seconds
    )
    if transport is None:
        raise ConnectionResetError("the client left")
    protocol.connection_made(transport)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


# ── how many there can be: file descriptors run out first ─────────────────────────────────────

OWN_DESCRIPTORS = 64
"""For everything else: the database, files, listening sockets, probes of agents."""

OPEN_MAX = 10_240
"""What macOS grants where it calls the hard limit infinite, and then refuses infinity."""

REFUSAL_DESCRIPTORS = 4096
"""At most so many stay free for connections that are to be refused: four backlogs of 1,024."""

BACKLOG = 1024
"""Connections that the kernel holds, and the event loop accepts, at a time: a burst of clients."""


class Capacity(Struct, frozen=True):
    """`connections`: how many clients may be connected (`None`: any number).

    `backlog`: how many connections may be accepted before any of them is served.
    """

    connections: int | None
    backlog: int


def capacity() -> Capacity:
    """What this process can hold; its own limit is raised to what the system allows."""
    descriptors = _descriptors()
    return Capacity(None, BACKLOG) if descriptors is None else capacity_of(descriptors)


def capacity_of(descriptors: int) -> Capacity:
    """What so many file descriptors allow.

    A quarter stays free for connections to be refused. Of the rest every client needs two: its
    own connection, and one to the agent that serves it. At least 8 clients are admitted, so that
    the dashboard still opens under a tiny limit.
    """
    backlog = max(8, min(BACKLOG, descriptors // 16))
    rest = descriptors - min(descriptors // 4, REFUSAL_DESCRIPTORS) - OWN_DESCRIPTORS
    return Capacity(max(8, rest // 2), backlog)


if sys.platform == "win32":

    def _descriptors() -> int | None:
        """Sockets are not file descriptors on Windows, and have no limit."""
        return None

else:
    import resource

    def _descriptors() -> int | None:
        """The limit on open files, raised as far as it goes; `None` where there is none."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft == resource.RLIM_INFINITY:
            return None
        wanted = OPEN_MAX if hard == resource.RLIM_INFINITY else hard
        if wanted > soft:
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
