"""Which coordinator this machine speaks to: one of those that it was given, or the one it finds.

Without a URL: http://localhost:8080; then where its coordinator was last; then multicast DNS (RFC
6762), which needs zeroconf, the extra `discovery`. A first coordinator is taken if exactly one
answers on a private network. From then on only that one is followed, which its id tells.
"""

import asyncio
import logging

from ollama_coordinator_common.network import (
    cause_of,
    is_loopback,
    is_private,
    netloc,
    parse_address,
)
from ollama_coordinator_common.protocol import SERVICE
from ollama_coordinator_common.settings import AgentConfig

from .client import CoordinatorClient, CoordinatorError
from .reach import Reach, coordinator_address
from .state import StateFolder

log = logging.getLogger(__name__)

DEFAULT = "http://localhost:8080"
"""A coordinator on this machine, where nothing else is said."""

LOOK_SECONDS = 3.0
"""How long coordinators are waited for; they answer within a second (RFC 6762, section 6)."""

MOST_FOUND = 16
"""Answers that are looked at: more are a network's trouble, or somebody's game."""


class NoCoordinator(CoordinatorError):
    """None is to be found; says what to do."""


class Coordinators:
    """Tells the client and the reach to which coordinator they belong.

    `choose` before a registration; `failed` once the chosen one did not answer.
    """

    def __init__(
        self, config: AgentConfig, client: CoordinatorClient, reach: Reach, state: StateFolder
    ) -> None:
        self._urls = config.coordinator_urls
        self._client = client
        self._reach = reach
        self._state = state
        self._at = 0
        self._is_lost = True

    @property
    def has_others(self) -> bool:
        """Whether there may be another one, or the same one elsewhere."""
        return len(self._urls) != 1

    def failed(self) -> bool:
        """The chosen one does not answer; whether another one is tried at once."""
        self._is_lost = True
        if not self._urls:
            return False
        self._at = (self._at + 1) % len(self._urls)
        return self._at != 0

    async def choose(self) -> None:
        """Turn to the coordinator that is to be tried now.

        Raises:
            NoCoordinator: none was given, and none is found.
        """
        if not self._is_lost:
            return
        if self._urls:
            self._follow(self._urls[self._at])
        else:
            identity, url = await self._find()
            log.info("found the coordinator", extra={"url": url, "id": identity})
            known = identity == self._state.last_run.coordinator
            self._follow(url, gives_token=known or _is_local(url))
            self._state.remember(coordinator=identity, coordinator_url=url)
        self._is_lost = False

    def _follow(self, url: str, *, gives_token: bool = True) -> None:
        self._client.follow(url, gives_token=gives_token)
        self._reach.follow(url)

    async def _find(self) -> tuple[str, str]:
        """The id and the URL of the coordinator of this machine, or of the only one there is."""
        known, last = self._state.last_run.coordinator, self._state.last_run.coordinator_url
        identity = await self._client.identity_at(DEFAULT)
        # A coordinator on this machine may be set up anew; one elsewhere is not replaced by it.
        if identity is not None and (known in (None, identity) or _is_local(last or "")):
            return identity, DEFAULT
        if known and last and await self._client.identity_at(last) == known:
            return known, last
        found = await self._on_the_network(known)
        if known is not None:
            if known in found:
                return known, found[known]
            raise NoCoordinator(
                f"the coordinator of this machine, last at {last}, is not there and not found on"
                " the network; another one is not followed: set COORDINATOR_URL to have it followed"
            )
        if len(found) == 1:
            return next(iter(found.items()))
        if found:
            urls = ", ".join(sorted(found.values()))
            raise NoCoordinator(
                f"several coordinators answer on the network ({urls}): set COORDINATOR_URL"
            )
        raise NoCoordinator(
            f"no coordinator answers at {DEFAULT}, and none on the network: set COORDINATOR_URL to"
            " where `ollama-coordinator serve` listens" + ("" if can_look() else f"; {INSTALL}")
        )

    async def _on_the_network(self, known: str | None) -> dict[str, str]:
        """The URLs of the coordinators that answer on private networks, by their ids."""
        found: dict[str, str] = {}
        for url in (await announced_urls(LOOK_SECONDS))[:MOST_FOUND]:
            identity = await self._client.identity_at(url)
            if identity and known in (None, identity):
                found.setdefault(identity, url)
        return found


INSTALL = "to look for one on the network takes zeroconf: `pip install zeroconf` beside the agent"


def can_look() -> bool:
    """Whether zeroconf is installed."""
    try:
        import zeroconf  # noqa: F401
    except ImportError:
        return False
    return True


async def announced_urls(seconds: float) -> list[str]:
    """The URLs, on private networks, that coordinators announce; in the order of their texts."""
    try:
        from zeroconf import Error, IPVersion
        from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf
    except ImportError:
        return []
    names: set[str] = set()

    def heard(**change: object) -> None:
        names.add(str(change["name"]))

    urls: set[str] = set()
    try:
        async with AsyncZeroconf(ip_version=IPVersion.V4Only) as sockets:
            browser = AsyncServiceBrowser(sockets.zeroconf, SERVICE, handlers=[heard])
            await asyncio.sleep(seconds)
            await browser.async_cancel()
            for name in sorted(names)[:MOST_FOUND]:
                info = AsyncServiceInfo(SERVICE, name)
                await info.async_request(sockets.zeroconf, seconds * 1000)
                scheme = "https" if (info.properties or {}).get(b"scheme") == b"https" else "http"
                for text in info.parsed_addresses():
                    address = parse_address(text)
                    if info.port and address is not None and is_private(address):
                        urls.add(f"{scheme}://{netloc(text, info.port)}")
    except (OSError, Error) as exc:
        log.debug("multicast DNS is not possible", extra={"reason": cause_of(exc)})
    return sorted(urls)


def _is_local(url: str) -> bool:
    return is_loopback(coordinator_address(url)[0])
