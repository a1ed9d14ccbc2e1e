"""The rule for retries: before the first byte elsewhere, after it never."""

import asyncio
import json
from collections.abc import Callable
from typing import Any, Literal

import aiohttp
import pytest

from support.coordinator import Running
from support.ollama import StandIn


def named(coordinator: Running, name: str) -> str:
    return next(agent.id for agent in coordinator.parts.registry if agent.name == name)


How = Literal["fin", "rst"]


def reset_new_connections(ollama: StandIn) -> None:
    """The fault is for new connections only, so the idle ones go first."""
    ollama.faults.refuse().clear()
    ollama.faults.reset_on_accept()


BEFORE_THE_FIRST_BYTE: dict[str, Callable[[StandIn], Any]] = {
    "refused": lambda o: o.faults.refuse(),
    "reset on accept": lambda o: reset_new_connections(o),
    "reset": lambda o: o.faults.rst(paths=["/api/chat"]),
    "closed": lambda o: o.faults.fin(paths=["/api/chat"]),
    "cut before the first record": lambda o: o.faults.cut(after=0, how="fin"),
    "misbound": lambda o: o.faults.status(403, raw="", paths=["/api/chat"]),
    "busy": lambda o: o.faults.busy(paths=["/api/chat"]),
    "too many requests": lambda o: o.faults.status(429, "slow down", paths=["/api/chat"]),
    "cancelled by itself": lambda o: o.faults.status(499, "request canceled", paths=["/api/chat"]),
    "bad gateway": lambda o: o.faults.status(502, "bad gateway", paths=["/api/chat"]),
    "gateway time-out": lambda o: o.faults.status(504, "time-out", paths=["/api/chat"]),
    "model gone": lambda o: o.models.remove("llama3.2"),
    "load failed": lambda o: o.faults.status(
        500, "llama-server process has terminated: exit status 2", paths=["/api/chat"]
    ),
    "out of memory": lambda o: o.faults.status(
        500, "model requires more system memory (9 GiB) than is available", paths=["/api/chat"]
    ),
    "runner died at once": lambda o: o.faults.error_line(after=0),
}


@pytest.mark.spec("PROXY-7")
@pytest.mark.parametrize("trouble", BEFORE_THE_FIRST_BYTE)
@pytest.mark.parametrize("stream", [True, False])
async def test_what_fails_before_the_first_byte_is_served_elsewhere(
    coordinator: Running, ollama: StandIn, spare: StandIn, trouble: str, stream: bool
) -> None:
    if trouble == "runner died at once" and not stream:
        pytest.skip("an error line exists in streams only")
    BEFORE_THE_FIRST_BYTE[trouble](ollama)
    for _ in range(4):
        async with coordinator.stream(stream=stream) as response:
            assert response.status == 200
            last = (await response.read()).splitlines()[-1]
        assert json.loads(last)["done"] is True
        assert response.headers["X-Ollama-Coordinator-Agent"] == "spare"
    assert spare.seen.count("/api/chat") == 4
    await coordinator.until(coordinator.at_rest)


