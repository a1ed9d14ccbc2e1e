"""A TCP relay from this machine's network address to its Ollama on loopback.

Raw bytes both ways, with back-pressure. The end of one direction is passed on as a half-close, a
reset as a reset, so that each side notices at once what the other did: an abandoned request stops
the generation, a killed Ollama ends the stream. Ollama asks for no password: only the coordinator
and the peers that the operator named get through.
"""

import asyncio
import contextlib
import logging
import math
import re
import socket
import struct
from collections.abc import Callable, Iterable
from ipaddress import IPv4Network, IPv6Network, ip_network

from ollama_coordinator_common.network import Address, keep_alive, parse_address

from .pacing import Reminder

log = logging.getLogger(__name__)

Network = IPv4Network | IPv6Network
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

CHUNK_BYTES = 64 * 1024
"""What is held of one direction at most, in each of its two buffers."""

BACKLOG = 512
"""Connections that may wait to be accepted: more than a coordinator opens at once."""

REMEMBERED_PEERS = 1000
"""Each refused peer is logged once; a scan of a network must not fill memory and log."""

ACCEPT_AGAIN_SECONDS = 0.1
"""The pause after a failed accept, usually for lack of file descriptors."""

RESET_ON_CLOSE = struct.pack("hh" if hasattr(socket, "SO_EXCLUSIVEADDRUSE") else "ii", 1, 0)
"""SO_LINGER on with no time: the close sends a reset (the fields are shorts on Windows)."""

INTERIM = re.compile(rb"HTTP/1\.1 1\d\d ")
BODILESS = re.compile(rb"HTTP/1\.[01] (?:204|304) ")
CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,18})", re.IGNORECASE)
CHUNKED = re.compile(rb"\r\ntransfer-encoding:[^\r]*chunked", re.IGNORECASE)
LAST_CHUNK = b"\r\n0\r\n\r\n"


class TcpRelay:
    """Listens for the coordinator and connects it with the Ollama at `host:port`."""

    def __init__(self, host: str, port: int, allowed: Iterable[Network] = ()) -> None:
        self.port: int | None = None
        self.target = (host, port)
        self._allowed = tuple(allowed)
        self._coordinator: frozenset[Address] = frozenset()
        self._refused: set[Address] = set()
        self._connections: set[Framing] = set()
        self._listener: socket.socket | None = None
        self._reminder = Reminder()

    def listen(self, port: int, fallback: int | None = None) -> int:
        """Open the relay's port: `port`, or if that is 0 the `fallback`, or any.

        Raises:
            OSError: the configured port cannot be had.
        """
        if not port and fallback:
            try:
                return self.listen(fallback)
            except OSError:
                log.debug("the relay's last port is taken", extra={"port": fallback})
        self._listener = _listen(port)
        self._listener.setblocking(False)
        self.port = int(self._listener.getsockname()[1])
        return self.port

    @property
    def active_requests(self) -> int:
        """The requests in progress on the relayed connections; idle ones do not count."""
        return sum(framing.in_progress for framing in self._connections)

    def admit_coordinator(self, addresses: Iterable[str]) -> None:
        """Admit the coordinator from these addresses, and from no earlier ones."""
        self._coordinator = frozenset(a for text in addresses if (a := parse_address(text)))

    async def run(self) -> None:
        """Accept until cancelled; then every connection is closed."""
        listener = self._listener
        if listener is None:
            raise RuntimeError("listen() first")
        loop = asyncio.get_running_loop()
        with listener:
            async with asyncio.TaskGroup() as connections:
                while True:
                    try:
                        peer, _ = await loop.sock_accept(listener)
                    except OSError as exc:  # too many open files, or a peer that left already
                        self._reminder.warn(f"the relay cannot accept: {exc}")
                        await asyncio.sleep(ACCEPT_AGAIN_SECONDS)
                        continue
                    connections.create_task(self._serve(peer))

    def is_allowed(self, peer: str, local: str) -> bool:
        """Whether a peer may pass: the coordinator, the operator's list, this machine itself."""
        address = parse_address(peer)
        if address is None:
            return False
        if address.is_loopback or address == parse_address(local):
            return True
        return address in self._coordinator or any(address in net for net in self._allowed)

    async def _serve(self, peer: socket.socket) -> None:
        try:
            remote, local = str(peer.getpeername()[0]), str(peer.getsockname()[0])
        except OSError:  # gone already
            peer.close()
            return
        if not self.is_allowed(remote, local):
            peer.close()
            self._log_refused(remote)
            return
        framing = Framing()
        self._connections.add(framing)
        try:
            await self._connect(peer, framing)
        finally:
            self._connections.remove(framing)

    async def _connect(self, peer: socket.socket, framing: "Framing") -> None:
        near = await asyncio.open_connection(sock=peer, limit=CHUNK_BYTES)
        try:
            far = await asyncio.open_connection(*self.target, limit=CHUNK_BYTES)
        except OSError:
            _reset(near[1])  # what the peer would have met without a relay
            return
        except asyncio.CancelledError:
            _reset(near[1])
            raise
        await _join(near, far, framing)

    def _log_refused(self, remote: str) -> None:
        address = parse_address(remote)
        if address is None or address in self._refused or len(self._refused) > REMEMBERED_PEERS:
            return
        self._refused.add(address)
        log.warning(
            "the relay refused a peer that is not the coordinator; if it is (another address, a"
            " container, NAT), add it to AGENT_RELAY_ALLOW",
            extra={"peer": remote},
        )


