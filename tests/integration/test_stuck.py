"""Models that hang on a machine whose Ollama answers: found out by late requests and a probe."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from msgspec import structs

from ollama_coordinator import model_probes
from ollama_coordinator.registry import AgentState
from ollama_coordinator.scheduler import cost
from ollama_coordinator_common.settings import AgentConfig
from support.agent_world import free_port
from support.agent_world import running as agent_running
from support.coordinator import Running, running
from support.ollama import StandIn

CHAT = ("/api/chat", "/v1/chat/completions")


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is late is so after a quarter of a second, and a probe has half of one."""
    monkeypatch.setattr(cost, "LATE_SECONDS", 0.25)
    monkeypatch.setattr(model_probes, "TOKEN_SECONDS", 0.5)
    monkeypatch.setattr(model_probes, "LONGEST_PAUSE_SECONDS", 0.5)


@asynccontextmanager
async def fleet(coordinator: Running) -> AsyncIterator[tuple[StandIn, StandIn, AgentState]]:
    """Two machines; the first one has answered, and so has the model in memory for certain."""
    async with StandIn() as first, StandIn() as spare:
        agent = coordinator.agent(await coordinator.register(first, "first"))
        for _ in range(3):
            assert (await coordinator.chat())[0] == 200
        await coordinator.register(spare, "spare")
        yield first, spare, agent


def reasons(agent: AgentState) -> list[str]:
    return [cooldown.reason for cooldown in agent.model_cooldowns.values()]


async def patient(coordinator: Running, seconds: float, **more: Any) -> int:
    """The status that a client gets who waits so long; 0: none."""
    try:
        async with asyncio.timeout(seconds):
            return (await coordinator.chat(**more))[0]
    except TimeoutError:
        return 0


async def reply_to_heartbeat(coordinator: Running, agent: AgentState, **more: Any) -> Any:
    facts = {"agent_id": agent.id, "cpu_usage": 1, "memory_usage": 1, "active_requests": 0}
    async with aiohttp.ClientSession() as session:
        url = f"{coordinator.url}/api/health"
        async with session.post(url, json=facts | more) as response:
            return await response.json()


@pytest.mark.spec("FLEET-50")
@pytest.mark.parametrize("policy", ["predicted", "loaded-first"])
async def test_clients_that_leave_hang_on_a_machine_twice_at_most(policy: str) -> None:
    async with running(policy=policy) as coordinator, fleet(coordinator) as (first, spare, agent):
        first.faults.hang(paths=CHAT)
        before = first.seen.count("/api/chat")
        statuses = [await patient(coordinator, 1.5) for _ in range(8)]
        assert statuses.count(0) <= 2
        assert spare.seen.count("/api/chat") >= 6
        await coordinator.until(lambda: model_probes.STUCK in reasons(agent))
        # Two clients, and probes of one token each.
        bodies = [record.body for record in first.seen.of("/api/chat")[before:]]
        assert 1 <= sum(b"num_predict" not in body for body in bodies) <= 2
        first.faults.clear()
        await coordinator.until(lambda: not agent.model_cooldowns)
        assert not agent.resting
        await coordinator.until(coordinator.at_rest)


@pytest.mark.spec("FLEET-50")
async def test_bytes_without_an_answer_are_as_good_as_silence() -> None:
    """A proxy that keeps the connection busy with blanks, and an answer that only drips."""
    async with running() as coordinator, fleet(coordinator) as (first, _, agent):
        first.faults.hang(paths=CHAT)
        waiting = asyncio.create_task(patient(coordinator, 1.5))
        dispatch = coordinator.parts.dispatch
        await coordinator.until(lambda: list(dispatch.held()))
        (held,) = dispatch.held()
        while not (held.late or held.ended):
            dispatch.began(held)  # as each byte does
            await asyncio.sleep(0.02)
        assert held.late
        await waiting
        assert agent.model_cooldowns
        assert await patient(coordinator, 5.0) == 200


@pytest.mark.spec("FLEET-50")
@pytest.mark.parametrize("stream", [True, False])
async def test_clients_that_wait_are_served_elsewhere(stream: bool) -> None:
    async with running() as coordinator, fleet(coordinator) as (first, _, agent):
        await coordinator.heartbeat(agent.id, runner={"num_parallel": 4})
        first.faults.hang(paths=CHAT)
        asked = [asyncio.create_task(coordinator.chat(stream=stream)) for _ in range(3)]
        if stream:
            for task in asked:
                task.cancel()
            asked = [asyncio.create_task(streamed(coordinator)) for _ in range(3)]
        answers = await asyncio.gather(*asked)
        assert {status for status, _ in answers} == {200}
        assert agent.is_stuck(next(iter(agent.inventory.available)))
        assert not agent.resting
        row = next(row for row in await coordinator.get("/api/agents") if row["id"] == agent.id)
        assert "restart Ollama" in row["avoided_models"]["llama3.2:latest"]
        first.faults.clear()
        await coordinator.until(lambda: not agent.model_cooldowns)


