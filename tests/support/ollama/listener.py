"""The listening socket and what can be wrong with it, and how connections are cut."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from typing import Literal, cast

Mode = Literal["open", "closed", "hole"]

BACKLOG = 1024
# With a backlog of 0 the kernel completes one handshake; the second is there to be sure.
FILLERS = 2


def sever(
    transport: asyncio.BaseTransport | None, how: Literal["rst", "fin"], *, flush: bool = True
) -> None:
    """Cuts a connection: `fin`, after what was written if `flush`; `rst` on the spot."""
    if transport is None:
        return
    transport = cast(asyncio.Transport, transport)
    if how == "fin":
        (transport.close if flush else transport.abort)()
        return
    sock = transport.get_extra_info("socket")
    with contextlib.suppress(OSError):  # it may have been closed under us
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


class ResetOnAccept(asyncio.Protocol):
    """A connection that is reset as soon as it is there."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        sever(transport, "rst")


class Listener:
    """Owns the port: open, closed (connects are refused), or a hole (connects hang)."""

    def __init__(self, host: str, port: int, factory: Callable[[], asyncio.Protocol]) -> None:
        self.host = host
        self.port = port
        self._factory = factory
        self._mode: Mode = "closed"
        self._server: asyncio.Server | None = None
        self._opening: asyncio.Task[None] | None = None
        self._sockets: list[socket.socket] = []

    async def open(self) -> None:
        self.apply("open")
        if self._opening is not None:
            await self._opening

    def apply(self, mode: Mode) -> None:
        """Takes effect at once: a connect made after this call meets the new state."""
        if mode == self._mode:
            return
        self._shut()
        self._mode = mode
        if mode == "open":
            sock = self._listen(BACKLOG)
            self._opening = asyncio.get_running_loop().create_task(self._serve(sock))
        elif mode == "hole":
            self._dig()

    async def close(self) -> None:
        self.apply("closed")
        if self._opening is not None:
            await asyncio.gather(self._opening, return_exceptions=True)
            self._opening = None

    async def _serve(self, sock: socket.socket) -> None:
        """Accepts from a socket that already listens, unless the state changed meanwhile."""
        if sock not in self._sockets:
            return
        loop = asyncio.get_running_loop()
        server = await loop.create_server(self._factory, sock=sock, backlog=BACKLOG)
        if sock in self._sockets:
            self._server = server
        else:
            server.close()

    def _listen(self, backlog: int) -> socket.socket:
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setblocking(False)
            sock.bind((self.host, self.port))
            sock.listen(backlog)
        except OSError:
            sock.close()
            raise
        self.port = sock.getsockname()[1]
        self._sockets.append(sock)
        return sock

    def _dig(self) -> None:
        """A full backlog: the kernel drops further SYNs, so connects wait for an answer."""
        self._listen(0)
        for _ in range(FILLERS):
            filler = socket.socket()
            filler.setblocking(False)
            self._sockets.append(filler)
            with contextlib.suppress(BlockingIOError):
                filler.connect((self.host, self.port))

    def _shut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for sock in self._sockets:
            sock.close()
        self._sockets.clear()