def parse_networks(texts: Iterable[str]) -> list[Network]:
    """Addresses and networks as the operator wrote them.

    Raises:
        ValueError: one of them is neither.
    """
    return [ip_network(text.strip(), strict=False) for text in texts if text.strip()]


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        listener = socket.create_server(
            ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG
        )
    else:
        listener = socket.create_server(("", port), backlog=BACKLOG)
    # Inherited by accepted connections, on which asyncio does not set it: no token waits for more.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


class Framing:
    """Sees where the answers on one connection begin and end: is a request in progress?

    Of HTTP only what says how long an answer is gets read (RFC 9112, section 6.3). An answer that
    is not understood is over when its connection ends.
    """

    def __init__(self) -> None:
        self.in_progress = False
        self._is_head_request = False
        self._head: bytes | None = b""  # of the answer; `None` once it is complete
        self._left = math.inf  # bytes of the answer's body, unless it is in chunks
        self._end: bytes | None = None  # the last bytes of an answer in chunks

    def asked(self, chunk: bytes) -> None:
        """Note bytes of a request."""
        if not self.in_progress:
            self.in_progress = True
            self._is_head_request = chunk.startswith(b"HEAD ")
            self._head = b""

    def answered(self, chunk: bytes) -> None:
        """Note bytes of an answer."""
        if self._head is not None:
            chunk = self._read_head(self._head + chunk)
            if self._head is not None:
                return
        if self._end is not None:
            self._end = (self._end + chunk[-len(LAST_CHUNK) :])[-len(LAST_CHUNK) :]
            self.in_progress = self._end != LAST_CHUNK
        else:
            self._left -= len(chunk)
            self.in_progress = self._left > 0

    def _read_head(self, data: bytes) -> bytes:
        """What follows the head of the answer, whose framing is then known."""
        while INTERIM.match(data) and b"\r\n\r\n" in data:
            data = data.partition(b"\r\n\r\n")[2]
        self._head, end, body = data.partition(b"\r\n\r\n")
        if not end and len(data) <= CHUNK_BYTES:
            return b""
        length = CONTENT_LENGTH.search(self._head)
        self._end = b"\r\n" if CHUNKED.search(self._head) else None
        self._left = int(length[1]) if length else math.inf
        if self._is_head_request or BODILESS.match(self._head):
            self._end, self._left = None, 0
        self._head = None
        return body


async def _join(near: Streams, far: Streams, framing: Framing) -> None:
    """Pump both directions until both have ended or one is reset."""
    ended_well = False
    try:
        for _, writer in (near, far):
            keep_alive(writer.get_extra_info("socket"))
        async with asyncio.TaskGroup() as directions:
            directions.create_task(_pump(near[0], far[1], framing.asked))
            directions.create_task(_pump(far[0], near[1], framing.answered))
        ended_well = True
    except* OSError as group:
        log.debug("a relayed connection was cut", extra={"reason": repr(group.exceptions[0])})
    finally:
        for _, writer in (near, far):
            writer.close() if ended_well else _reset(writer)


async def _pump(
    source: asyncio.StreamReader, sink: asyncio.StreamWriter, note: Callable[[bytes], None]
) -> None:
    while chunk := await source.read(CHUNK_BYTES):
        note(chunk)
        sink.write(chunk)
        await sink.drain()
    if sink.can_write_eof():
        sink.write_eof()


def _reset(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):  # it may be gone already
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    writer.transport.abort()
