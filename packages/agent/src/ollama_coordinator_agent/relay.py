"""A TCP relay from this machine's network address to its Ollama on loopback.

Raw bytes both ways, with back-pressure. The end of one direction is passed on as a half-close, a
reset as a reset, so that each side notices at once what the other did: an abandoned request stops
the generation, a killed Ollama ends the stream. Ollama asks for no password: only the coordinator
and the peers that the operator named get through.
"""

import asyncio
import logging
import socket
from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network, ip_network

from ollama_coordinator_common.network import Address, cause_of, parse_address
from ollama_coordinator_common.pump import Framing, Pipe, carry

from .pacing import Reminder

log = logging.getLogger(__name__)

Network = IPv4Network | IPv6Network

BACKLOG = 512
"""Connections that may wait to be accepted: more than a coordinator opens at once."""

REMEMBERED_PEERS = 1000
"""Each refused peer is logged once; a scan of a network must not fill memory and log."""

ACCEPT_AGAIN_SECONDS = 0.1
"""The pause after a failed accept, usually for lack of file descriptors."""


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
                        self._reminder.warn(f"the relay cannot accept: {cause_of(exc)}")
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

    async def _connect(self, peer: socket.socket, framing: Framing) -> None:
        near = Pipe()
        await asyncio.get_running_loop().connect_accepted_socket(lambda: near, peer)
        await carry(near, self.target, framing)

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
