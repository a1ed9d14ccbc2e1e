"""After hostile input nothing of it is left: no task, connection, file, lease or memory."""

import asyncio
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import pytest

from support import deaf
from support.asgi import connection
from support.coordinator import Running, running
from support.ollama import StandIn
from support.rest import leaves_nothing

MEBIBYTE = 1024 * 1024
KEY = "oc_" + "A" * 43

Attack = Callable[[Running], Awaitable[None]]


async def raw(coordinator: Running, *parts: bytes, reads: bool = True) -> None:
    """Send bytes, read what comes within a moment if anything, and go away."""
    async with connection(coordinator.url) as client:
        try:
            for part in parts:
                client.send(part)
                await client.writer.drain()
            if reads:
                async with asyncio.timeout(0.5):
                    await client.reader.read(65536)
        except (OSError, TimeoutError):
            pass


async def ask(
    coordinator: Running, method: str, path: str, body: Any = None, **headers: str
) -> int:
    """The status of an answer that is read to its end; 0: the connection was cut."""
    data = io.BytesIO(body if isinstance(body, bytes) else json.dumps(body).encode())
    try:
        async with coordinator.session.request(
            method, coordinator.url + path, data=data, headers=headers, allow_redirects=False
        ) as answer:
            await answer.read()
            return answer.status
    except aiohttp.ClientError:
        return 0


# ── strangers ─────────────────────────────────────────────────────────────────────────────────


async def heads(coordinator: Running) -> None:
    """Heads without end, with too much in them, or of nonsense."""
    start = b"GET /api/tags HTTP/1.1\r\nHost: x\r\n"
    for part in (
        start + b"X: y\r\n" * 10_000 + b"\r\n",
        start + b"X: " + b"y" * MEBIBYTE,
        b"GET /" + b"a" * MEBIBYTE,
        b"\x16\x03\x01" + bytes(100),
        start + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        start,
        (start + b"\r\n") * 200,
    ):
        await raw(coordinator, part)


async def bodies(coordinator: Running) -> None:
    """Bodies that are refused, or of which the end never comes."""
    large = b'{"model":"zz","messages":[' + b"{}," * MEBIBYTE + b"{}]}"
    assert await ask(coordinator, "POST", "/api/chat", large) == 413
    form = b'--B\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n' * 20_000
    kind = "multipart/form-data; boundary=B"
    headers = {"Content-Type": kind}
    await ask(coordinator, "POST", "/v1/audio/transcriptions", form + b"--B--\r\n", **headers)
    for path in ("/api/chat", "/api/agents", "/api/blobs/sha256:" + "a" * 64, "/api/pull"):
        await raw(coordinator, deaf.post(path, b"{" * MEBIBYTE, length=20 * MEBIBYTE), reads=False)
        chunked = f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        await raw(coordinator, chunked + b"fffff\r\n" + b"a" * 0xFFFF, reads=False)


async def waits(coordinator: Running) -> None:
    """Clients that leave while they wait, and while they are answered."""
    async with AsyncExitStack() as stack:
        for _ in range(20):
            await stack.enter_async_context(deaf.connected(coordinator.url, deaf.chat()))
        await asyncio.sleep(0.2)


async def guesses(coordinator: Running) -> None:
    """Wrong keys, sessions, signatures and join tokens."""
    for number in range(50):
        await ask(coordinator, "GET", "/api/keys", Authorization=f"Bearer {KEY[:-2]}{number:02}")
        await ask(coordinator, "GET", "/dashboard", Cookie=f"ollama_coordinator={number}")
        await ask(coordinator, "GET", f"/k/{KEY[:-2]}{number:02}/api/tags")
    await ask(coordinator, "POST", "/dashboard/session", b"key=a" + b"&a=b" * MEBIBYTE)
    await ask(coordinator, "POST", "/dashboard/session", f"key={KEY}".encode())


async def half_read(coordinator: Running) -> None:
    """Long answers of which only the beginning is read."""
    for path in ("/metrics", "/dashboard/events", "/api/history/export?format=csv", "/dashboard"):
        for _ in range(5):
            head = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/html\r\n\r\n"
            await raw(coordinator, head.encode())


async def links(coordinator: Running) -> None:
    """Links of nobody, of a bare machine, and handshakes that are none."""
    (agent, *_) = await coordinator.get("/api/agents")
    upgrade = {
        "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
    }  # fmt: skip
    head = "".join(f"{name}: {value}\r\n" for name, value in upgrade.items())
    for agent_id in ("nobody", agent["id"]):
        path = f"/api/agents/{agent_id}/link"
        request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{head}\r\n".encode()
        await raw(coordinator, request, b"\x82\xfe" + b"\xff" * 70_000)
        await raw(coordinator, request[:-20], reads=False)
        await ask(coordinator, "GET", path, **{**upgrade, "Sec-WebSocket-Version": "7"})


# ── operators ─────────────────────────────────────────────────────────────────────────────────


