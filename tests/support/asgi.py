"""A small ASGI application that shows what a server does, and a client that sends any bytes."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from starlette.types import Message, Receive, Scope, Send

from support.deadline import DEADLINE_SECONDS


class Shows:
    """Answers by path; `requests` are those whose body it has read, `events` what happened."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, bytes]] = []
        self.departed = asyncio.Event()
        self.release = asyncio.Event()
        self.sent = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        name = scope["path"].strip("/") or "echo"
        await getattr(self, f"_{name.replace('-', '_')}")(scope, receive, send)

    async def _echo(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await self._body(scope, receive)
        if body is None:
            return
        told = {"method": scope["method"], "query": scope["query_string"].decode()}
        told |= {"version": scope["http_version"], "body": body.decode("latin-1")}
        told |= {"headers": [[n.decode(), v.decode("latin-1")] for n, v in scope["headers"]]}
        await reply(send, json.dumps(told).encode())

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.departed.set()
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.requests.append((scope["method"], scope["path"], bytes(body)))
        return bytes(body)

    async def _chunks(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._body(scope, receive)
        await send(start(200))
        for part in (b"one ", b"two ", b"three"):
            await send(piece(part))
        await send(piece(b"", more=False))

    async def _none(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._body(scope, receive)
        await send(start(204))
        await send(piece(b"", more=False))

    async def _unchanged(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._body(scope, receive)
        await send(start(304, (b"etag", b'"1"')))
        await send(piece(b"", more=False))

    async def _wait(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Nothing but the departure."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.departed.set()

    async def _slow(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Head and first piece, and the rest when released."""
        await self._body(scope, receive)
        await send(start(200))
        await send(piece(b"first "))
        await self.release.wait()
        await send(piece(b"last", more=False))

    async def _late(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The head, and the body when released."""
        await send(start(200))
        await self.release.wait()
        await send(piece(b"late", more=False))

    async def _flood(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A hundred mebibytes."""
        await send(start(200))
        for _ in range(100):
            await send(piece(bytes(1024 * 1024)))
            self.sent += 1024 * 1024
        await send(piece(b"", more=False))

    async def _deaf(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Does not read the body until released."""
        await self.release.wait()
        body = await self._body(scope, receive)
        await reply(send, str(len(body or b"")).encode())

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Does not read the body at all."""
        await reply(send, b"too large", 413)

    async def _fail(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise LookupError("on purpose")

    async def _break(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._body(scope, receive)
        await send(start(200))
        await send(piece(b"begun"))
        raise LookupError("on purpose")

    async def _short(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._body(scope, receive)
        await send(start(200, (b"content-length", b"10")))
        await send(piece(b"short", more=False))

    async def _inject(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send(start(200, (b"x", b"a\r\nset-cookie: b")))
        await send(piece(b"", more=False))


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


def start(status: int, *headers: tuple[bytes, bytes]) -> Message:
    return {"type": "http.response.start", "status": status, "headers": list(headers)}


def piece(body: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


async def reply(send: Send, body: bytes, status: int = 200) -> None:
    await send(start(status, (b"content-length", str(len(body)).encode())))
    await send(piece(body, more=False))


class Answer:
    """One answer as it came over the wire."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """One raw connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, *data: bytes) -> None:
        self.writer.writelines(data)

    async def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers of the next answer."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = (line.partition(": ") for line in lines[1:-2])
        return int(lines[0].split(" ")[1]), {name.lower(): value for name, _, value in pairs}

    async def answer(self, *, bodiless: bool = False) -> Answer:
        """The next answer, as a strict client reads it."""
        status, headers = await self.head()
        async with asyncio.timeout(DEADLINE_SECONDS):
            if bodiless:
                body = b""
            elif headers.get("transfer-encoding") == "chunked":
                body = await self._chunked()
            elif "content-length" in headers:
                body = await self.reader.readexactly(int(headers["content-length"]))
            else:
                body = await self.reader.read()
        return Answer(status, headers, body)

    async def _chunked(self) -> bytes:
        parts = []
        while size := int(await self.reader.readline(), 16):
            parts.append(await self.reader.readexactly(size))
            assert await self.reader.readexactly(2) == b"\r\n"
        assert await self.reader.readexactly(2) == b"\r\n"
        return b"".join(parts)

    async def ends(self) -> bytes:
        """What still comes until the server closes the connection."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""


@asynccontextmanager
async def connection(url: str, limit: int = 2**16) -> AsyncIterator[Client]:
    """A raw connection to a server."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=limit)
    try:
        yield Client(reader, writer)
    finally:
        writer.transport.abort()
