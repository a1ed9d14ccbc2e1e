"""What passes through the proxy, and what does not."""

import asyncio
import io
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from support.coordinator import Running, running
from support.ollama import Model, StandIn

pytestmark = pytest.mark.loops

CHAT: dict[str, Any] = {"model": "llama3.2", "messages": [{"role": "user", "content": "hello"}]}
ROUTES: dict[str, dict[str, Any]] = {
    "/api/chat": CHAT,
    "/api/generate": {"model": "llama3.2", "prompt": "hello"},
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "llama3.2", "prompt": "hello"},
    "/v1/responses": {"model": "llama3.2", "input": "hello"},
    "/v1/messages": {**CHAT, "max_tokens": 8},
}


def without_times(body: bytes) -> bytes:
    """Two answers to one question differ in ids, dates and durations only."""
    varying = {"id", "created", "created_at", "completed_at", "item_id"}

    def clean(value: object) -> object:
        if isinstance(value, list):
            return [clean(part) for part in value]
        if isinstance(value, dict):
            return {
                key: clean(part)
                for key, part in value.items()
                if key not in varying and not key.endswith("_duration")
            }
        return value

    lines = []
    for line in body.splitlines():
        prefix, brace, rest = line.partition(b"{")
        lines.append(
            prefix + json.dumps(clean(json.loads(brace + rest))).encode() if brace else line
        )
    return b"\n".join(lines)


@pytest.mark.spec("PROXY-1")
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ROUTES)
async def test_an_answer_is_the_same_as_from_the_agent_itself(
    coordinator: Running, ollama: StandIn, path: str, stream: bool
) -> None:
    body = json.dumps({**ROUTES[path], "stream": stream}).encode()
    answers = []
    for url in (ollama.url, coordinator.url):
        async with coordinator.session.post(url + path, data=body) as response:
            answers.append((response.status, response.content_type, await response.read()))
    (status, kind, direct), through = answers
    assert through[:2] == (status, kind)
    assert without_times(through[2]) == without_times(direct)


@pytest.mark.spec("PROXY-1")
@pytest.mark.parametrize("path", ["/api/embed", "/v1/embeddings"])
async def test_embeddings_are_the_same_as_from_the_agent_itself(
    coordinator: Running, path: str
) -> None:
    async with StandIn([Model("nomic-embed-text", capabilities=("embedding",))]) as ollama:
        await coordinator.register(ollama)
        body = {"model": "nomic-embed-text", "input": ["one", "two"]}
        async with coordinator.session.post(ollama.url + path, json=body) as response:
            direct = await response.read()
        async with coordinator.session.post(coordinator.url + path, json=body) as response:
            assert without_times(await response.read()) == without_times(direct)


@pytest.mark.spec("PROXY-1")
async def test_the_agent_gets_the_very_bytes_of_the_request(
    coordinator: Running, ollama: StandIn
) -> None:
    body = b'{ "messages":[{"role":"user","content":"caf\xc3\xa9 \\u00e9"}],\n"MODEL":"llama3.2" ,'
    body += b'"x":1e400 , "stream":false} {}'
    async with coordinator.session.post(f"{coordinator.url}/api/chat", data=body) as response:
        await response.read()
    assert ollama.seen.of("/api/chat")[0].body == body


@pytest.mark.spec("PROXY-2")
async def test_a_record_arrives_before_the_next_one_is_made(
    coordinator: Running, ollama: StandIn
) -> None:
    ollama.hold(after=1)
    async with coordinator.stream() as response:
        first = await response.content.readline()
        assert json.loads(first)["done"] is False
        ollama.release()
        rest = await response.content.read()
    assert json.loads(rest.splitlines()[-1])["done"] is True


@pytest.mark.spec("PROXY-3")
async def test_headers_that_are_not_for_ollama_end_here(
    coordinator: Running, ollama: StandIn
) -> None:
    sent = {
        "Host": "fleet.lan",
        "Origin": "http://localhost:3000",
        "Referer": "https://page.example/chat",
        "Authorization": "Bearer secret",
        "Cookie": "session=1",
        "X-Api-Key": "secret",
        "Connection": "keep-alive, X-Mine",
        "X-Mine": "hop",
        "User-Agent": "ollama/0.33.0",
        "X-Stainless-Lang": "python",
    }
    async with coordinator.session.post(
        f"{coordinator.url}/api/chat", json={**CHAT, "stream": False}, headers=sent
    ) as response:
        assert response.status == 200
    seen = {key.lower(): value for key, value in ollama.seen.of("/api/chat")[0].headers.items()}
    assert seen["host"] == f"127.0.0.1:{ollama.port}"
    assert seen["user-agent"] == "ollama/0.33.0"
    assert seen["x-stainless-lang"] == "python"
    private = {"origin", "referer", "authorization", "cookie", "x-api-key", "x-mine"}
    assert private.isdisjoint(seen)


