"""A TCP relay from this machine's network address to its Ollama on loopback.

Raw bytes both ways, with back-pressure. The end of one direction is passed on as a half-close, a
reset as a reset, so that each side notices at once what the other did: an abandoned request stops
the generation, a killed Ollama ends the stream. Ollama asks for no password: only the coordinator
and the peers that the operator named get through. The coordinator proves that it is one, where it
says that it can; else it is known by its addresses.
"""

import asyncio
import logging
import socket
from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network, ip_network

from ollama_coordinator_common.handshake import (
    GREETING,
    HELLO_BYTES,
    PROOF_BYTES,
    NotProven,
    RelaySide,
)
from ollama_coordinator_common.network import Address, cause_of, parse_address
from ollama_coordinator_common.pump import Framing, Pipe, carry

from .pacing import Reminder

log = logging.getLogger(__name__)

Network = IPv4Network | IPv6Network

BACKLOG = 512
"""Connections that may wait to be accepted: more than a coordinator opens at once."""

HANDSHAKE_SECONDS = 5.0
"""How long a peer that does not pass by its address has to prove that it is the coordinator."""

MOST_STRANGERS = 64
"""Of such peers at the same time; for one more, the oldest has to go. A handshake takes some
milliseconds: nobody keeps the coordinator out by opening connections."""

REMEMBERED_PEERS = 1000
"""Each refused peer is logged once; a scan of a network must not fill memory and log."""

ACCEPT_AGAIN_SECONDS = 0.1
"""The pause after a failed accept, usually for lack of file descriptors."""


class Entrance(Pipe):
    """The connection of a peer, whose first bytes may say who it is."""

    def __init__(self) -> None:
        super().__init__()
        self._news = asyncio.Event()

    async def first(self, size: int) -> bytes:
        """The first `size` bytes, which stay; fewer where no more come."""
        while len(self._early) < size and self._transport and not self.ended.is_set():
            self._news.clear()
            self._transport.resume_reading()
            await self._news.wait()
        return self._early[:size]

    async def take(self, size: int) -> bytes:
        """The first `size` bytes, which are gone then."""
        taken = await self.first(size)
        self._early = self._early[size:]
        return taken

    async def greets(self) -> bool:
        """Whether it begins with a handshake."""
        begins = await self.first(1) == GREETING[:1]
        return begins and await self.first(len(GREETING)) == GREETING

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        super().data_received(data)
        self._news.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is closed."""
        super().connection_lost(exc)
        self._news.set()


class TcpRelay:
    """Listens for the coordinator and connects it with the Ollama at `host:port`.

    `key` is what the coordinator proves to know, and the relay to it; empty where there is none.
    `asks_handshake`: the coordinator's address alone lets nobody in.
    """

    def __init__(
        self, host: str, port: int, allowed: Iterable[Network] = (), key: str = ""
    ) -> None:
        self.port: int | None = None
        self.target = (host, port)
        self.asks_handshake = False
        self._key = key
        self._strangers: dict[Entrance, None] = {}
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

    @property
    def can_handshake(self) -> bool:
        """Whether it has a key for that."""
        return bool(self._key)

    def admit_coordinator(self, addresses: Iterable[str]) -> None:
        """Know the coordinator by these addresses, and by no earlier ones."""
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
                        self._reminder.warn(f"the relay cannot accept: {cause_of(exc)}")
                        await asyncio.sleep(ACCEPT_AGAIN_SECONDS)
                        continue
                    connections.create_task(self._serve(peer))

    def is_allowed(self, peer: str, local: str) -> bool:
        """Whether a peer passes by its address: the coordinator that proves nothing, the operator's
        list, this machine itself.
        """
        address = parse_address(peer)
        if address is None:
            return False
        if address.is_loopback or address == parse_address(local):
            return True
        if address in self._coordinator and not self.asks_handshake:
            return True
        return any(address in net for net in self._allowed)

    async def _serve(self, peer: socket.socket) -> None:
        try:
            remote, local = str(peer.getpeername()[0]), str(peer.getsockname()[0])
        except OSError:  # gone already
            peer.close()
            return
        is_allowed = self.is_allowed(remote, local)
        if not (is_allowed or self._key):
            peer.close()
            self._log_refused(remote)
            return
        near = Entrance()
        await asyncio.get_running_loop().connect_accepted_socket(lambda: near, peer)
        try:
            if await (self._passes(near) if is_allowed else self._proves_in_time(near, remote)):
                await self._carry(near)
        finally:
            near.reset()

    async def _carry(self, near: Entrance) -> None:
        framing = Framing()
        self._connections.add(framing)
        try:
            await carry(near, self.target, framing)
        finally:
            self._connections.remove(framing)

    async def _passes(self, near: Entrance) -> bool:
        """Whether a peer that may pass has something to say.

        It may begin with a handshake, as a coordinator on this machine does; that has to be right.
        """
        if not self._key:
            return True
        if not await near.first(1):
            return False
        return not await near.greets() or await self._proves(near)

    async def _proves_in_time(self, near: Entrance, remote: str) -> bool:
        """Whether a peer proves that it is the coordinator.

        One that goes without a word only looked whether somebody listens, and is not logged.
        """
        self._strangers[near] = None
        if len(self._strangers) > MOST_STRANGERS:
            next(iter(self._strangers)).reset()
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                is_refused = bool(await near.first(1))
                if await near.greets() and await self._proves(near):
                    return True
        except TimeoutError:
            is_refused = True
        finally:
            del self._strangers[near]
        if is_refused:
            self._log_refused(remote)
        return False

    async def _proves(self, near: Entrance) -> bool:
        try:
            side = RelaySide(self._key, await near.take(HELLO_BYTES))
        except NotProven:
            return False
        near.send(side.line)
        return side.is_proof(await near.take(PROOF_BYTES))

    def _log_refused(self, remote: str) -> None:
        address = parse_address(remote)
        if address is None or address in self._refused or len(self._refused) > REMEMBERED_PEERS:
            return
        self._refused.add(address)
        log.warning(
            "the relay refused a peer that did not prove to be the coordinator; if it is one of an"
            " earlier version (at another address, a container's, NAT), or may use Ollama all the"
            " same, add it to AGENT_RELAY_ALLOW",
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
