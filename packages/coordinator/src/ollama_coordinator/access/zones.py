"""Where a request comes from: the zone of its client's address, behind trusted proxies too.

A forwarding header makes a request public unless its peer is a trusted proxy. Then the last hop
that is no trusted proxy is the client. Headers that disagree count as the least trusted of them:
a proxy that writes one of them may pass the others as its client sent them.
"""

import ipaddress
import re
from collections.abc import Iterable, Mapping
from enum import IntEnum
from functools import lru_cache

from msgspec import Struct

from ollama_coordinator_common.error import ConfigError
from ollama_coordinator_common.network import Address, is_private, parse_address

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Hops = list[bytes]

UNKNOWN_CLIENT = "unknown"
"""The client behind a proxy that does not say who it is."""


class Zone(IntEnum):
    """How far away a client is; the greater, the less it is trusted."""

    LOOPBACK = 0
    PRIVATE = 1
    PUBLIC = 2


CHAINS = (b"x-forwarded-for", b"forwarded")
"""Headers with every hop, oldest first."""

SINGLE_HOPS = (
    *(b"x-real-ip", b"x-client-ip", b"x-cluster-client-ip", b"true-client-ip"),
    *(b"cf-connecting-ip", b"cf-connecting-ipv6", b"fastly-client-ip", b"fly-client-ip"),
    *(b"x-envoy-external-address", b"x-original-forwarded-for", b"x-azure-clientip"),
)
"""Headers with the client's address alone."""

FORWARDING = frozenset(
    {
        *CHAINS,
        *SINGLE_HOPS,
        *(b"x-forwarded", b"x-forwarded-host", b"x-forwarded-proto", b"x-forwarded-port"),
        *(b"x-forwarded-server", b"x-forwarded-scheme", b"x-forwarded-ssl", b"forwarded-for"),
        *(b"x-forwarded-prefix", b"x-forwarded-uri", b"x-forwarded-method", b"x-forwarded-by"),
        *(b"via", b"cf-ray", b"cf-visitor", b"cdn-loop", b"x-original-host", b"x-arr-log-id"),
    }
)
"""The headers by which a proxy says that it is one."""

_FOR = re.compile(rb'(?:^|[;,])\s*for\s*=\s*("[^"]*"|[^;,\s]*)', re.IGNORECASE)


def zone_of(address: Address) -> Zone:
    """The zone of an address that is not IPv4 inside IPv6."""
    if address.is_loopback:
        return Zone.LOOPBACK
    return Zone.PRIVATE if is_private(address) else Zone.PUBLIC


def _is_in(address: Address, networks: Iterable[Network]) -> bool:
    return any(address in network for network in networks if network.version == address.version)


def networks(variable: str, texts: Iterable[str]) -> tuple[Network, ...]:
    """The networks that a setting lists; an address is a network of one.

    Raises:
        ConfigError: one of them is none.
    """
    found = []
    for text in texts:
        try:
            found.append(ipaddress.ip_network(text, strict=False))
        except ValueError as exc:
            expected = "give addresses and networks such as 127.0.0.1,10.1.0.0/16, split by commas"
            raise ConfigError(variable, text, expected) from exc
    return tuple(found)


class ClientAddress(Struct, frozen=True):
    """A client's address, and its zone.

    `is_trusted`: it is in a trusted network. `by_proxy`: a trusted proxy passed it on. `forwarded`:
    a proxy passed it on that nobody trusts, and that may be its address.
    """

    address: str
    zone: Zone
    is_trusted: bool = False
    by_proxy: bool = False
    forwarded: bool = False


class Zones:
    """Finds the client of each request.

    Raises:
        ConfigError: one of the settings' texts is no network.
    """

    def __init__(self, trusted_proxies: Iterable[str], trusted_networks: Iterable[str]) -> None:
        self._proxies = networks("COORDINATOR_TRUSTED_PROXIES", trusted_proxies)
        self._networks = networks("COORDINATOR_TRUSTED_NETWORKS", trusted_networks)
        # A client keeps its address over many requests; parsing one takes some microseconds.
        self.direct = lru_cache(maxsize=4096)(self._direct)

    def _direct(self, peer: str) -> ClientAddress:
        """The client of what a socket's peer sends itself."""
        address = parse_address(peer)
        if address is None:
            return ClientAddress(UNKNOWN_CLIENT, Zone.PUBLIC)
        return ClientAddress(
            str(address),
            zone_of(address),
            is_trusted=_is_in(address, self._networks),
            by_proxy=_is_in(address, self._proxies),
        )

    def forwarded(self, peer: str, headers: Iterable[tuple[bytes, bytes]]) -> ClientAddress:
        """The client of a request that has forwarding headers."""
        direct = self.direct(peer)
        if not direct.by_proxy:
            return ClientAddress(direct.address, Zone.PUBLIC, forwarded=True)
        found: list[ClientAddress] = [
            self._client(_hops(name, value)) for name, value in _joined(headers).items()
        ]
        if not found:  # such as `Via` alone, which names no client
            return ClientAddress(UNKNOWN_CLIENT, Zone.PUBLIC, by_proxy=True)
        return max(found, key=lambda origin: (origin.zone, not origin.is_trusted))

    def _client(self, hops: Hops) -> ClientAddress:
        """The last hop that is no trusted proxy; the first one where all are."""
        origin = ClientAddress(UNKNOWN_CLIENT, Zone.PUBLIC, by_proxy=True)
        for hop in reversed(hops):
            address = _address_of(hop)
            if address is None:
                return ClientAddress(UNKNOWN_CLIENT, Zone.PUBLIC, by_proxy=True)
            trusted = _is_in(address, self._networks)
            origin = ClientAddress(
                str(address), zone_of(address), is_trusted=trusted, by_proxy=True
            )
            if not _is_in(address, self._proxies):
                break
        return origin


def _joined(headers: Iterable[tuple[bytes, bytes]]) -> Mapping[bytes, bytes]:
    """The headers that name clients, each with its lines as one list."""
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        if name in CHAINS or name in SINGLE_HOPS:
            found[name] = b",".join((found[name], value)) if name in found else value
    return found


def _hops(name: bytes, value: bytes) -> Hops:
    if name == b"forwarded":
        elements = value.split(b",")
        return [hop.strip(b'"') for part in elements for hop in _FOR.findall(part) or [b""]]
    hops = [hop.strip() for hop in value.split(b",")]
    return hops if name in CHAINS else hops[-1:]


def _address_of(hop: bytes) -> Address | None:
    """The address of a hop as headers write it, perhaps with its port; `None` where it hides."""
    text = hop.decode("latin-1").strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    return parse_address(text)
