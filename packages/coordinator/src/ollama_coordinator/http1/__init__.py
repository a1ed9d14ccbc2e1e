"""HTTP/1 on llhttp (httptools), in place of the part of Hypercorn that does it, with less CPU.

Everything else stays Hypercorn's: the sockets, the lifespan, the order in which it all ends. The
limits on connections hold for both implementations. Served are HTTP/1.1 and 1.0; an offer to
upgrade to HTTP/2 or to a WebSocket is ignored, as Ollama's own server does.
"""

from .exchange import EXCHANGE, Exchange
from .hypercorn_hook import serve
from .limits import BACKLOG, CLIENT_CONNECTION, ClientConnection, ConnectionLimits, capacity

__all__ = [
    "BACKLOG",
    "CLIENT_CONNECTION",
    "EXCHANGE",
    "ClientConnection",
    "ConnectionLimits",
    "Exchange",
    "capacity",
    "serve",
]
