"""Answers that no Ollama gives: what of them may reach a client, and what is tried elsewhere."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import aiohttp
import pytest

from support.coordinator import Running
from support.ollama import StandIn

DONE = b'{"model":"llama3.2","message":{"role":"assistant","content":"odd"},"done":true}\n'
CHAT = "/api/chat"
Odd = Callable[[str, bytes], Awaitable[str]]


def answer(head: str, body: bytes = DONE, kind: str = "application/json") -> bytes:
    lines = [head, f"content-type: {kind}", f"content-length: {len(body)}", "connection: close"]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


@asynccontextmanager
async def in_front_of(ollama: StandIn, path: str, odd: bytes) -> AsyncIterator[int]:
    """A port at which that Ollama answers, and one path of it as given."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = [
                line for line in head.lower().split(b"\r\n") if line[:15] == b"content-length:"
            ]
            body = await reader.readexactly(int(length[0][15:]) if length else 0)
            method, target = head.split()[:2]
            if target.decode() == path:
                writer.write(odd)
            else:
                async with (
                    aiohttp.ClientSession() as session,
                    session.request(
                        method.decode(), ollama.url + target.decode(), data=body
                    ) as response,
                ):
                    status, whole = f"HTTP/1.1 {response.status} x", await response.read()
                    writer.write(answer(status, whole, response.content_type))
            await writer.drain()
        except (asyncio.IncompleteReadError, OSError):
            return
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


@pytest.fixture
async def odd(coordinator: Running) -> AsyncIterator[Odd]:
    """Register an agent that is idler than any other, and answers a path as given."""
    async with AsyncExitStack() as stack:

        async def register(path: str, odd: bytes) -> str:
            ollama = await stack.enter_async_context(StandIn())
            port = await stack.enter_async_context(in_front_of(ollama, path, odd))
            return await coordinator.register(ollama, "odd", ollama_port=port)

        yield register


ODD = {
    "switching protocols": answer("HTTP/1.1 101 Switching Protocols"),
    "a status below HTTP's": answer("HTTP/1.1 099 Odd"),
    "a status above HTTP's": answer("HTTP/1.1 999 Odd"),
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "a login page": answer("HTTP/1.1 302 Found\r\nlocation: /login", b"", "text/html"),
    "another place": answer("HTTP/1.1 307 Moved\r\nlocation: http://elsewhere/", b""),
}


@pytest.mark.spec("PROXY-7")
@pytest.mark.parametrize("status", ODD)
async def test_a_status_that_no_ollama_has_is_tried_elsewhere(
    coordinator: Running, odd: Odd, status: str
) -> None:
    await odd(CHAT, ODD[status])
    code, told = await coordinator.chat()
    assert code == 503
    assert "no agent could serve model" in told["error"]
    async with StandIn() as spare:
        await coordinator.register(spare, "spare")
        assert (await coordinator.chat())[0] == 200
    await coordinator.until(coordinator.at_rest)


@pytest.mark.spec("PROXY-42")
async def test_an_agents_orders_to_browsers_and_proxies_end_here(
    coordinator: Running, odd: Odd
) -> None:
    await odd(
        CHAT,
        answer(
            "HTTP/1.1 200 OK\r\nset-cookie: a=b\r\nclear-site-data: *\r\nx-accel-redirect: /etc"
            "\r\nstrict-transport-security: max-age=1\r\nwww-authenticate: Basic"
            "\r\nx-ollama-coordinator-agent: forged\r\nx-ollama-coordinator-more: forged"
            "\r\nx-bell: a\x07b\r\nx-fine: yes"
        ),
    )
    async with coordinator.stream(stream=False) as response:
        got = {name.lower() for name in response.headers}
        assert response.status == 200
    assert got - {"server"} == {
        *("content-type", "content-length", "date", "x-fine"),
        *("x-ollama-coordinator-agent", "x-ollama-coordinator-request"),
    }
    assert response.headers["x-ollama-coordinator-agent"] == "odd"


@pytest.mark.spec("PROXY-5")
@pytest.mark.parametrize("status", [400, 503])
async def test_an_error_that_is_passed_on_names_its_agent(
    coordinator: Running, ollama: StandIn, status: int
) -> None:
    ollama.faults.status(status, "json: wrong", paths=[CHAT])
    async with coordinator.stream(stream=False) as response:
        assert response.status == status
        assert response.headers["x-ollama-coordinator-agent"] == "first"
        assert response.headers["x-ollama-coordinator-request"]


@pytest.mark.spec("PROXY-42")
async def test_show_and_unload_pass_no_redirect_on(coordinator: Running, odd: Odd) -> None:
    await odd("/api/show", ODD["a login page"])
    status, told = await coordinator.post("/api/show", {"model": "llama3.2"})
    assert status == 503
    assert "is it an Ollama?" in told["error"]


@pytest.mark.spec("PROXY-41")
async def test_events_whose_lines_end_in_crlf_are_not_held_back(
    coordinator: Running, odd: Odd
) -> None:
    """The first event is here while the second has not been sent."""
    chunk = json.dumps({"choices": [{"delta": {"content": "hello"}, "finish_reason": None}]})
    event = f"data: {chunk}\r\n\r\n".encode()
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 1000\r\n\r\n"
    await odd("/v1/chat/completions", head + event)
    async with coordinator.stream("/v1/chat/completions") as response:
        assert response.headers["x-accel-buffering"] == "no"
        assert await response.content.readuntil(b"\r\n\r\n") == event


@pytest.mark.spec("PROXY-41")
async def test_every_stream_tells_reverse_proxies_not_to_collect_it(
    coordinator: Running, ollama: StandIn
) -> None:
    async with coordinator.stream() as response:
        assert response.headers["x-accel-buffering"] == "no"
    body = {"model": "llama3.2"}
    async with coordinator.session.post(f"{coordinator.url}/api/pull", json=body) as response:
        assert response.headers["x-accel-buffering"] == "no"
    async with coordinator.stream(stream=False) as response:
        assert "x-accel-buffering" not in response.headers


@pytest.mark.loops
@pytest.mark.spec("PROXY-12")
async def test_half_a_record_is_not_passed_on(coordinator: Running, odd: Odd) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\n"
    whole, half = b'{"response":"a","done":false}\n', b'{"respon'
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (whole, half))
    await odd("/api/generate", head + b"transfer-encoding: chunked\r\n\r\n" + chunks)
    async with coordinator.stream("/api/generate", prompt="x") as response:
        lines = (await response.read()).splitlines()
    assert json.loads(lines[0])["response"] == "a"
    assert "error" in json.loads(lines[1])
    assert len(lines) == 2
