"""What runs and waits, why it went where it is, and its end by an operator's hand."""

import asyncio
import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from ollama_coordinator.db.schema import STEPS, Table
from ollama_coordinator.scheduler import POLICIES
from support.coordinator import Running, running
from support.ollama import Hardware, StandIn


async def only_request(coordinator: Running) -> dict[str, Any]:
    """The one living request."""
    (request,) = await coordinator.get("/api/requests")
    assert isinstance(request, dict)
    return request


@pytest.mark.spec("DASH-1")
async def test_a_request_being_written_is_listed_with_its_tokens(
    coordinator: Running, ollama: StandIn
) -> None:
    ollama.hold(after=3)
    async with coordinator.stream() as answer:
        for _ in range(3):
            await answer.content.readline()
        request = await only_request(coordinator)
        ollama.release()
    assert request["state"] == "writing"
    assert request["tokens"] == 3
    assert request["tokens_per_second"] > 0
    assert (request["agent"], request["model"]) == ("first", "llama3.2:latest")
    assert (request["client"], request["path"]) == ("127.0.0.1", "/api/chat")
    assert request["elapsed_seconds"] > 0


@pytest.mark.spec("DASH-1")
async def test_a_cold_model_is_loading_and_a_warm_one_reads_the_prompt(
    coordinator: Running, ollama: StandIn
) -> None:
    ollama.hold_loads()
    cold = asyncio.create_task(coordinator.chat())
    await ollama.seen.wait_for(lambda seen: seen.held == 1)
    assert (await only_request(coordinator))["state"] == "loading"
    ollama.release()
    await cold
    ollama.hold(after=0)
    warm = asyncio.create_task(coordinator.chat(stream=True))
    await ollama.seen.wait_for(lambda seen: seen.held == 1)
    assert (await only_request(coordinator))["state"] == "reading"
    ollama.release()
    warm.cancel()


@pytest.mark.spec("DASH-71")
async def test_an_answer_in_one_piece_is_written_once_its_prompt_must_have_been_read(
    coordinator: Running, ollama: StandIn
) -> None:
    await coordinator.chat()
    ollama.hold(after=1)
    chat = asyncio.create_task(coordinator.chat())
    await ollama.seen.wait_for(lambda seen: seen.held == 1)
    (entry,) = coordinator.parts.observation.journal.live.values()
    await coordinator.until(lambda: entry.attempts[0].writes_at is not None)
    attempt = entry.attempts[0]
    assert attempt.writes_at is not None
    assert attempt.ends_at is not None
    assert attempt.held.lease.granted_at <= attempt.writes_at <= attempt.ends_at
    assert entry.state(attempt.held.lease.granted_at - 1).value == "reading"
    assert entry.state(attempt.writes_at).value == "writing"
    assert (await only_request(coordinator))["ends_at"]
    ollama.release()
    await chat


@pytest.mark.spec("DASH-74")
async def test_an_agent_that_is_drained_is_shown_as_drained_before_the_next_sample(
    coordinator: Running, ollama: StandIn
) -> None:
    (agent,) = coordinator.parts.registry
    snapshots = coordinator.parts.snapshots
    assert snapshots.agent(agent)["state"] == "online"
    url = f"{coordinator.url}/api/agents/{agent.id}"
    async with coordinator.session.patch(url, json={"draining": True}):
        assert snapshots.agent(agent)["state"] == "draining"


@pytest.mark.spec("DASH-3")
async def test_why_names_what_decided_and_sorts_by_it() -> None:
    slow = Hardware(decode_tokens_per_second=5, reference_bytes=2_000_000_000)
    async with (
        running(policy="predicted") as coordinator,
        StandIn(hardware=slow) as tortoise,
        StandIn() as hare,
    ):
        await coordinator.register(tortoise, "tortoise")
        await coordinator.register(hare, "hare")
        _, decision = await coordinator.post("/api/explain", {"model": "llama3.2", "prompt": "x"})
        costs = [one["cost"] for one in decision["candidates"]]
        assert costs == sorted(costs)
        assert decision["rule"].startswith(f"lowest cost, {costs[0]:.2f} s; next best: ")
    async with running(policy="round-robin") as coordinator, StandIn() as ollama:
        await coordinator.register(ollama)
        await coordinator.chat()
        (row,) = (await coordinator.get("/api/history"))["requests"]
        (attempt,) = (await coordinator.get(f"/api/requests/{row['id']}"))["attempts"]
        assert attempt["rule"] == "round-robin: each agent in turn"


