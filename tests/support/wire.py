"""A TCP connection between two programs that a test can cut or deafen."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

from .sockets import reset


class Wire:
    """Passes connections on to a port; `url` is where it listens."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._target = (parts.hostname or "", parts.port or 80)
        self._open: set[asyncio.StreamWriter] = set()
        self._passes = asyncio.Event()
        self._passes.set()
        self.url = ""
        self.connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        await self._passes.wait()
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
        except OSError:
            reset(writer)
            return
        ends = {writer, far_writer}
        self._open |= ends
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._pump(reader, far_writer))
                tasks.create_task(self._pump(far_reader, writer))
        except* OSError:
            await self._passes.wait()
        finally:
            self._open -= ends
            for end in ends:
                reset(end)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            await self._passes.wait()
            sink.write(data)
            await sink.drain()
        await self._passes.wait()
        raise ConnectionResetError

    def cut(self) -> None:
        """Reset every connection that is open."""
        for end in list(self._open):
            reset(end)

    def deafen(self) -> None:
        """Pass nothing on any more, neither bytes nor ends."""
        self._passes.clear()

    def heal(self) -> None:
        """Pass everything on again."""
        self._passes.set()


@contextlib.asynccontextmanager
async def wired(url: str) -> AsyncIterator[Wire]:
    """A wire to the server at a URL."""
    wire = Wire(url)
    server = await asyncio.start_server(wire.serve, "127.0.0.1", 0)
    sock: socket.socket = server.sockets[0]
    wire.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    try:
        yield wire
    finally:
        wire.heal()
        server.close()
        wire.cut()
