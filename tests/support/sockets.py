"""What the system says of a socket, and its end."""

import asyncio
import contextlib
import socket
import struct
from asyncio.trsock import TransportSocket

KEEP_ALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPALIVE": 15, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 9}


def asked_every_15_seconds(sock: socket.socket | TransportSocket) -> bool:
    """Whether TCP probes a silent connection as Ollama's does."""
    options = {getattr(socket, name): n for name, n in KEEP_ALIVE.items() if hasattr(socket, name)}
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)) and all(
        sock.getsockopt(socket.IPPROTO_TCP, option) == value for option, value in options.items()
    )


def reset(writer: asyncio.StreamWriter) -> None:
    """Close with a reset."""
    sock = writer.get_extra_info("socket")
    if sock is None:  # it is closed already, on uvloop
        return
    with contextlib.suppress(OSError, ValueError):  # the same on asyncio; while it closes on uvloop
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