@pytest.mark.spec("PROXY-7")
async def test_each_agent_is_tried_at_most_once(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    for node in (ollama, spare):
        node.faults.busy(paths=["/api/chat"])
    status, answer = await coordinator.chat()
    assert status == 503
    assert "server busy" in answer["error"]
    assert (ollama.seen.count("/api/chat"), spare.seen.count("/api/chat")) == (1, 1)


@pytest.mark.spec("PROXY-8")
@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_a_stream_cut_after_the_first_byte_is_not_repeated(
    coordinator: Running, ollama: StandIn, spare: StandIn, how: How
) -> None:
    for node in (ollama, spare):
        node.faults.cut(after=3, how=how)
    body = {"model": "llama3.2", "messages": [{"role": "user", "content": "hello"}]}
    headers, url = {"X-Ollama-Coordinator-Continue": "off"}, f"{coordinator.url}/api/chat"
    async with coordinator.session.post(url, json=body, headers=headers) as response:
        lines = (await response.read()).splitlines()
    assert [json.loads(line).get("done") for line in lines[:-1]] == [False] * 3
    assert "error" in json.loads(lines[-1])
    assert ollama.seen.count("/api/chat") + spare.seen.count("/api/chat") == 1


@pytest.mark.spec("PROXY-9")
@pytest.mark.parametrize(
    ("status", "text"),
    [
        (400, '"llama3.2" does not support tools'),
        (403, "ollama cloud is disabled: remote model is not available"),
        (500, "option num_ctx must be of type integer"),
    ],
)
async def test_an_error_of_the_clients_own_making_passes_as_it_is(
    coordinator: Running, ollama: StandIn, spare: StandIn, status: int, text: str
) -> None:
    for node in (ollama, spare):
        node.faults.status(status, text, paths=["/api/chat"])
    assert await coordinator.chat() == (status, {"error": text})
    assert ollama.seen.count("/api/chat") + spare.seen.count("/api/chat") == 1
    assert all(not agent.resting for agent in coordinator.parts.registry)


@pytest.mark.spec("PROXY-10")
async def test_when_nobody_can_be_reached_the_client_gets_a_sentence(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    for node in (ollama, spare):
        node.faults.fin(paths=["/api/chat", "/v1/chat/completions"])
    status, answer = await coordinator.chat()
    assert status == 503
    assert "closed the connection without an answer" in answer["error"]
    for node in (ollama, spare):
        node.faults.clear()
    await coordinator.until(lambda: not any(a.resting for a in coordinator.parts.registry))


@pytest.mark.spec("PROXY-11")
@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_an_answer_in_one_piece_that_breaks_off_is_repeated(
    coordinator: Running, ollama: StandIn, spare: StandIn, how: How
) -> None:
    ollama.faults.cut(after=0, how=how, paths=["/api/chat"])
    for _ in range(4):
        status, answer = await coordinator.chat()
        assert status == 200
        assert answer["done"] is True


@pytest.mark.spec("FLEET-18")
async def test_an_agent_that_cannot_load_one_model_serves_its_others(
    coordinator: Running,
) -> None:
    async with StandIn(["big", "small"]) as ollama, StandIn(["big"]) as other:
        await coordinator.register(ollama, "first")
        await coordinator.register(other, "other")
        ollama.faults.load_fails(model="big")
        for _ in range(6):
            assert (await coordinator.chat("big"))[0] == 200
        tried = [record for record in ollama.seen.of("/api/chat") if record.model == "big"]
        assert len(tried) <= 1
        assert (await coordinator.chat("small"))[0] == 200
        assert not coordinator.agent(named(coordinator, "first")).resting


@pytest.mark.spec("PROXY-7")
async def test_a_burst_survives_the_death_of_an_agent(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    ollama.hold()
    spare.hold()
    asked = [asyncio.create_task(coordinator.chat()) for _ in range(10)]
    await coordinator.until(lambda: ollama.seen.count("/api/chat") > 0)
    await ollama.kill("rst")
    spare.release()
    answers = await asyncio.gather(*asked)
    assert {status for status, _ in answers} == {200}
    await coordinator.until(coordinator.at_rest)


async def test_a_client_sees_no_trace_of_a_retry(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    ollama.faults.cut(after=0, how="rst")
    async with aiohttp.ClientSession() as session:
        body = {"model": "llama3.2", "prompt": "hi", "stream": True}
        for _ in range(2):
            async with session.post(f"{coordinator.url}/api/generate", json=body) as response:
                lines = [json.loads(line) async for line in response.content]
            assert len({line["created_at"] for line in lines}) == len(lines)
            assert sum(line["done"] for line in lines) == 1


@pytest.mark.spec("PROXY-25")
@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_the_only_agent_may_close_a_kept_connection_under_a_request(
    coordinator: Running, ollama: StandIn, how: How
) -> None:
    assert (await coordinator.chat())[0] == 200
    getattr(ollama.faults, how)(paths=["/api/chat"], times=1)
    assert (await coordinator.chat())[0] == 200
    assert ollama.seen.count("/api/chat") == 3
    assert not coordinator.agent(named(coordinator, "first")).resting
