"""Who counts as alive, and what happens to the requests of who does not."""

import asyncio
import json
import signal
from collections import Counter
from pathlib import Path

import aiohttp
import pytest
from msgspec import structs

from ollama_coordinator.monitor import LISTS_SECONDS
from ollama_coordinator.registry import AgentState
from support import programs
from support.coordinator import Running, running
from support.ollama import StandIn


def named(coordinator: Running, name: str) -> str:
    return next(agent.id for agent in coordinator.parts.registry if agent.name == name)


async def served_by(coordinator: Running, count: int) -> Counter[str]:
    """Who serves `count` chats, one after the other."""
    agents: Counter[str] = Counter()
    for _ in range(count):
        async with coordinator.stream() as response:
            assert response.status == 200
            await response.read()
        agents[response.headers["X-Ollama-Coordinator-Agent"]] += 1
    return agents


async def served_in_parallel(coordinator: Running, count: int, *ollamas: StandIn) -> list[int]:
    """How many of `count` simultaneous chats each stand-in gets."""
    before = [ollama.seen.count("/api/chat") for ollama in ollamas]
    answers = await asyncio.gather(*(coordinator.chat() for _ in range(count)))
    assert {status for status, _ in answers} == {200}
    after = [ollama.seen.count("/api/chat") for ollama in ollamas]
    return [now - then for now, then in zip(after, before, strict=True)]


@pytest.mark.spec("FLEET-13")
async def test_a_silent_agent_goes_offline_and_comes_back_with_a_heartbeat() -> None:
    async with running(agent_timeout=0.5) as coordinator, StandIn() as ollama:
        agent_id = await coordinator.register(ollama)
        agent = coordinator.agent(agent_id)
        await coordinator.until(
            lambda: not coordinator.parts.registry.is_online(agent, coordinator.parts.clock.now())
        )
        status, answer = await coordinator.chat()
        assert (status, "offline" in answer["error"]) == (503, True)
        assert (await coordinator.get("/api/agents"))[0]["status"] == "offline"
        await coordinator.heartbeat(agent_id)
        assert (await coordinator.chat())[0] == 200


@pytest.mark.spec("FLEET-13")
async def test_an_answer_goes_on_when_only_the_heartbeats_stop() -> None:
    async with running(agent_timeout=0.2) as coordinator, StandIn() as ollama:
        agent = coordinator.agent(await coordinator.register(ollama))
        ollama.hold(after=1)
        async with coordinator.stream() as response:
            await response.content.readline()
            now = coordinator.parts.clock.now
            await coordinator.until(lambda: not coordinator.parts.registry.is_online(agent, now()))
            ollama.release()
            last = (await response.content.read()).splitlines()[-1]
        assert json.loads(last)["done"] is True


@pytest.mark.spec("FLEET-74")
async def test_an_agent_whose_answer_goes_on_is_online_without_heartbeats() -> None:
    async with running(agent_timeout=0.5) as coordinator, StandIn() as ollama:
        agent = coordinator.agent(await coordinator.register(ollama))
        await coordinator.heartbeat(agent.id)
        heard_at = agent.heard_at
        ollama.hold(after=1)
        async with coordinator.stream() as response:
            await response.content.readline()
            await coordinator.until(lambda: agent.heard_at > heard_at)
            [held] = coordinator.parts.dispatch.held()
            assert agent.heard_at == held.progress_at
            await coordinator.heartbeat(agent.id, leaving=True)
            ollama.release()
            await response.content.read()
        assert agent.left


@pytest.mark.spec("FLEET-75")
async def test_after_a_gap_every_agent_is_asked(coordinator: Running, ollama: StandIn) -> None:
    agent = coordinator.agent(named(coordinator, "first"))
    await coordinator.heartbeat(agent.id, tags={"models": []}, ps={"models": []})
    before = ollama.seen.count("/api/version")
    coordinator.parts.clock.gaps += 1
    await coordinator.until(lambda: ollama.seen.count("/api/version") > before)


@pytest.mark.spec("FLEET-75")
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="Windows stops no process")
async def test_a_coordinator_that_was_stopped_blames_no_agent(tmp_path: Path) -> None:
    port = programs.free_port()
    async with (
        StandIn() as ollama,
        aiohttp.ClientSession() as session,
        programs.coordinator(tmp_path, port, AGENT_TIMEOUT="3") as (url, program),
    ):
        facts = {
            "machine_name": "gpu-1",
            "ip_address": "127.0.0.1",
            "ollama_version": ollama.settings.version,
            "ollama_port": ollama.port,
            "instance_id": "a run of its agent",
        }
        async with session.post(f"{url}/api/agents", json=facts) as response:
            assert response.status == 201, await response.text()
        program.send(signal.SIGSTOP)
        await asyncio.sleep(3.5)  # longer than AGENT_TIMEOUT: what is tested is a time
        program.send(signal.SIGCONT)
        async with session.get(f"{url}/api/agents") as response:
            [agent] = await response.json()
        assert agent["status"] == "online"
        assert "agent offline" not in program.output


