"""What the system says of a socket."""

import socket
from asyncio.trsock import TransportSocket

KEEP_ALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPALIVE": 15, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 9}


def asked_every_15_seconds(sock: socket.socket | TransportSocket) -> bool:
    """Whether TCP probes a silent connection as Ollama's does."""
    options = {getattr(socket, name): n for name, n in KEEP_ALIVE.items() if hasattr(socket, name)}
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)) and all(
        sock.getsockopt(socket.IPPROTO_TCP, option) == value for option, value in options.items()
    )
