"""Who this coordinator is, and how agents without a URL find it: by multicast DNS (RFC 6762, 6763).

zeroconf is the extra `discovery`: without it nothing is announced.
"""

import asyncio
import contextlib
import logging
import secrets
import socket

from ollama_coordinator_common.network import is_loopback, is_private, parse_address
from ollama_coordinator_common.protocol import SERVICE

from .db import Store

log = logging.getLogger(__name__)

DOCUMENT = "identity"
"""Under which name the id is in the database."""


GOODBYE_SECONDS = 1.0
"""For telling the network that it stops."""


class Identity:
    """The coordinator's `id`: random, made at the first start, and kept in the database."""

    def __init__(self, store: Store) -> None:
        self.id = secrets.token_hex(16)
        self._store = store

    async def restore(self) -> None:
        """Take the id over from the database, or keep the new one there.

        Raises:
            DatabaseError: the database cannot be read.
        """
        kept = await self._store.document(DOCUMENT)
        if kept:
            self.id = kept.decode().strip('"')
        else:
            self._store.note_document(DOCUMENT, f'"{self.id}"'.encode())


async def announce(identity: Identity, host: str, port: int, scheme: str) -> None:
    """Be found, until cancelled, at the addresses of private networks among those of `host`.

    What keeps it from that is logged, and no reason not to serve.
    """
    try:
        import ifaddr
        from zeroconf import Error, IPVersion
        from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf
    except ImportError:
        return
    own = [str(ip.ip) for card in ifaddr.get_adapters() for ip in card.ips if ip.is_IPv4]
    addresses = [text for text in own if _is_served(text, host)]
    if not addresses:
        return
    info = AsyncServiceInfo(
        SERVICE,
        f"{identity.id}.{SERVICE}",
        port=port,
        properties={"id": identity.id, "scheme": scheme},
        server=f"{identity.id}.local.",
        addresses=[socket.inet_aton(text) for text in addresses],
    )
    try:
        sockets = AsyncZeroconf(interfaces=addresses, ip_version=IPVersion.V4Only)
    except (OSError, Error) as exc:
        log.warning("not announced on the network", extra={"reason": str(exc)})
        return
    try:
        # Nobody else has this name: it need not be asked for first.
        await sockets.async_register_service(info, cooperating_responders=True)
        log.info("announced on the network", extra={"addresses": ",".join(addresses)})
        await asyncio.Event().wait()
    finally:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GOODBYE_SECONDS):
                await sockets.async_unregister_all_services()
        await sockets.async_close()


def _is_served(text: str, host: str) -> bool:
    """Whether a server that binds `host` is reached at an address, from a private network."""
    address, bound = parse_address(text), parse_address(host or "0.0.0.0")
    if address is None or is_loopback(text) or not is_private(address):
        return False
    return bound is None or bound.is_unspecified or bound == address