@pytest.mark.spec("PROXY-4")
@pytest.mark.parametrize(
    "name",
    ["llama3.2", "llama3.2:latest", "LLaMA3.2:Latest", "registry.ollama.ai/library/llama3.2"],
)
async def test_a_model_is_found_by_any_spelling_and_without_a_content_type(
    coordinator: Running, ollama: StandIn, name: str
) -> None:
    body = json.dumps({**CHAT, "model": name, "stream": False}).encode()
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    async with coordinator.session.post(
        f"{coordinator.url}/api/chat", data=body, headers=form
    ) as response:
        answer = await response.json()
    assert answer["model"] == name


@pytest.mark.spec("PROXY-5")
async def test_an_answer_names_its_agent(coordinator: Running, ollama: StandIn) -> None:
    async with coordinator.stream() as response:
        assert response.headers["X-Ollama-Coordinator-Agent"] == "first"
        assert response.headers["X-Ollama-Coordinator-Request"]


@pytest.mark.spec("PROXY-6")
@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_over_the_limit_reaches_no_agent(announced: bool) -> None:
    async with running(max_body_mebibytes=1) as coordinator, StandIn() as ollama:
        await coordinator.register(ollama)
        large = b'{"model":"llama3.2","prompt":"' + b"x" * (1024 * 1024) + b'"}'

        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(large), 65536):
                yield large[start : start + 65536]

        body = io.BytesIO(large) if announced else pieces()
        url = f"{coordinator.url}/api/generate"
        async with coordinator.session.post(url, data=body) as response:
            assert response.status == 413
            assert "COORDINATOR_MAX_BODY_MIB" in (await response.json())["error"]
        assert ollama.seen.count("/api/generate") == 0


@pytest.mark.spec("PROXY-1")
async def test_a_body_of_many_megabytes_passes(coordinator: Running, ollama: StandIn) -> None:
    image = "A" * (8 * 1024 * 1024)
    message = {"role": "user", "content": "what is this?", "images": [image]}
    body = io.BytesIO(json.dumps({**CHAT, "messages": [message], "stream": False}).encode())
    async with coordinator.session.post(f"{coordinator.url}/api/chat", data=body) as response:
        assert (await response.json())["done"] is True
    assert len(ollama.seen.of("/api/chat")[0].body) > len(image)


@pytest.mark.spec("PROXY-15")
async def test_a_stream_may_pause(coordinator: Running, ollama: StandIn) -> None:
    stalled = ollama.faults.stall(after=2)
    async with coordinator.stream() as response:
        await response.content.readline()
        await ollama.seen.wait_for(lambda seen: seen.faulted == 1)
        agent = next(iter(coordinator.parts.registry))
        held = next(iter(coordinator.parts.dispatch.held()))
        held.progress_at -= 600  # ten minutes go by
        await ollama.seen.another("/api/version")
        await coordinator.until(lambda: agent.reached)
        assert not agent.resting
        assert held in coordinator.parts.dispatch.held()
        stalled.clear()
        rest = await response.content.read()
    assert json.loads(rest.splitlines()[-1])["done"] is True


@pytest.mark.spec("PROXY-17")
async def test_nothing_is_left_behind_after_many_requests(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    async def leave_early() -> None:
        async with coordinator.stream() as response:
            await response.content.readline()

    for _ in range(5):
        await asyncio.gather(
            *(leave_early() for _ in range(10)), *(coordinator.chat() for _ in range(10))
        )
    await ollama.seen.wait_for(lambda seen: seen.active == 0)
    await spare.seen.wait_for(lambda seen: seen.active == 0)
    await coordinator.until(coordinator.at_rest)
    assert all(coordinator.parts.scheduler.in_flight(a.id) == 0 for a in coordinator.parts.registry)
    left = {task.get_coro().__qualname__ for task in asyncio.all_tasks()}  # type: ignore[union-attr]
    assert not any(name.startswith(("Proxy", "Relay", "until_departure")) for name in left)


async def test_a_keep_alive_connection_serves_one_request_after_another(
    coordinator: Running, ollama: StandIn
) -> None:
    connector = aiohttp.TCPConnector(limit=1)
    async with aiohttp.ClientSession(connector=connector) as session:
        for _ in range(3):
            async with session.post(f"{coordinator.url}/api/chat", json=CHAT) as response:
                assert response.status == 200
                await response.read()
