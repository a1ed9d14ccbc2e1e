"""Links: the connections that agents open, for those whose ports the coordinator does not reach."""

from .connection import LinkConnection
from .connector import LinkConnector
from .links import PING_SECONDS, SILENT_PINGS, Link, LinkDown, Links

__all__ = [
    "PING_SECONDS",
    "SILENT_PINGS",
    "Link",
    "LinkConnection",
    "LinkConnector",
    "LinkDown",
    "Links",
]
