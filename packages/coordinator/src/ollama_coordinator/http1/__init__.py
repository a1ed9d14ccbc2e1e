"""HTTP/1 on llhttp (httptools), as a lighter drop-in for the part of Hypercorn that does it.

Everything else stays Hypercorn's: the sockets, the lifespan, the order in which it all ends. A door
of ours stands before both: it counts the connections, and ends those that keep others waiting.
Spoken are HTTP/1.1 and 1.0; an offer to upgrade to HTTP/2 or to a WebSocket is passed over, as
Ollama's own server does.
"""

from .door import Door
from .serving import serve

__all__ = ["Door", "serve"]
