"""Requests go where they finish first, over real sockets: a machine whose owner uses it himself."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import pytest

from ollama_coordinator.scheduler import cost, state
from ollama_coordinator_common.types import AgentId
from support.coordinator import Running, running
from support.ollama import Hardware, StandIn

TOKENS_PER_SECOND = 400.0
OWNERS_TOKENS = 800  # two seconds, again and again
CHATS = 12


@asynccontextmanager
async def machines(
    coordinator: Running, *hardware: Hardware
) -> AsyncIterator[list[tuple[StandIn, AgentId]]]:
    """Machines with one slot, of known speeds; the model is in memory on all."""
    async with AsyncExitStack() as stack:
        made: list[tuple[StandIn, AgentId]] = []
        for one in hardware:
            ollama = await stack.enter_async_context(StandIn(hardware=one))
            made.append((ollama, AgentId(await coordinator.register(ollama))))
            for _, other in made[:-1]:
                await drain(coordinator, other, True)
            for stream in (True, False):
                for _ in range(4):
                    await chat(coordinator, "/api/chat", stream=stream)
            for _, other in made[:-1]:
                await drain(coordinator, other, False)
        yield made


@asynccontextmanager
async def two_machines(
    coordinator: Running,
) -> AsyncIterator[tuple[StandIn, AgentId, StandIn, AgentId]]:
    """Two equal ones."""
    equal = Hardware(prefill_tokens_per_second=4000, decode_tokens_per_second=TOKENS_PER_SECOND)
    async with machines(coordinator, equal, equal) as ((used, first), (idle, second)):
        yield used, first, idle, second


async def drain(coordinator: Running, agent: str, draining: bool) -> None:
    url = f"{coordinator.url}/api/agents/{agent}"
    async with coordinator.session.patch(url, json={"draining": draining}) as response:
        assert response.status == 200


@asynccontextmanager
async def owner(ollama: StandIn) -> AsyncIterator[None]:
    """Somebody who keeps the machine's one slot busy, past the coordinator."""
    began = asyncio.Event()

    async def use() -> None:
        body = {"model": "llama3.2", "prompt": "on", "options": {"num_predict": OWNERS_TOKENS}}
        async with aiohttp.ClientSession() as session:
            while True:
                async with session.post(f"{ollama.url}/api/generate", json=body) as response:
                    async for _ in response.content:
                        began.set()

    task = asyncio.create_task(use())
    try:
        await began.wait()
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def chat(coordinator: Running, path: str, *, stream: bool) -> None:
    body = {
        "model": "llama3.2",
        "messages": [{"role": "user", "content": "hello"}],
        "stream": stream,
        **({"options": {"num_predict": 20}} if path == "/api/chat" else {"max_tokens": 20}),
    }
    lane = {"X-Ollama-Coordinator-Lane": "interactive"}  # so many alike would be a batch
    async with coordinator.session.post(
        coordinator.url + path, json=body, headers=lane
    ) as response:
        assert response.status == 200, await response.text()
        await response.read()


def served(ollama: StandIn) -> int:
    return ollama.seen.count("/api/chat") + ollama.seen.count("/v1/chat/completions")


@pytest.mark.spec("SCHED-95")
@pytest.mark.parametrize(
    ("path", "stream"),
    [
        ("/api/chat", True),
        ("/api/chat", False),
        ("/v1/chat/completions", True),
        ("/v1/chat/completions", False),
    ],
)
async def test_waiting_that_nothing_explains_is_learned(path: str, stream: bool) -> None:
    async with running() as coordinator, two_machines(coordinator) as (used, _, idle, _):
        async with owner(used):
            before = served(used), served(idle)
            for _ in range(CHATS):
                await chat(coordinator, path, stream=stream)
        assert served(used) - before[0] <= 2
        assert served(idle) - before[1] >= CHATS - 2