@pytest.mark.spec("FLEET-50")
async def test_late_requests_in_every_slot_are_as_good_as_a_probe_without_a_token() -> None:
    async with running() as coordinator, fleet(coordinator) as (first, spare, agent):
        await coordinator.heartbeat(agent.id, runner={"num_parallel": 2})
        spare_agent = next(one for one in coordinator.parts.registry if one is not agent)
        coordinator.parts.registry.update_settings(
            spare_agent.id, structs.replace(spare_agent.settings, draining=True)
        )
        first.faults.hang(paths=CHAT)
        before = first.seen.count("/api/chat")
        asked = [asyncio.create_task(streamed(coordinator)) for _ in range(4)]
        await coordinator.until(lambda: first.seen.count("/api/chat") == before + 2)
        coordinator.parts.registry.update_settings(
            spare_agent.id, structs.replace(spare_agent.settings, draining=False)
        )
        answers = await asyncio.gather(*asked)
        assert [status for status, _ in answers] == [200] * 4
        assert spare.seen.count("/api/chat") >= 4
        first.faults.clear()
        await coordinator.until(lambda: not agent.model_cooldowns)


async def streamed(coordinator: Running) -> tuple[int, bytes]:
    async with coordinator.stream() as response:
        return response.status, await response.read()


@pytest.mark.spec("FLEET-50")
@pytest.mark.parametrize("policy", ["predicted", "loaded-first"])
async def test_one_late_request_in_the_only_slot_is_enough(policy: str) -> None:
    async with running(policy=policy) as coordinator, fleet(coordinator) as (first, spare, agent):
        await coordinator.heartbeat(agent.id, runner={"num_parallel": 1})
        async with coordinator.stream() as response:
            assert b'"done":true' in await response.read()
        served = spare.seen.count("/api/chat")
        first.faults.hang(paths=CHAT)
        status, body = await streamed(coordinator)
        assert (status, b'"done":true' in body) == (200, True)
        assert spare.seen.count("/api/chat") > served
        first.faults.clear()
        await coordinator.until(lambda: not agent.model_cooldowns)


@pytest.mark.spec("FLEET-50")
async def test_a_long_answer_in_one_piece_is_not_taken_for_a_model_that_hangs() -> None:
    async with running() as coordinator, fleet(coordinator) as (first, spare, agent):
        await coordinator.heartbeat(agent.id, runner={"num_parallel": 1})
        first.hold()
        answer = asyncio.create_task(coordinator.chat(options={"num_predict": 100_000}))
        await coordinator.until(lambda: agent.model_cooldowns)  # it is late
        since = next(iter(agent.model_cooldowns.values())).since
        # The probe found no slot, and is put off.
        await coordinator.until(lambda: next(iter(agent.model_cooldowns.values())).since > since)
        assert model_probes.STUCK not in reasons(agent)
        assert not agent.wants_restart
        before = spare.seen.count("/api/chat")
        assert (await coordinator.chat())[0] == 200  # the others are asked first
        assert spare.seen.count("/api/chat") == before + 1
        first.release()
        assert (await answer)[0] == 200
        assert not agent.model_cooldowns


@pytest.mark.spec("FLEET-50")
async def test_a_slot_that_its_owner_uses_is_no_proof() -> None:
    async with running() as coordinator, fleet(coordinator) as (first, _, agent):
        await reply_to_heartbeat(coordinator, agent, active_requests=3)
        first.faults.hang(paths=CHAT)
        for _ in range(4):
            await patient(coordinator, 1.5)
        probed = lambda: any(b"num_predict" in one.body for one in first.seen.of("/api/chat"))  # noqa: E731
        await coordinator.until(probed)
        await asyncio.sleep(1.0)
        cooldown = next(iter(agent.model_cooldowns.values()))
        assert cooldown.stuck
        assert cooldown.reason != model_probes.STUCK
        assert not agent.wants_restart


@pytest.mark.spec("FLEET-50")
async def test_the_only_machine_is_still_asked() -> None:
    async with running() as coordinator, StandIn() as ollama:
        agent = coordinator.agent(await coordinator.register(ollama, "only"))
        assert (await coordinator.chat())[0] == 200
        ollama.faults.hang(paths=CHAT)
        for _ in range(3):
            assert await patient(coordinator, 1.0) == 0
        assert agent.model_cooldowns
        ollama.faults.clear()
        assert (await coordinator.chat())[0] == 200
        assert not agent.model_cooldowns


@pytest.mark.spec("FLEET-51")
async def test_an_agent_is_asked_to_restart_an_ollama_that_hangs() -> None:
    async with running() as coordinator, fleet(coordinator) as (first, _, agent):
        assert "restart" not in await reply_to_heartbeat(coordinator, agent)
        first.faults.hang(paths=CHAT)
        for _ in range(3):
            await patient(coordinator, 1.5)
        await coordinator.until(lambda: agent.wants_restart)
        await coordinator.until(
            lambda: not coordinator.parts.dispatch.scheduler.in_flight(agent.id)
        )
        assert "restart" not in await reply_to_heartbeat(coordinator, agent, active_requests=1)
        await coordinator.until(lambda: agent.wants_restart)
        await coordinator.until(
            lambda: not coordinator.parts.dispatch.scheduler.in_flight(agent.id)
        )
        reply = await reply_to_heartbeat(coordinator, agent)
        assert "llama3.2" in reply["restart"]
        # It is down and up again: nothing is held against it.
        await reply_to_heartbeat(coordinator, agent, ollama_running=False)
        assert not agent.model_cooldowns


