"""HTTP/1 on llhttp (httptools), as a lighter drop-in for the part of Hypercorn that does it.

Everything else stays Hypercorn's: the sockets, the lifespan, the order in which it all ends.
Spoken are HTTP/1.1 and 1.0; an offer to upgrade to HTTP/2 or to a WebSocket is passed over, as
Ollama's own server does.
"""

from .serving import CHOICES, serve

__all__ = ["CHOICES", "serve"]
