"""How the coordinator reaches this machine's Ollama: at which address, and whether by the relay."""

import asyncio
import logging

from msgspec import Struct

from ollama_coordinator_common.settings import AgentConfig

from .network import accepts, coordinator_address, is_loopback, local_address, resolve
from .pacing import Reminder, forever
from .relay import Relay
from .state import State

log = logging.getLogger(__name__)

RESOLVE_SECONDS = 3.0


class Offer(Struct, frozen=True):
    """What the coordinator is told to connect to."""

    ip_address: str
    relay_port: int | None = None


async def needs_relay(config: AgentConfig, address: str, ollama_host: str) -> bool | None:
    """Whether Ollama takes connections on loopback alone; `None` while it takes none at all."""
    if config.relay != "auto":
        return config.relay == "always"
    if is_loopback(address):
        return False
    if not await accepts(ollama_host, config.ollama_port):
        return None
    return not await accepts(address, config.ollama_port)


class Reach:
    """Keeps the offer true; `changed` is set when it changes."""

    def __init__(
        self,
        config: AgentConfig,
        relay: Relay,
        state: State,
        *,
        ollama_host: str,
        changed: asyncio.Event,
        interval_seconds: float = 30.0,
    ) -> None:
        self.offer: Offer | None = None
        self._config = config
        self._relay = relay
        self._state = state
        self._ollama_host = ollama_host
        self._changed = changed
        self._interval_seconds = interval_seconds
        self._refreshing = asyncio.Lock()
        self._relay_is_open = asyncio.Event()
        self._reminder = Reminder()
        self._coordinator = coordinator_address(config.coordinator_url)

    async def run(self) -> None:
        """Look around every now and then, and run the relay once it is needed, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(forever(self._look_again))
            await self._relay_is_open.wait()
            tasks.create_task(self._relay.run())

    async def refresh(self) -> Offer | None:
        """Look around now; `None` while the coordinator's host has no address."""
        async with self._refreshing:
            offer = await self._look()
        if offer is not None and offer != self.offer:
            self.offer = offer
            self._changed.set()
        return self.offer

    async def _look_again(self) -> float:
        await self.refresh()
        return self._interval_seconds

    async def _look(self) -> Offer | None:
        addresses = await self._coordinator_addresses()
        if addresses:
            self._relay.admit_coordinator(addresses)
        address = self._config.ip_address or local_address(addresses, self._coordinator[1])
        if address is None:
            return None
        return Offer(address, await self._relay_port(address))

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
        needed = await needs_relay(self._config, address, self._ollama_host)
        return bool(self.offer and self.offer.relay_port) if needed is None else needed

    def _open_relay(self) -> None:
        port = self._config.relay_port
        try:
            opened = self._relay.listen(port, fallback=self._state.memory.relay_port)
        except OSError as exc:
            text = f"the relay's port cannot be opened ({exc}); set AGENT_RELAY_PORT to a free one"
            if self._reminder.due(text, asyncio.get_running_loop().time()):
                log.error(text)
            return
        self._state.remember(relay_port=opened)
        self._relay_is_open.set()
        log.info("relaying the coordinator to Ollama", extra={"port": opened})
