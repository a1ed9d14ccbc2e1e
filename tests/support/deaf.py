"""Clients that stay connected and do not do their part."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from h2.config import H2Configuration
from h2.connection import H2Connection

from .deadline import DEADLINE_SECONDS
from .ollama import StandIn
from .ollama.script import Script


def flooding(pieces: int = 4_000) -> StandIn:
    """A stand-in whose every answer has so many pieces of 50 kB.

    No buffer between an agent and a client holds 4,000 of them.
    """
    script = Script(content=["x" * 50_000] * pieces)
    return StandIn(answer=lambda request: script)


def post(path: str, body: bytes, length: int | None = None) -> bytes:
    """A request; `length` is what it announces where that is not what it has."""
    announced = len(body) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {announced}\r\n\r\n"
    return head.encode() + body


def chat(**more: Any) -> bytes:
    """A request for a streamed chat."""
    body = {"model": "llama3.2", "messages": [{"role": "user", "content": "hello"}], **more}
    return post("/api/chat", json.dumps(body).encode())


def chat_on_http_2() -> bytes:
    """The same on HTTP/2, from a client that never opens its window again."""
    body = json.dumps(
        {"model": "llama3.2", "messages": [{"role": "user", "content": "hello"}]}
    ).encode()
    client = H2Connection(config=H2Configuration(client_side=True))
    client.initiate_connection()
    head = {":method": "POST", ":path": "/api/chat", ":authority": "x", ":scheme": "http"}
    client.send_headers(1, [*head.items(), ("content-length", str(len(body)))])
    client.send_data(1, body, end_stream=True)
    return client.data_to_send()


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


async def begins(sock: socket.socket) -> None:
    """Wait for the first bytes of an answer, and read no more of it."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert await asyncio.get_running_loop().sock_recv(sock, 12) == b"HTTP/1.1 200"


async def everything(sock: socket.socket) -> bytes:
    """What comes until the other side ends the connection, also where it ends it abruptly."""
    got = bytearray()
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(DEADLINE_SECONDS):
        try:
            while part := await loop.sock_recv(sock, 1024 * 1024):
                got += part
        except ConnectionError:
            pass
    return bytes(got)


async def reads(sock: socket.socket, size: int) -> None:
    """Read so many bytes."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(DEADLINE_SECONDS):
        while size > 0:
            part = await loop.sock_recv(sock, min(size, 1024 * 1024))
            assert part
            size -= len(part)