async def probed_again(coordinator: Running, ollama: StandIn, agent: AgentState) -> None:
    """The time is over in which others are asked first, and the probe that follows has ended."""
    before = ollama.seen.count("/api/chat")
    (key, cooldown), *_ = agent.model_cooldowns.items()
    agent.model_cooldowns[key] = structs.replace(cooldown, until=cooldown.since)
    await coordinator.until(lambda: ollama.seen.count("/api/chat") > before)
    await coordinator.until(coordinator.at_rest)


@pytest.mark.spec("FLEET-18")
@pytest.mark.parametrize(
    ("status", "raw"), [(500, '{"error":"CUDA error"}'), (200, "<html>Sign in</html>"), (200, "")]
)
async def test_a_model_that_failed_is_probed_when_its_time_is_over(status: int, raw: str) -> None:
    async with running() as coordinator, fleet(coordinator) as (first, _, agent):
        first.faults.status(status, raw=raw, paths=CHAT)
        while not agent.model_cooldowns:
            assert (await coordinator.chat())[0] == 200
        await probed_again(coordinator, first, agent)
        assert agent.model_cooldowns
        first.faults.clear()
        await probed_again(coordinator, first, agent)
        await coordinator.until(lambda: not agent.model_cooldowns)


@pytest.mark.spec("FLEET-52")
@pytest.mark.parametrize("policy", ["predicted", "loaded-first"])
async def test_silence_in_mid_stream_counts_for_new_requests(
    monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    monkeypatch.setattr(model_probes, "GAP_SECONDS", 0.25)
    monkeypatch.setattr(model_probes, "GAP_TOKENS", 1)
    async with running(policy=policy) as coordinator, fleet(coordinator) as (first, _, agent):
        await coordinator.heartbeat(agent.id, runner={"num_parallel": 8})
        stalls = first.faults.stall(after=2)
        asked = [asyncio.create_task(streamed(coordinator)) for _ in range(6)]
        await coordinator.until(lambda: agent.model_cooldowns)
        # The streams themselves go on, and the probe finds that the machine is well.
        await coordinator.until(lambda: not agent.model_cooldowns or any(t.done() for t in asked))
        stalls.clear()
        for status, body in await asyncio.gather(*asked):
            assert status == 200
            assert b'"done":true' in body


@pytest.mark.spec("FLEET-17")
async def test_a_cold_load_is_not_late() -> None:
    async with running() as coordinator, StandIn() as first, StandIn() as spare:
        for node, name in ((first, "first"), (spare, "spare")):
            await coordinator.register(node, name)
            node.hold_loads()
        asked = [asyncio.create_task(coordinator.chat()) for _ in range(2)]
        await coordinator.until(lambda: len(list(coordinator.parts.dispatch.held())) == 2)
        await asyncio.sleep(1.5)
        assert not any(agent.late for agent in coordinator.parts.registry)
        for node in (first, spare):
            node.release()
        assert {status for status, _ in await asyncio.gather(*asked)} == {200}


SERVE = """#!{python}
import sys
sys.path.insert(0, {tests!r})
from support.ollama.__main__ import main
main(["--port", "{port}", "--control-port", "{control}"])
"""


@pytest.mark.spec("FLEET-51")
@pytest.mark.skipif(sys.platform == "win32", reason="the program is a script")
@pytest.mark.parametrize("slots", [1, 4])
async def test_an_ollama_of_the_agent_that_hangs_is_restarted_and_its_requests_are_served(
    tmp_path: Path, slots: int
) -> None:
    """The only machine; the clients wait, and so what hangs is all that runs there."""
    port, control = free_port(), free_port()
    program, tests = tmp_path / "ollama", Path(__file__).parents[1]
    serve = SERVE.format(python=sys.executable, tests=str(tests), port=port, control=control)
    program.write_text(serve)
    program.chmod(0o755)
    async with running() as coordinator:
        config = AgentConfig(
            coordinator_url=coordinator.url,
            ollama_port=port,
            ollama_binary=program,
            state_dir=tmp_path / "state",
        )
        environ = {"OLLAMA_NUM_PARALLEL": str(slots)}
        async with agent_running(config, environ):
            registry = coordinator.parts.registry
            await coordinator.until(lambda: any(one.inventory.available for one in registry))
            (agent,) = registry
            for _ in range(3):
                assert (await streamed(coordinator))[0] == 200
            hang = {"kind": "hang", "paths": CHAT}
            url = f"http://127.0.0.1:{control}/faults"
            async with coordinator.session.post(url, json=hang) as response:
                assert response.status == 200
            asked = [asyncio.create_task(streamed(coordinator)) for _ in range(3)]
            for status, body in await asyncio.gather(*asked):
                assert (status, b'"done":true' in body) == (200, True)
            assert not agent.model_cooldowns
