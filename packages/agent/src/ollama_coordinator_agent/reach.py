"""How the coordinator reaches this machine's Ollama: at which address, by the relay, by a link."""

import asyncio
import logging
import socket
from urllib.parse import urlsplit

from msgspec import UNSET, Struct, UnsetType

from ollama_coordinator_common.network import cause_of, is_loopback, local_address
from ollama_coordinator_common.settings import AgentConfig

from .pacing import AgentPace, Reminder, forever
from .relay import TcpRelay
from .state import StateFolder
from .suspend import WakeAddress, wake_address

log = logging.getLogger(__name__)

RESOLVE_SECONDS = 3.0
"""How long the system may take to look up the coordinator's host name."""

GIVEN_UP_SECONDS = 60.0
"""How long a link is not tried again that the coordinator refused, or a proxy on the way."""

ACCEPT_SECONDS = 1.0
"""How long a port of this machine may take to accept a connection."""


class Transport:
    """Whether the coordinator reaches this machine by a link; it is remembered for the next run.

    `is_open`: `AGENT_TRANSPORT` leaves that open.
    """

    def __init__(self, config: AgentConfig, state: StateFolder) -> None:
        self.is_open = config.transport == "auto"
        self.is_link = config.transport == "link" or (self.is_open and state.last_run.linked)
        self._state = state
        self._given_up_until = 0.0

    def note(self, reached: bool | UnsetType, *, is_running: bool) -> None:
        """Take note whether the coordinator reaches this machine's port.

        That it does not means something only while an Ollama runs behind it.
        """
        if not self.is_open or reached is UNSET or reached is not self.is_link:
            return
        now = asyncio.get_running_loop().time()
        if not reached and (not is_running or now < self._given_up_until):
            return
        self.is_link = not reached
        self._state.remember(linked=self.is_link)
        if self.is_link:
            log.info("the coordinator does not reach this machine's port; it gets a link")
        else:
            log.info("the coordinator reaches this machine's port; it needs no link")

    def give_up(self, now: float) -> None:
        """A link is not possible; where that is left open, the port is offered again."""
        if self.is_open:
            self.is_link = False
            self._given_up_until = now + GIVEN_UP_SECONDS


class Offer(Struct, frozen=True):
    """Where the coordinator is to connect; without a relay, to Ollama's own port.

    `wake` is where it wakes the machine.
    """

    ip_address: str
    relay_port: int | None = None
    wake: WakeAddress = WakeAddress()


class Reach:
    """Keeps the offer true; sets `changed` when it changes."""

    def __init__(
        self,
        config: AgentConfig,
        relay: TcpRelay,
        state: StateFolder,
        changed: asyncio.Event,
        pace: AgentPace,
    ) -> None:
        self.offer: Offer | None = None
        self._config = config
        self._relay = relay
        self._state = state
        self._changed = changed
        self._pace = pace
        self._refreshing = asyncio.Lock()
        self._relay_is_open = asyncio.Event()
        self._reminder = Reminder()
        self._addresses: list[str] = []
        self._coordinator, self._url = ("", 80), ""
        relay.asks_handshake = state.last_run.handshakes_with is not None  # before anybody is there

    @property
    def relayed_requests(self) -> int:
        """The requests in progress through the relay."""
        return self._relay.active_requests

    @property
    def target(self) -> tuple[str, int]:
        """Where Ollama listens on this machine."""
        return self._relay.target

    def follow(self, url: str) -> None:
        """Offer what the coordinator at a URL reaches."""
        self._coordinator, self._url = coordinator_address(url), url
        self._relay.asks_handshake = self._state.last_run.handshakes_with == url

    @property
    def can_handshake(self) -> bool:
        """Whether the relay can ask for a handshake."""
        return self._relay.can_handshake

    def note_handshake(self, handshake: bool | UnsetType) -> None:
        """Take note whether the coordinator's connections to the relay begin with a handshake."""
        self._relay.asks_handshake = handshake is True
        self._state.remember(handshakes_with=self._url if handshake is True else None)

    async def run(self) -> None:
        """Refresh the offer every now and then, and run the relay once it is needed."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(forever(self._look_again))
            await self._relay_is_open.wait()
            tasks.create_task(self._relay.run())

    def has_moved(self) -> bool:
        """Whether this machine has another address than it offers; nothing is sent or looked up."""
        if self.offer is None or self._config.ip_address:
            return False
        now = local_address(self._addresses, self._coordinator[1])
        return now is not None and now != self.offer.ip_address

    async def refresh(self) -> Offer | None:
        """The offer as it is now; `None` while the coordinator's host has no address."""
        async with self._refreshing:
            offer = await self._look()
        if offer is not None and offer != self.offer:
            self.offer = offer
            self._changed.set()
        return self.offer

    async def _look_again(self) -> float:
        await self.refresh()
        return self._pace.reach

    async def _look(self) -> Offer | None:
        addresses = await self._coordinator_addresses()
        if addresses:
            self._addresses = addresses
            self._relay.admit_coordinator(addresses)
        address = self._config.ip_address or local_address(addresses, self._coordinator[1])
        if address is None:
            return None
        wake = await asyncio.to_thread(wake_address, address)
        return Offer(address, await self._relay_port(address), wake)

    async def _coordinator_addresses(self) -> list[str]:
        try:
            async with asyncio.timeout(RESOLVE_SECONDS):
                return await resolve(*self._coordinator)
        except TimeoutError:
            return []

    async def _relay_port(self, address: str) -> int | None:
        if not await self._needs_relay(address):
            return None
        if self._relay.port is None:
            self._open_relay()
        return self._relay.port

    async def _needs_relay(self, address: str) -> bool:
        needed = await needs_relay(self._config, address, self._relay.target[0])
        return bool(self.offer and self.offer.relay_port) if needed is None else needed

    def _open_relay(self) -> None:
        port = self._config.relay_port
        try:
            opened = self._relay.listen(port, fallback=self._state.last_run.relay_port)
        except OSError as exc:
            text = f"the relay's port cannot be opened ({cause_of(exc)})"
            text += "; set AGENT_RELAY_PORT to a free one"
            if self._reminder.due(text, asyncio.get_running_loop().time()):
                log.error(text)
            return
        self._state.remember(relay_port=opened)
        self._relay_is_open.set()
        log.info("relaying the coordinator to Ollama", extra={"port": opened})


async def needs_relay(config: AgentConfig, address: str, ollama_host: str) -> bool | None:
    """Whether Ollama listens on loopback only; `None` while it does not listen at all."""
    if config.relay != "auto":
        return config.relay == "always"
    if is_loopback(address):
        return False
    if not await accepts(ollama_host, config.ollama_port):
        return None
    return not await accepts(address, config.ollama_port)


async def own_address(config: AgentConfig, url: str) -> str | None:
    """The address under which the coordinator reaches this machine; `None` if it is unknown."""
    if config.ip_address:
        return config.ip_address
    host, port = coordinator_address(url)
    return local_address(await resolve(host, port), port)


def coordinator_address(url: str) -> tuple[str, int]:
    """The host and port of a URL."""
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host, IPv4 first (Ollama listens on IPv4 by default); none if unknown."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    addresses = {str(sockaddr[0]): family for family, _, _, _, sockaddr in found}
    return sorted(addresses, key=lambda address: addresses[address] != socket.AF_INET)


async def accepts(host: str, port: int) -> bool:
    """Whether a TCP connection to a port of this machine is accepted."""
    try:
        async with asyncio.timeout(ACCEPT_SECONDS):
            _, writer = await asyncio.open_connection(host, port)
    except OSError:  # a TimeoutError is one
        return False
    writer.close()
    return True
