"""Links: the connections that agents open, for those whose ports the coordinator does not reach."""

from .connection import LinkConnection
from .connector import KeyAt, LinkConnector, no_key, relay_key_here
from .links import PING_SECONDS, SILENT_PINGS, Link, LinkDown, Links

__all__ = [
    "PING_SECONDS",
    "SILENT_PINGS",
    "KeyAt",
    "Link",
    "LinkConnection",
    "LinkConnector",
    "LinkDown",
    "Links",
    "no_key",
    "relay_key_here",
]
