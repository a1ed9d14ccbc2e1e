"""Which addresses this machine and the coordinator have for each other."""

import asyncio
import socket
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from urllib.parse import urlsplit

Address = IPv4Address | IPv6Address


def coordinator_address(url: str) -> tuple[str, int]:
    """The host and port that a URL leads to."""
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


def local_address(remote: Sequence[str], port: int) -> str | None:
    """The address that this machine has towards the first of `remote` it has a route to.

    A UDP socket is connected, which asks the routing table and sends nothing.
    """
    for address in remote:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((address, port))
                return str(probe.getsockname()[0])
        except OSError:
            continue
    return None


async def accepts(host: str, port: int, timeout_seconds: float = 1.0) -> bool:
    """Whether a TCP connection to a port of this machine is accepted."""
    try:
        async with asyncio.timeout(timeout_seconds):
            _, writer = await asyncio.open_connection(host, port)
    except OSError:  # a TimeoutError is one
        return False
    writer.close()
    return True


def parse_address(text: str) -> Address | None:
    """An address as written in a socket name: without its zone, IPv4 where it is IPv4 inside."""
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def reachable(bound: str) -> str:
    """The host under which a server that binds `bound` is reached from its own machine."""
    address = parse_address(bound)
    return "127.0.0.1" if address is None or address.is_unspecified else bound


def netloc(host: str, port: int) -> str:
    """Host and port as URLs and OLLAMA_HOST have them."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(text: str) -> bool:
    """Whether a host, as written, is this machine and nobody else."""
    address = parse_address(text)
    return text == "localhost" if address is None else address.is_loopback
