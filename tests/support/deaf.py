"""Clients that stay connected and do not do their part."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from .ollama import StandIn
from .ollama.script import Script

FLOOD = Script(content=["x" * 50_000] * 4_000)
"""An answer that no buffer between an agent and a client holds."""


def flooding() -> StandIn:
    """A stand-in whose every answer has 200 MB."""
    return StandIn(answer=lambda request: FLOOD)


def post(path: str, body: bytes, length: int | None = None) -> bytes:
    """A request; `length` is what it announces where that is not what it has."""
    announced = len(body) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {announced}\r\n\r\n"
    return head.encode() + body


def chat(**more: Any) -> bytes:
    """A request for a streamed chat."""
    body = {"model": "llama3.2", "messages": [{"role": "user", "content": "hello"}], **more}
    return post("/api/chat", json.dumps(body).encode())


@asynccontextmanager
async def connected(
    url: str, request: bytes = b"", *, window: int = 65536
) -> AsyncIterator[socket.socket]:
    """A connection that has sent a request and reads nothing unless the test does."""
    parts = urlsplit(url)
    loop = asyncio.get_running_loop()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        sock.setblocking(False)
        await loop.sock_connect(sock, (parts.hostname, parts.port))
        await loop.sock_sendall(sock, request)
        yield sock


async def begins(sock: socket.socket, seconds: float = 10.0) -> None:
    """Wait for the first bytes of an answer, and read no more of it."""
    async with asyncio.timeout(seconds):
        assert await asyncio.get_running_loop().sock_recv(sock, 12) == b"HTTP/1.1 200"


async def everything(sock: socket.socket, seconds: float = 10.0) -> bytes:
    """What comes until the other side ends the connection, also where it ends it abruptly."""
    got = bytearray()
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(seconds):
        try:
            while part := await loop.sock_recv(sock, 1024 * 1024):
                got += part
        except ConnectionError:
            pass
    return bytes(got)


async def reads(sock: socket.socket, size: int, seconds: float = 20.0) -> None:
    """Read so many bytes."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(seconds):
        while size > 0:
            part = await loop.sock_recv(sock, min(size, 1024 * 1024))
            assert part
            size -= len(part)