async def keys(coordinator: Running) -> None:
    """Keys that are made, used and ended, and those that cannot be made."""
    for number in range(10):
        name = f"k{number}"
        assert await ask(coordinator, "POST", "/api/keys", {"name": name, "rights": ["use"]}) == 201
        assert await ask(coordinator, "DELETE", f"/api/keys/{name}") == 200
    await ask(coordinator, "POST", "/api/keys", {"name": "x", "models": ["*" * 9] * 9_000})
    await ask(coordinator, "DELETE", "/api/keys/" + "x" * 30_000)


async def names(coordinator: Running) -> None:
    """Aliases of circles, of nothing, and too long ones."""
    for number in range(10):
        name = f"a{number}"
        await ask(coordinator, "POST", "/api/aliases", {"name": name, "models": ["llama3.2", name]})
        await ask(coordinator, "POST", "/api/aliases", {"name": name, "models": ["llama3.2"]})
        await ask(coordinator, "POST", "/api/chat", {"model": name})
        await ask(coordinator, "DELETE", f"/api/aliases/{name}")
    await ask(coordinator, "POST", "/api/aliases", {"name": "x" * 9_000, "models": ["y" * 9_000]})


async def looks(coordinator: Running) -> None:
    """Advice, attention, metrics and lists, many at once, some of them left half-way."""
    paths = ("/api/advice?hours=8760", "/api/attention", "/metrics", "/api/history?limit=500")
    asked = [
        asyncio.create_task(ask(coordinator, "GET", path)) for path in paths for _ in range(10)
    ]
    await asyncio.sleep(0.01)
    for task in asked[::3]:
        task.cancel()
    await asyncio.gather(*asked, return_exceptions=True)


async def settings(coordinator: Running) -> None:
    """A webhook that nobody answers, and settings that are none."""
    async with asyncio.timeout(30), _never() as port:
        url = f"http://127.0.0.1:{port}/hook"
        assert await ask(coordinator, "PATCH", "/api/settings", {"webhook": url}) == 200
        agent = await coordinator.register_at(1, "unreachable")
        await asyncio.sleep(0.2)
        assert await ask(coordinator, "DELETE", f"/api/agents/{agent}") == 204
        assert await ask(coordinator, "PATCH", "/api/settings", {"webhook": None}) == 200
    wrong: list[Any] = [1e300, -1, "x" * 9_000, [1], {}]
    for value in wrong:
        patch = {"max_spool_gibibytes": value}
        assert await ask(coordinator, "PATCH", "/api/settings", patch) == 400


async def scripts(coordinator: Running) -> None:
    """Requests in a row with one head of a prompt: they become a batch."""
    for number in range(15):
        prompt = "translate this into French: " * 20 + str(number)
        body = {"model": "llama3.2", "prompt": prompt, "stream": False}
        assert await ask(coordinator, "POST", "/api/generate", body) == 200


# ── agents ────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def _never(answer: bytes = b"", *, ends: bool = False) -> AsyncIterator[int]:
    """The port of a server that answers every request with these bytes, and not more."""
    connected: set[asyncio.StreamWriter] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.add(writer)
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()
            if not ends:
                await reader.read()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            connected.discard(writer)
            writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in list(connected):
            writer.transport.abort()
        while connected:
            await asyncio.sleep(0.01)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
LIES = (
    b"",
    HEAD + b"Content-Length: 4000000\r\n\r\n" + b"[" * 4_000_000,
    HEAD + b'Content-Length: 999\r\n\r\n{"version":"0.24.0"',
    HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"HTTP/1.1 102 Processing\r\n\r\n" * 999,
    HEAD + b"X: y\r\n" * 20_000,
    b"SSH-2.0-OpenSSH_9.6\r\n",
)


async def machines(coordinator: Running) -> None:
    """Agents whose answers are none, that report nonsense, and that go again."""
    for number, lie in enumerate(LIES):
        async with _never(lie, ends=number % 2 == 0) as port:
            agent = await coordinator.register_at(port, f"liar-{number}")
            tags = {"models": [{"name": f"m{n}"} for n in range(3_000)]}
            await coordinator.heartbeat(agent, tags=tags)
            await coordinator.heartbeat(agent, tags={"models": [[]]})
            await ask(coordinator, "POST", "/api/pull", {"model": "x"}) if number == 1 else None
            assert await ask(coordinator, "DELETE", f"/api/agents/{agent}") == 204


STRANGERS: tuple[Attack, ...] = (heads, bodies, waits, guesses, half_read, links)
OPERATORS: tuple[Attack, ...] = (keys, names, looks, settings, scripts)


@pytest.mark.spec("OPERATION-37")
@pytest.mark.parametrize("attack", [*STRANGERS, *OPERATORS, machines], ids=lambda one: one.__name__)
async def test_it_leaves_nothing(attack: Attack) -> None:
    async with running() as coordinator, StandIn() as ollama:
        await coordinator.register(ollama, "whole")
        await leaves_nothing(coordinator, lambda: attack(coordinator))
        assert (await coordinator.chat())[0] == 200
