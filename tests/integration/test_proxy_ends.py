"""How streams end: properly, broken off by the agent, or left by the client."""

import asyncio
import json
import time
from typing import Any, Literal

import anthropic
import ollama as ollama_client
import openai
import pytest

from support.coordinator import Running, running
from support.ollama import Model, StandIn

pytestmark = pytest.mark.loops

CHAT: dict[str, Any] = {"model": "llama3.2", "messages": [{"role": "user", "content": "hello"}]}
STREAMED: dict[str, dict[str, Any]] = {
    "/api/chat": CHAT,
    "/api/generate": {"model": "llama3.2", "prompt": "hello"},
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "llama3.2", "prompt": "hello"},
    "/v1/responses": {"model": "llama3.2", "input": "hello"},
    "/v1/messages": {**CHAT, "max_tokens": 32},
}


def told_error(path: str, record: bytes) -> str:
    """The sentence of an error record in the dialect of a route."""
    if path.startswith("/api"):
        return str(json.loads(record)["error"])
    lines = record.strip().splitlines()
    data = json.loads(lines[-1].removeprefix(b"data: "))
    if path == "/v1/messages":
        assert lines[0] == b"event: error"
        assert data["type"] == "error"
    if path == "/v1/responses":
        assert lines[0] == b"event: error"
        return str(data["message"])
    return str(data["error"]["message"])


@pytest.mark.spec("PROXY-12")
@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("path", STREAMED)
async def test_a_cut_stream_ends_with_an_error_record_in_its_dialect(
    coordinator: Running, ollama: StandIn, path: str, how: Literal["fin", "rst"]
) -> None:
    ollama.faults.cut(after=3, how=how)
    async with coordinator.stream(path, **STREAMED[path]) as response:
        body = await response.read()  # raises if the body did not end properly
    separator = b"\n" if path.startswith("/api") else b"\n\n"
    assert body.endswith(separator)
    records = body.removesuffix(separator).split(separator)
    assert len(records) > 2
    assert "first" in told_error(path, records[-1])
    assert b"[DONE]" not in body
    await coordinator.until(coordinator.at_rest)


@pytest.mark.spec("PROXY-12")
async def test_the_clients_of_three_vendors_learn_of_a_cut(
    coordinator: Running, ollama: StandIn
) -> None:
    ollama.faults.cut(after=3, paths=list(STREAMED))
    native = ollama_client.AsyncClient(coordinator.url)
    with pytest.raises(ollama_client.ResponseError, match="first"):
        async for _ in await native.chat("llama3.2", CHAT["messages"], stream=True):
            pass
    await native._client.aclose()
    async with openai.AsyncOpenAI(
        base_url=f"{coordinator.url}/v1", api_key="none", max_retries=0
    ) as client:
        chunks = await client.chat.completions.create(**CHAT, stream=True)
        with pytest.raises(openai.APIError, match="first"):
            async for _ in chunks:
                pass
    async with anthropic.AsyncAnthropic(
        base_url=coordinator.url, api_key="none", max_retries=0
    ) as messages:
        with pytest.raises(anthropic.APIStatusError, match="first"):
            async with messages.messages.stream(**CHAT, max_tokens=64) as stream:
                async for _ in stream:
                    pass


@pytest.mark.spec("PROXY-13")
async def test_a_healthy_end_without_done_is_no_failure(
    coordinator: Running, ollama: StandIn
) -> None:
    ollama.faults.end_without_done(after=3)
    async with coordinator.stream() as response:
        lines = [json.loads(line) for line in (await response.read()).splitlines()]
    assert [line.get("done") for line in lines] == [False] * 3
    assert not coordinator.agent(next(iter(coordinator.parts.registry)).id).resting


@pytest.mark.spec("PROXY-14")
async def test_an_error_that_ollama_swallows_is_told(coordinator: Running, ollama: StandIn) -> None:
    ollama.faults.error_line(after=3)
    async with coordinator.stream("/v1/chat/completions") as response:
        body = await response.read()
    assert b"[DONE]" not in body
    assert "first" in told_error("/v1/chat/completions", body.strip().rpartition(b"\n\n")[2])