async def one_slot(coordinator: Running, ollama: StandIn) -> str:
    """A machine that says that it runs one request at once."""
    agent = await coordinator.register(ollama, "single")
    assert await coordinator.heartbeat(agent, runner={"num_parallel": 1}) == 200
    return agent


@pytest.mark.spec("DASH-2")
async def test_the_queue_has_the_requests_without_a_place_in_their_order() -> None:
    async with running(policy="predicted") as coordinator, StandIn() as ollama:
        await one_slot(coordinator, ollama)
        ollama.hold(after=0)
        chats = []
        for number in range(3):
            chats.append(asyncio.create_task(coordinator.chat(options={"seed": number})))
            await coordinator.until(
                lambda: len(coordinator.parts.observation.journal.live) == len(chats)
            )
        queue = await coordinator.get("/api/queue")
        listed = await coordinator.get("/api/requests")
        ollama.release()
        await asyncio.gather(*chats)
        assert [request["position"] for request in queue] == [1, 2]
        assert {request["state"] for request in queue} == {"waiting"}
        assert [request["id"] for request in queue] == [request["id"] for request in listed[1:]]
        assert await coordinator.get("/api/queue") == []
        assert coordinator.at_rest()


@pytest.mark.spec("DASH-3")
async def test_a_finished_request_has_its_attempts_and_their_reasons(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    async with coordinator.stream() as answer:
        await answer.read()
        # The model is in memory there, so the next request goes there first.
        warm = ollama if answer.headers["x-ollama-coordinator-agent"] == "first" else spare
    with warm.faults.busy():
        async with coordinator.stream() as answer:
            request_id = answer.headers["x-ollama-coordinator-request"]
            await answer.read()
    told = await coordinator.get(f"/api/requests/{request_id}")
    assert (told["state"], told["status"]) == ("finished", "served")
    failed, served = told["attempts"]
    assert "503" in failed["reason"]
    assert (failed["result"], served["result"]) == ("busy", "served")
    assert "already tried" in served["refused"].values()


@pytest.mark.spec("DASH-3")
async def test_a_finished_request_has_every_candidate_also_after_a_restart(
    tmp_path: Path,
) -> None:
    url = f"sqlite:///{tmp_path}/fleet.db"
    names = {f"machine-{number}" for number in range(12)}
    async with AsyncExitStack() as stack:
        async with running(database_url=url) as coordinator:
            for name in names:
                ollama = await stack.enter_async_context(StandIn())
                await coordinator.register(ollama, name, machine_id=name)
            async with coordinator.stream() as answer:
                request_id = answer.headers["x-ollama-coordinator-request"]
                await answer.read()
            path = f"/api/requests/{request_id}"
            decision = (await coordinator.get(path))["attempts"][0]["decision"]
            told = [candidate["agent"] for candidate in decision["candidates"]]
            assert set(told) == names
            assert decision["unevaluated"] == 0
        async with running(database_url=url) as coordinator:
            assert (await coordinator.get(path))["attempts"][0]["decision"] == decision


@pytest.mark.spec("DASH-3")
@pytest.mark.parametrize("policy", POLICIES)
async def test_every_policy_names_the_agents_that_were_refused(policy: str) -> None:
    async with (
        running(policy=policy) as coordinator,
        StandIn() as ollama,
        StandIn() as drained,
    ):
        await coordinator.register(ollama, "serves")
        away = await coordinator.register(drained, "rests")
        await drain(coordinator, away)
        async with coordinator.stream() as answer:
            request_id = answer.headers["x-ollama-coordinator-request"]
            await answer.read()
        (attempt,) = (await coordinator.get(f"/api/requests/{request_id}"))["attempts"]
        assert attempt["agent"] == "serves"
        assert attempt["refused"] == {"rests": "draining"}
        if policy == "predicted":
            assert attempt["decision"]["candidates"][0]["agent"] == "serves"


async def drain(coordinator: Running, agent_id: str) -> None:
    url = f"{coordinator.url}/api/agents/{agent_id}"
    async with coordinator.session.patch(url, json={"draining": True}) as response:
        assert response.status == 200


async def cancel(coordinator: Running, request_id: str) -> int:
    url = f"{coordinator.url}/api/requests/{request_id}"
    async with coordinator.session.delete(url) as response:
        return response.status


@pytest.mark.spec("DASH-4")
@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/messages"])
async def test_a_cancelled_stream_ends_with_an_error_record(
    coordinator: Running, ollama: StandIn, path: str
) -> None:
    agent_id = (await coordinator.get("/api/agents"))[0]["id"]
    ollama.hold(after=2)
    async with coordinator.stream(path, max_tokens=50) as answer:
        await answer.content.readline()
        assert await cancel(coordinator, (await only_request(coordinator))["id"]) == 204
        rest = (await answer.read()).decode()
    assert "cancelled by the operator" in rest
    await ollama.seen.wait_for(lambda seen: seen.held == 0)
    await coordinator.until(coordinator.at_rest)
    assert coordinator.agent(agent_id).out_of_rotation() is None
    assert coordinator.agent(agent_id).cooldown is None


@pytest.mark.spec("DASH-4")
async def test_a_request_cancelled_before_its_first_byte_is_answered_499(
    coordinator: Running, ollama: StandIn
) -> None:
    ollama.hold(after=0)
    chat = asyncio.create_task(coordinator.chat())
    await ollama.seen.wait_for(lambda seen: seen.held == 1)
    assert await cancel(coordinator, (await only_request(coordinator))["id"]) == 204
    status, body = await chat
    assert status == 499
    assert body == {"error": "cancelled by the operator of the coordinator"}
    await ollama.seen.wait_for(lambda seen: seen.held == 0)
    (row,) = (await coordinator.get("/api/history"))["requests"]
    assert row["status"] == "cancelled"


@pytest.mark.spec("DASH-4")
async def test_a_waiting_request_can_be_cancelled() -> None:
    async with running() as coordinator, StandIn() as ollama:
        await one_slot(coordinator, ollama)
        ollama.hold(after=0)
        first = asyncio.create_task(coordinator.chat())
        await ollama.seen.wait_for(lambda seen: seen.held == 1)
        second = asyncio.create_task(coordinator.chat())
        await coordinator.until(lambda: coordinator.parts.observation.journal.waiting() == 1)
        (waiting,) = await coordinator.get("/api/queue")
        assert await cancel(coordinator, waiting["id"]) == 204
        assert (await second)[0] == 499
        ollama.release()
        assert (await first)[0] == 200
        assert coordinator.at_rest()


@pytest.mark.spec("DASH-5")
async def test_an_unknown_request_is_404(coordinator: Running) -> None:
    assert await cancel(coordinator, "nonesuch") == 404
    async with coordinator.session.get(f"{coordinator.url}/api/requests/nonesuch") as response:
        assert response.status == 404
        assert "nonesuch" in (await response.json())["error"]


@pytest.mark.spec("DASH-6")
async def test_prompts_and_answers_are_nowhere(coordinator: Running, ollama: StandIn) -> None:
    secret = "the password is swordfish"
    messages = [{"role": "user", "content": secret}]
    status, body = await coordinator.chat(messages=messages)
    assert status == 200
    answer = body["message"]["content"]
    (row,) = (await coordinator.get("/api/history"))["requests"]
    told = await coordinator.get(f"/api/requests/{row['id']}")
    tables = [one.name for one in STEPS.values() if isinstance(one, Table)]
    kept = await coordinator.parts.store.run(
        lambda db: str([db.query(f"SELECT * FROM {table}") for table in tables])  # noqa: S608
    )
    for text in (json.dumps(row), json.dumps(told), kept):
        assert "swordfish" not in text
        assert answer not in text


@pytest.mark.spec("DASH-3")
async def test_a_waiting_request_shows_what_would_be_decided_now() -> None:
    slow = Hardware(decode_tokens_per_second=20)
    async with running(policy="predicted") as coordinator, StandIn(hardware=slow) as ollama:
        await one_slot(coordinator, ollama)
        ollama.hold(after=0)
        chats = [asyncio.create_task(coordinator.chat()) for _ in range(2)]
        await coordinator.until(lambda: coordinator.parts.observation.journal.waiting() == 1)
        (waiting,) = await coordinator.get("/api/queue")
        told = await coordinator.get(f"/api/requests/{waiting['id']}")
        ollama.release()
        await asyncio.gather(*chats)
        assert told["attempts"] == []
        assert told["now"]["candidates"][0]["agent"] == "single"