@pytest.mark.spec("SCHED-95")
@pytest.mark.parametrize(
    "report",
    [
        {"active_requests": 1},
        {"active_requests": 1, "other_requests": 1},
        {"gpus": [{"name": "gpu", "utilization_percent": 97.0}]},
    ],
)
async def test_a_slot_that_is_reported_as_in_use_is_no_free_slot(
    report: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "REPORT_AGE_SECONDS", 0.0)  # as if no answer had just ended
    async with running() as coordinator, two_machines(coordinator) as (used, agent, _idle, _):
        async with owner(used):
            await coordinator.heartbeat(agent, **report)
            before = served(used)
            for _ in range(CHATS):
                await chat(coordinator, "/api/chat", stream=True)
            assert served(used) == before
        why = await asked(coordinator)
        waits = {one["agent_id"]: one["wait_seconds"] for one in why["candidates"]}
        assert waits.pop(agent) > 0
        assert set(waits.values()) == {0}
        await coordinator.heartbeat(agent)
        await chat(coordinator, "/api/chat", stream=True)
        await chat(coordinator, "/api/chat", stream=True)
        assert served(used) > before


async def asked(coordinator: Running) -> Any:
    """What would be decided for one more chat."""
    status, why = await coordinator.post(
        "/api/explain", {"model": "llama3.2", "messages": [{"role": "user", "content": "hello"}]}
    )
    assert status == 200, why
    return why


@pytest.mark.spec("SCHED-23")
@pytest.mark.parametrize("stream", [True, False])
async def test_no_slot_is_tried_on_a_slow_machine_where_waiting_for_a_fast_one_costs_less(
    stream: bool,
) -> None:
    """Nobody reports slots here: more are tried, but not where that ends later."""
    fast = Hardware(prefill_tokens_per_second=4000, decode_tokens_per_second=400)
    # So slow that its first token costs more than a tie (10 ms) beyond any wait for the fast one.
    slow = Hardware(prefill_tokens_per_second=400, decode_tokens_per_second=14)
    async with (
        running() as coordinator,
        machines(coordinator, fast, slow) as ((quick, _), (lame, _)),
    ):
        before = served(quick), served(lame)
        asked_at_once = (chat(coordinator, "/api/chat", stream=stream) for _ in range(4))
        await asyncio.gather(*asked_at_once)
        assert (served(quick) - before[0], served(lame) - before[1]) == (4, 0)


@asynccontextmanager
async def sent_to(
    coordinator: Running, ollama: StandIn, others: list[AgentId], body: dict[str, Any]
) -> AsyncIterator[asyncio.Task[tuple[str, bytes]]]:
    """A chat that has reached this machine, when the others come back: who served it, and what."""

    async def ask() -> tuple[str, bytes]:
        async with coordinator.session.post(f"{coordinator.url}/api/chat", json=body) as response:
            assert response.status == 200, await response.text()
            return response.headers["X-Ollama-Coordinator-Agent"], await response.read()

    for agent in others:
        await drain(coordinator, agent, True)
    before = ollama.seen.count("/api/chat")
    task = asyncio.create_task(ask())
    try:
        await coordinator.until(lambda: ollama.seen.count("/api/chat") > before)
        for agent in others:
            await drain(coordinator, agent, False)
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


async def attempts_of_the_last(coordinator: Running) -> list[tuple[str, str]]:
    """The results and reasons of the attempts of the request that ended last."""
    await coordinator.until(coordinator.at_rest)
    request = (await coordinator.get("/api/history"))["requests"][0]
    ended = await coordinator.get(f"/api/requests/{request['id']}")
    return [(one["result"], one.get("reason", "")) for one in ended["attempts"]]


PROMPT = {"role": "user", "content": "word " * 400}