@pytest.mark.spec("FLEET-14")
@pytest.mark.spec("FLEET-15")
async def test_an_agent_that_was_killed_and_comes_back_gets_its_share(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    await served_in_parallel(coordinator, 8, ollama, spare)
    await ollama.kill()
    assert await served_by(coordinator, 6) == {"spare": 6}
    agent = coordinator.agent(named(coordinator, "first"))
    assert agent.out_of_rotation()
    await ollama.start()
    await coordinator.until(lambda: agent.out_of_rotation() is None)
    # Its memory is empty now: once it has loaded the model, both are equal.
    await ollama.load("llama3.2")
    await coordinator.parts.monitor.look_at(agent, seconds=5)
    ollama.hold()
    spare.hold()
    asked = [asyncio.create_task(coordinator.chat()) for _ in range(10)]
    await coordinator.until(lambda: coordinator.parts.scheduler.in_flight(agent.id) > 0)
    ollama.release()
    spare.release()
    assert {status for status, _ in await asyncio.gather(*asked)} == {200}
    shares = await served_in_parallel(coordinator, 20, ollama, spare)
    assert min(shares) >= 8


@pytest.mark.spec("FLEET-14")
async def test_a_crash_is_one_failure_however_many_requests_it_ends() -> None:
    async def rest(coordinator: Running) -> bytes:
        async with coordinator.stream() as response:
            return await response.read()

    async with running() as coordinator, StandIn(slots=8) as ollama:
        agent = coordinator.agent(await coordinator.register(ollama))
        await coordinator.heartbeat(agent.id, runner={"num_parallel": 8})
        ollama.hold(after=1)
        asked = [asyncio.create_task(rest(coordinator)) for _ in range(8)]
        await coordinator.until(
            lambda: sum(one.records for one in coordinator.parts.dispatch.held()) == 8
        )
        await ollama.kill()
        assert all(b'"error"' in answer for answer in await asyncio.gather(*asked))
        assert agent.cooldown is not None
        assert agent.cooldown.failures <= 3  # itself, and the probes since


@pytest.mark.spec("FLEET-13")
async def test_an_ollama_without_agent_lives_as_long_as_it_answers() -> None:
    async with running(agent_timeout=1.0, health_check_interval=0.1) as coordinator:
        async with StandIn() as ollama:
            agent = coordinator.agent(await coordinator.register(ollama))
            registered_at = agent.heard_at

            def is_online() -> bool:
                return coordinator.parts.registry.is_online(agent, coordinator.parts.clock.now())

            await coordinator.until(lambda: agent.heard_at > registered_at + 1.5)
            assert is_online()
            await ollama.kill()
            await coordinator.until(lambda: not is_online())
            await ollama.start()
            await coordinator.until(lambda: is_online() and agent.out_of_rotation() is None)
            assert (await coordinator.chat())[0] == 200


@pytest.mark.spec("FLEET-17")
async def test_slow_lists_are_no_sign_of_death(coordinator: Running, ollama: StandIn) -> None:
    agent = coordinator.agent(named(coordinator, "first"))
    ollama.faults.hang(paths=["/api/tags"])
    async with asyncio.timeout(LISTS_SECONDS - 1):
        await coordinator.parts.monitor._probe(agent, doubted=True)
    assert not agent.resting


@pytest.mark.spec("FLEET-14")
async def test_a_refused_agent_is_asked_again_by_probes_only(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    ollama.faults.fin()
    assert await served_by(coordinator, 12) == {"spare": 12}
    # One request, and where it went out on a kept connection, once more on a new one.
    assert ollama.seen.count("/api/chat") <= 2


@pytest.mark.spec("FLEET-16")
async def test_a_hanging_agent_holds_up_nobody(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    ollama.faults.hang()
    asked = [asyncio.create_task(coordinator.chat()) for _ in range(6)]
    await coordinator.until(lambda: sum(task.done() for task in asked) >= 3)
    answers = await asyncio.gather(*asked)
    assert {status for status, _ in answers} == {200}
    agent = coordinator.agent(named(coordinator, "first"))
    assert agent.out_of_rotation()
    ollama.faults.clear()
    await coordinator.until(lambda: agent.out_of_rotation() is None)
    await coordinator.until(coordinator.at_rest)
    await ollama.seen.wait_for(lambda seen: seen.active == 0)


@pytest.mark.spec("FLEET-16")
async def test_a_machine_that_vanished_ends_its_streams_with_an_error(
    coordinator: Running, ollama: StandIn
) -> None:
    ollama.hold(after=1)
    async with coordinator.stream() as response:
        await response.content.readline()
        ollama.faults.black_hole()
        held = next(iter(coordinator.parts.dispatch.held()))
        held.progress_at -= 60
        last = (await response.content.read()).splitlines()[-1]
    assert "first does not answer any more" in json.loads(last)["error"]
    await coordinator.until(coordinator.at_rest)


@pytest.mark.spec("FLEET-17")
async def test_a_silent_agent_that_answers_probes_is_waited_for(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    ollama.hold_loads()
    spare.hold_loads()
    asked = asyncio.create_task(coordinator.chat())
    await coordinator.until(lambda: ollama.seen.loading + spare.seen.loading == 1)
    loading = ollama if ollama.seen.loading else spare
    held = next(iter(coordinator.parts.dispatch.held()))
    held.progress_at -= 600
    await loading.seen.another("/api/version")
    await coordinator.until(lambda: held.agent.reached)
    assert held in coordinator.parts.dispatch.held()
    loading.release()
    assert (await asked)[0] == 200
    assert not held.agent.resting


@pytest.mark.spec("PROXY-7")
async def test_a_black_hole_is_left_for_another_agent(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    ollama.faults.refuse().clear()  # no connection left over from the registration
    ollama.faults.black_hole()
    answers = await asyncio.gather(*(coordinator.chat() for _ in range(4)))
    assert {status for status, _ in answers} == {200}
    assert coordinator.agent(named(coordinator, "first")).out_of_rotation()


async def _rest_for_long(coordinator: Running, name: str) -> AgentState:
    """Take an agent out of rotation as after many failures: its next probe is far away."""
    agent = coordinator.agent(named(coordinator, name))
    now = coordinator.parts.clock.now()
    coordinator.parts.dispatch.take_out(agent, "connection refused")
    assert agent.cooldown is not None
    agent.cooldown = structs.replace(agent.cooldown, until=now + 1000)
    return agent


@pytest.mark.spec("FLEET-34")
async def test_a_report_that_ollama_runs_again_is_followed_by_a_probe(
    coordinator: Running, ollama: StandIn
) -> None:
    agent_id = named(coordinator, "first")
    assert await coordinator.heartbeat(agent_id, ollama_running=False) == 200
    agent = await _rest_for_long(coordinator, "first")
    assert await coordinator.heartbeat(agent_id, ollama_running=True) == 200
    await coordinator.until(lambda: agent.out_of_rotation() is None)
    # A report that says so for the second time says nothing new.
    await _rest_for_long(coordinator, "first")
    assert await coordinator.heartbeat(agent_id, ollama_running=True) == 200
    assert agent.cooldown is not None
    assert agent.cooldown.until > coordinator.parts.clock.now() + 900


@pytest.mark.spec("FLEET-34")
@pytest.mark.parametrize("tells_its_models", [False, True])
async def test_a_registration_is_followed_by_a_probe(
    coordinator: Running, ollama: StandIn, *, tells_its_models: bool
) -> None:
    if tells_its_models:
        tags = {"models": [{"name": "llama3.2:latest"}]}
        assert await coordinator.heartbeat(named(coordinator, "first"), tags=tags) == 200
    agent = await _rest_for_long(coordinator, "first")
    await coordinator.register(ollama, "first")
    await coordinator.until(lambda: agent.out_of_rotation() is None)


@pytest.mark.spec("FLEET-35")
async def test_lists_that_come_late_are_no_death(coordinator: Running) -> None:
    """Also at the registration, after a pull, and while a client waits for a list."""
    async with StandIn() as ollama:
        with ollama.faults.hang(paths=["/api/tags"]):
            agent_id = await coordinator.register(ollama, "slow")
            agent = coordinator.agent(agent_id)
            await coordinator.parts.monitor.look_at(agent, seconds=0.1)
            await coordinator.parts.monitor.refresh([agent], older_than=-1, seconds=0.1)
            assert agent.out_of_rotation() is None
            assert agent.inventory.sampled_at is None
            # It is found alive by what answers.
            await _rest_for_long(coordinator, "slow")
            await coordinator.register(ollama, "slow")
            await coordinator.until(lambda: agent.out_of_rotation() is None)
        await coordinator.until(lambda: agent.inventory.sampled_at is not None)
        assert (await coordinator.chat())[0] == 200
        # What is no list is another matter.
        ollama.faults.status(500, paths=["/api/tags"])
        await coordinator.parts.monitor.look_at(agent, seconds=5)
        assert "answers /api/tags with status 500" in (agent.out_of_rotation() or "")


@pytest.mark.spec("PROXY-20")
async def test_the_request_that_meets_a_refused_connection_waits_with_the_others(
    coordinator: Running, ollama: StandIn
) -> None:
    agent = coordinator.agent(named(coordinator, "first"))
    await ollama.kill()
    asked = [asyncio.create_task(coordinator.chat()) for _ in range(3)]
    await coordinator.until(lambda: agent.resting)
    await coordinator.until(lambda: coordinator.parts.scheduler.waiting_count() == 3)
    assert agent.cooldown is not None
    # It is probed twice a second while they wait, which puts no later probe off.
    agent.cooldown = structs.replace(agent.cooldown, until=coordinator.parts.clock.now() + 1000)
    await ollama.start()
    assert [status for status, _ in await asyncio.gather(*asked)] == [200, 200, 200]
    assert ollama.seen.count("/api/chat") == 3