@pytest.mark.spec("PROXY-9")
async def test_an_error_of_the_answers_own_in_a_stream_is_not_the_agents(
    coordinator: Running, ollama: StandIn
) -> None:
    ollama.faults.error_line("error parsing tool call: raw='{'", after=3)
    async with coordinator.stream() as response:
        request_id = response.headers["X-Ollama-Coordinator-Request"]
        lines = (await response.read()).splitlines()
    assert "parsing tool call" in json.loads(lines[-1])["error"]
    await coordinator.until(coordinator.at_rest)
    assert next(iter(coordinator.parts.registry)).model_cooldowns == {}
    record = await coordinator.get(f"/api/requests/{request_id}")
    assert (record["status"], "parsing" in record["error"]) == ("failed", True)


@pytest.mark.spec("PROXY-14")
async def test_done_is_passed_on_when_the_agent_sent_it(
    coordinator: Running, ollama: StandIn
) -> None:
    async with coordinator.stream("/v1/chat/completions") as response:
        body = await response.read()
    assert body.endswith(b"data: [DONE]\n\n")
    assert body.count(b"[DONE]") == 1
    assert b'"error"' not in body


@pytest.mark.spec("PROXY-16")
async def test_a_client_that_leaves_a_stream_ends_the_work(
    coordinator: Running, ollama: StandIn
) -> None:
    ollama.hold(after=2)
    async with coordinator.stream() as response:
        await response.content.readline()
        left_at = time.monotonic()
    await ollama.seen.wait_for(lambda seen: seen.cancelled == 1 and seen.active == 0)
    assert time.monotonic() - left_at < 1
    await coordinator.until(coordinator.at_rest)
    assert not next(iter(coordinator.parts.registry)).resting


@pytest.mark.spec("PROXY-16")
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_before_the_first_byte_ends_the_work(
    coordinator: Running, ollama: StandIn, stream: bool
) -> None:
    ollama.hold()
    asked = asyncio.create_task(coordinator.chat(stream=stream))
    await ollama.seen.wait_for(lambda seen: seen.held == 1)
    left_at = time.monotonic()
    asked.cancel()
    await ollama.seen.wait_for(lambda seen: seen.cancelled == 1 and seen.active == 0)
    assert time.monotonic() - left_at < 1
    await coordinator.until(coordinator.at_rest)


@pytest.mark.spec("PROXY-16")
async def test_a_request_whose_client_leaves_the_queue_is_never_sent(coordinator: Running) -> None:
    async with StandIn() as ollama:
        agent_id = await coordinator.register(ollama)
        await coordinator.heartbeat(agent_id, runner={"num_parallel": 1})
        ollama.hold()
        first = asyncio.create_task(coordinator.chat())
        await ollama.seen.wait_for(lambda seen: seen.held == 1)
        second = asyncio.create_task(coordinator.chat())
        await coordinator.until(lambda: len(coordinator.parts.scheduler.waiting(0.0)) == 1)
        second.cancel()
        await coordinator.until(lambda: not coordinator.parts.scheduler.waiting(0.0))
        ollama.release()
        assert (await first)[0] == 200
        assert ollama.seen.count("/api/chat") == 1
        assert coordinator.at_rest()


@pytest.mark.spec("PROXY-17")
async def test_a_stream_that_repeats_itself_and_stops_is_passed_as_it_is() -> None:
    async with running() as coordinator, StandIn([Model("loop", repeats=True)]) as ollama:
        await coordinator.register(ollama)
        for path in ("/api/chat", "/v1/chat/completions"):
            async with coordinator.stream(path, model="loop") as response:
                assert b'"error"' not in await response.read()
        assert coordinator.at_rest()


@pytest.mark.spec("PROXY-17")
async def test_a_place_is_given_back_although_its_outcome_cannot_be_noted(
    coordinator: Running, ollama: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stumble(*_: object) -> None:
        raise KeyError("a mistake of our own")

    monkeypatch.setattr(coordinator.parts.registry, "succeeded", stumble)
    await coordinator.chat()
    await coordinator.until(coordinator.at_rest)