@pytest.mark.spec("SCHED-96")
async def test_a_stream_without_a_byte_on_a_machine_that_became_slow_goes_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cost, "LATE_SECONDS", 0.3)
    async with running() as coordinator, two_machines(coordinator) as (used, first, idle, second):
        used.hold_prompts()
        body = {"model": "llama3.2", "messages": [PROMPT], "options": {"num_predict": 5}}
        before = served(idle)
        async with sent_to(coordinator, used, [second], body) as task:
            name, answer = await task
        assert name == coordinator.agent(second).name
        assert answer.count(b"\n") == 6
        assert served(idle) == before + 1
        (result, reason), (last, _) = await attempts_of_the_last(coordinator)
        assert (result, last) == ("taken back", "served")
        assert reason.startswith("no byte after ")
        assert f"{name} serves it " in reason
        assert not coordinator.agent(first).resting
        assert not coordinator.agent(first).cooldown
        used.release()


@pytest.mark.spec("SCHED-96")
@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_behind_a_blocked_load_goes_elsewhere(stream: bool) -> None:
    async with running() as coordinator, two_machines(coordinator) as (used, first, _, second):
        body = {
            "model": "llama3.2",
            "messages": [{"role": "user", "content": "hello"}],
            "options": {"num_predict": 5, "num_ctx": 8192},
            "stream": stream,
        }
        await drain(coordinator, first, True)
        async with coordinator.session.post(f"{coordinator.url}/api/chat", json=body) as response:
            assert response.status == 200
            await response.read()
        await drain(coordinator, first, False)
        used.hold_loads()
        async with sent_to(coordinator, used, [second], body) as task:
            while not task.done():  # the lists show in time that the model is not in memory
                await coordinator.parts.monitor.refresh(
                    coordinator.parts.registry, older_than=0.2, seconds=1.0
                )
                await asyncio.wait([task], timeout=0.1)
            name, _ = await task
        assert name == coordinator.agent(second).name
        results = [result for result, _ in await attempts_of_the_last(coordinator)]
        assert results == ["taken back", "served"]
        assert not coordinator.agent(first).model_cooldowns
        used.release()


@pytest.mark.spec("SCHED-96")
async def test_a_slow_machine_serves_a_request_that_was_taken_back_when_all_others_fail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cost, "LATE_SECONDS", 0.3)
    async with running() as coordinator, two_machines(coordinator) as (used, first, broken, second):
        used.hold_prompts()
        broken.faults.status(500, paths=["/api/chat"])
        body = {"model": "llama3.2", "messages": [PROMPT], "options": {"num_predict": 5}}
        before = served(broken)
        async with sent_to(coordinator, used, [second], body) as task:
            await coordinator.until(lambda: served(broken) > before)
            used.release()
            name, _ = await task
        assert name == coordinator.agent(first).name
        results = [result for result, _ in await attempts_of_the_last(coordinator)]
        assert results == ["taken back", "model failed", "served"]


@pytest.mark.spec("SCHED-96")
async def test_it_stays_where_no_other_machine_serves_it_sooner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other one is a backup for those that would wait 1,000 s longer."""
    monkeypatch.setattr(cost, "LATE_SECONDS", 0.1)
    async with running() as coordinator, two_machines(coordinator) as (used, first, other, second):
        url = f"{coordinator.url}/api/agents/{second}"
        async with coordinator.session.patch(url, json={"backup_seconds": 1000}) as response:
            assert response.status == 200
        used.hold_prompts()
        before = served(other)
        body = {"model": "llama3.2", "messages": [PROMPT], "options": {"num_predict": 5}}
        async with sent_to(coordinator, used, [second], body) as task:
            looks = 0

            def take_back() -> None:
                nonlocal looks
                looks += 1
                look()

            look = coordinator.parts.dispatch.take_back
            monkeypatch.setattr(coordinator.parts.dispatch, "take_back", take_back)
            await coordinator.until(lambda: looks >= 3)
            assert not task.done()
            used.release()
            name, _ = await task
        assert name == coordinator.agent(first).name
        assert served(other) == before
        assert [result for result, _ in await attempts_of_the_last(coordinator)] == ["served"]
