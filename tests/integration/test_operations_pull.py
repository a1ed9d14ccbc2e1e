"""Pulling onto a fleet: one stream, whatever happens to the agents and the clients."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from support.coordinator import Running, running
from support.ollama import Model, StandIn
from support.transfers import assert_is_one_clean_stream, lines_of, names, progress

TINY = Model("tiny", size_bytes=3_000_000)
PULL = {"model": "tiny"}


@asynccontextmanager
async def fleet(count: int, **settings: Any) -> AsyncIterator[tuple[Running, list[StandIn]]]:
    """A coordinator and agents that can pull `tiny`."""
    async with AsyncExitStack() as stack:
        coordinator = await stack.enter_async_context(running(**settings))
        ollamas = []
        for number in range(count):
            ollama = await stack.enter_async_context(StandIn([], registry=[TINY]))
            await coordinator.register(ollama, f"agent-{number}")
            ollamas.append(ollama)
        yield coordinator, ollamas


def _stall(ollamas: list[StandIn]) -> None:
    for ollama in ollamas:
        ollama.faults.stall(after=2, paths=["/api/pull"])


async def _all_stalled(ollamas: list[StandIn]) -> None:
    for ollama in ollamas:
        await ollama.seen.wait_for(lambda seen: seen.faulted == 1)


def _idle(coordinator: Running) -> bool:
    operations = coordinator.parts.operations
    return all(view.ended_at is not None for view in operations.views())


@pytest.mark.spec("SURFACE-16")
@pytest.mark.spec("SURFACE-17")
async def test_a_pull_reaches_every_agent_in_one_stream() -> None:
    async with fleet(3) as (coordinator, ollamas):
        lines = await progress(coordinator, "/api/pull", PULL)
        assert_is_one_clean_stream(lines)
        assert lines[0] == {"status": "pulling manifest"}
        steps = [line["status"] for line in lines if "digest" not in line]
        assert steps == [
            "pulling manifest",
            "verifying sha256 digest",
            "writing manifest",
            "success",
        ]
        assert [names(ollama) for ollama in ollamas] == [["tiny:latest"]] * 3
        assert (await coordinator.chat("tiny"))[0] == 200


@pytest.mark.spec("SURFACE-17")
async def test_without_a_stream_only_the_last_object_comes() -> None:
    async with fleet(2) as (coordinator, _):
        answer = await coordinator.post("/api/pull", {**PULL, "stream": False})
        assert answer == (200, {"status": "success"})


@pytest.mark.spec("SURFACE-16")
@pytest.mark.parametrize(
    ("placement", "expected"),
    [("2", 2), ("agents:agent-1", 1), ("label:gpu", 1), ("all", 3), ("agents:agent-0,agent-2", 2)],
)
async def test_the_placement_says_where(placement: str, expected: int) -> None:
    async with fleet(3, pull_placement="1") as (coordinator, ollamas):
        agent = next(iter(coordinator.parts.registry))
        await coordinator.session.patch(
            f"{coordinator.url}/api/agents/{agent.id}", json={"labels": ["gpu"]}
        )
        await progress(
            coordinator, "/api/pull", PULL, {"X-Ollama-Coordinator-Placement": placement}
        )
        assert sum(names(ollama) == ["tiny:latest"] for ollama in ollamas) == expected


@pytest.mark.spec("SURFACE-16")
async def test_the_setting_counts_where_the_request_says_nothing_and_holders_are_updated() -> None:
    async with fleet(3, pull_placement="1") as (coordinator, ollamas):
        await progress(coordinator, "/api/pull", PULL)
        assert sum(len(ollama.models) for ollama in ollamas) == 1
        await progress(coordinator, "/api/pull?placement=2", PULL)
        assert sum(len(ollama.models) for ollama in ollamas) == 2
        before = sum(ollama.seen.count("/api/pull") for ollama in ollamas)
        await progress(coordinator, "/api/pull", PULL)
        assert sum(ollama.seen.count("/api/pull") for ollama in ollamas) == before + 2


@pytest.mark.spec("SURFACE-16")
async def test_a_placement_that_means_nothing_is_400_and_one_that_reaches_nobody_503() -> None:
    async with fleet(1) as (coordinator, _):
        assert (await coordinator.post("/api/pull?placement=some", PULL))[0] == 400
        status, body = await coordinator.post("/api/pull?placement=label:gpu", PULL)
        assert (status, "label:gpu" in body["error"]) == (503, True)
        assert coordinator.parts.operations.pending() == []


@pytest.mark.spec("SURFACE-18")
async def test_several_pulls_of_one_model_are_one() -> None:
    async with fleet(2) as (coordinator, ollamas):
        _stall(ollamas)
        first = asyncio.create_task(progress(coordinator, "/api/pull", PULL))
        await _all_stalled(ollamas)
        async with coordinator.session.post(
            f"{coordinator.url}/api/pull", json={"name": "Tiny:latest"}
        ) as response:
            for ollama in ollamas:
                ollama.faults.clear()
            second = await lines_of(response)
        for lines in (await first, second):
            assert_is_one_clean_stream(lines)
            assert lines[0] == {"status": "pulling manifest"}
        assert [ollama.seen.count("/api/pull") for ollama in ollamas] == [1, 1]


@pytest.mark.spec("SURFACE-18")
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/pull?placement=agents:agent-1", PULL),
        ("/api/pull?placement=agents:agent-0", {**PULL, "insecure": True}),
    ],
)
async def test_a_pull_onto_others_or_in_another_way_has_its_own_end(path: str, body: Any) -> None:
    async with fleet(2) as (coordinator, ollamas):
        ollamas[0].faults.stall(after=2, times=1, paths=["/api/pull"])
        path_of_first = "/api/pull?placement=agents:agent-0"
        first = asyncio.create_task(progress(coordinator, path_of_first, PULL))
        await _all_stalled(ollamas[:1])
        for ollama in ollamas:
            ollama.faults.error_line("no space left on device", after=1, paths=["/api/pull"])
        second = await progress(coordinator, path, body)
        assert second[-1] == {"error": "no space left on device"}
        assert not first.done()
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


@pytest.mark.spec("SURFACE-18")
async def test_a_pull_onto_a_number_that_is_joined_takes_no_more_agents() -> None:
    async with fleet(3) as (coordinator, ollamas):
        _stall(ollamas)
        path = "/api/pull?placement=1"
        first = asyncio.create_task(progress(coordinator, path, PULL))
        await coordinator.until(lambda: any(ollama.seen.faulted for ollama in ollamas))
        async with coordinator.session.post(coordinator.url + path, json=PULL) as response:
            for ollama in ollamas:
                ollama.faults.clear()
            assert (await lines_of(response))[-1] == {"status": "success"}
        await first
        assert sum(ollama.seen.count("/api/pull") for ollama in ollamas) == 1


@pytest.mark.spec("SURFACE-18")
async def test_a_pull_that_was_cancelled_is_not_joined() -> None:
    async with fleet(2) as (coordinator, ollamas):
        _stall(ollamas)
        operations = coordinator.parts.operations
        _, started = await coordinator.post("/api/operations", {"kind": "pull", **PULL})
        await _all_stalled(ollamas)
        for ollama in ollamas:
            ollama.faults.clear()
        cancelled = operations.get(started["id"])
        operations.cancel(cancelled)
        assert not cancelled.is_over
        again = operations.start(cancelled.command, list(coordinator.parts.registry), detached=True)
        await again.feed.over()
        assert (cancelled.state.value, again.state.value) == ("cancelled", "done")
        assert [names(ollama) for ollama in ollamas] == [["tiny:latest"]] * 2


@pytest.mark.spec("SURFACE-18")
async def test_the_end_of_a_cancelled_pull_does_not_touch_the_one_begun_anew() -> None:
    async with fleet(2) as (coordinator, ollamas):
        ollamas[0].faults.error_line("no space left on device", after=1, paths=["/api/pull"])
        _stall(ollamas[1:])
        operations = coordinator.parts.operations
        _, started = await coordinator.post("/api/operations", {"kind": "pull", **PULL})
        cancelled = operations.get(started["id"])
        await coordinator.until(
            lambda: "failed" in {target.state.value for target in cancelled.targets.values()}
        )
        await _all_stalled(ollamas[1:])
        operations.cancel(cancelled)
        operations.start(cancelled.command, list(coordinator.parts.registry), detached=True)
        await cancelled.feed.over()
        owing = {coordinator.agent(pending.agent_id).name for pending in operations.pending()}
        assert "agent-1" in owing


@pytest.mark.spec("SURFACE-19")
async def test_a_pull_that_nobody_waits_for_ends_on_every_agent() -> None:
    async with fleet(2) as (coordinator, ollamas):
        _stall(ollamas)
        async with coordinator.session.post(f"{coordinator.url}/api/pull", json=PULL) as response:
            await response.content.readline()
            await _all_stalled(ollamas)
            response.close()
        for ollama in ollamas:
            await ollama.seen.wait_for(lambda seen: seen.open == 0)
        await coordinator.until(lambda: _idle(coordinator))
        view = coordinator.parts.operations.views()[0]
        assert view.state.value == "cancelled"
        assert coordinator.parts.operations.pending() == []


@pytest.mark.spec("SURFACE-19")
async def test_a_detached_pull_goes_on_without_its_client() -> None:
    async with fleet(2) as (coordinator, ollamas):
        _stall(ollamas)
        async with coordinator.session.post(
            f"{coordinator.url}/api/pull",
            json=PULL,
            headers={"X-Ollama-Coordinator-Detach": "true"},
        ) as response:
            operation_id = response.headers["X-Ollama-Coordinator-Operation"]
            await _all_stalled(ollamas)
            response.close()
        for ollama in ollamas:
            ollama.faults.clear()
        path = f"/api/operations/{operation_id}/progress"
        async with coordinator.session.get(coordinator.url + path) as response:
            assert_is_one_clean_stream(await lines_of(response))
        assert [names(ollama) for ollama in ollamas] == [["tiny:latest"]] * 2


@pytest.mark.spec("SURFACE-20")
@pytest.mark.parametrize("how", ["rst", "fin"])
async def test_an_agent_that_dies_and_returns_goes_on_in_the_same_stream(how: Any) -> None:
    async with fleet(3) as (coordinator, ollamas):
        _stall(ollamas)
        pulling = asyncio.create_task(progress(coordinator, "/api/pull", PULL))
        await _all_stalled(ollamas)
        dying = ollamas[2]
        dying.faults.clear()
        await dying.kill(how)
        await coordinator.until(lambda: any(agent.resting for agent in coordinator.parts.registry))
        await dying.start()
        await dying.seen.wait_for(lambda seen: seen.count("/api/pull") == 2)
        for ollama in ollamas:
            ollama.faults.clear()
        assert_is_one_clean_stream(await pulling)
        assert [names(ollama) for ollama in ollamas] == [["tiny:latest"]] * 3
        assert coordinator.parts.operations.pending() == []
        assert _idle(coordinator)


@pytest.mark.spec("SURFACE-20")
async def test_an_agent_that_stays_away_does_not_hold_up_the_client_and_goes_on_later() -> None:
    async with fleet(2, pull_patience=0.1) as (coordinator, ollamas):
        staying, dying = ollamas
        dying.faults.stall(after=2, paths=["/api/pull"])
        pulling = asyncio.create_task(progress(coordinator, "/api/pull", PULL))
        await dying.seen.wait_for(lambda seen: seen.faulted == 1)
        dying.faults.clear()
        await dying.kill()
        assert_is_one_clean_stream(await pulling)
        assert (names(staying), names(dying)) == (["tiny:latest"], [])
        overview = await coordinator.get("/api/operations")
        assert [(p["agent"], p["kind"]) for p in overview["pending"]] == [("agent-1", "pull")]
        states = {t["agent"]: t["state"] for t in overview["operations"][0]["targets"]}
        assert states == {"agent-0": "done", "agent-1": "pending"}
        await dying.start()
        await coordinator.until(lambda: names(dying) == ["tiny:latest"])
        await coordinator.until(lambda: not coordinator.parts.operations.pending())


@pytest.mark.spec("SURFACE-20")
async def test_a_pull_that_ends_leaves_what_another_one_has_deferred() -> None:
    async with fleet(2) as (coordinator, ollamas):
        away = next(agent.id for agent in coordinator.parts.registry if agent.name == "agent-1")
        await coordinator.heartbeat(away, leaving=True)
        assert (await progress(coordinator, "/api/pull", PULL))[-1] == {"status": "success"}
        deferred = coordinator.parts.operations.pending()
        assert [one.agent_id for one in deferred] == [away]
        _stall(ollamas[:1])
        path = "/api/pull?placement=agents:agent-0,agent-1"
        second = asyncio.create_task(progress(coordinator, path, PULL))
        await _all_stalled(ollamas[:1])
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        await coordinator.until(lambda: _idle(coordinator))
        assert coordinator.parts.operations.pending() == deferred


@pytest.mark.spec("SURFACE-17")
async def test_a_pull_that_the_end_of_the_coordinator_ends_is_no_success() -> None:
    async with fleet(2) as (coordinator, ollamas):
        _stall(ollamas[1:])
        pulling = asyncio.create_task(progress(coordinator, "/api/pull", PULL))
        await _all_stalled(ollamas[1:])
        await coordinator.until(lambda: names(ollamas[0]) == ["tiny:latest"])
        [view] = coordinator.parts.operations.views()
        operation = coordinator.parts.operations.get(view.id)
        await coordinator.until(lambda: "done" in {t.state.value for t in operation.view().targets})
        coordinator.parts.operations.close("the coordinator is shutting down")
        lines = await pulling
        assert lines[-1] == {"error": "the coordinator is shutting down"}
        assert {"status": "success"} not in lines


@pytest.mark.spec("SURFACE-20")
async def test_losing_the_only_agent_is_an_error() -> None:
    async with fleet(1, pull_patience=0.1) as (coordinator, (ollama,)):
        ollama.faults.stall(after=1, paths=["/api/pull"])
        pulling = asyncio.create_task(progress(coordinator, "/api/pull", PULL))
        await ollama.seen.wait_for(lambda seen: seen.faulted == 1)
        await ollama.kill()
        lines = await pulling
        assert "agent-0" in lines[-1]["error"]


@pytest.mark.spec("SURFACE-20")
async def test_an_agent_that_is_away_from_the_start_gets_the_model_when_it_is_there() -> None:
    async with fleet(2) as (coordinator, ollamas):
        ids = [agent.id for agent in coordinator.parts.registry if agent.name == "agent-1"]
        await coordinator.heartbeat(ids[0], leaving=True)
        assert_is_one_clean_stream(await progress(coordinator, "/api/pull", PULL))
        assert names(ollamas[1]) == []
        await coordinator.heartbeat(ids[0])
        await coordinator.until(lambda: names(ollamas[1]) == ["tiny:latest"])


@pytest.mark.spec("SURFACE-21")
async def test_one_agent_with_the_model_is_a_success_and_the_failure_is_shown() -> None:
    async with fleet(2) as (coordinator, ollamas):
        ollamas[0].faults.error_line("no space left on device", after=2, paths=["/api/pull"])
        lines = await progress(coordinator, "/api/pull", PULL)
        assert_is_one_clean_stream(lines)
        assert lines[-2] == {"status": "not on agent-0: no space left on device"}
        targets = (await coordinator.get("/api/operations"))["operations"][0]["targets"]
        errors = {target["agent"]: target["error"] for target in targets}
        assert errors == {"agent-0": "no space left on device", "agent-1": None}
        agent_id = next(a.id for a in coordinator.parts.registry if a.name == "agent-0")
        shown = (await coordinator.get(f"/api/agents/{agent_id}"))["operations"]
        assert [(o["state"], o["error"]) for o in shown] == [("failed", "no space left on device")]


@pytest.mark.spec("SURFACE-21")
async def test_of_many_agents_that_lack_the_model_some_are_named() -> None:
    async with fleet(8) as (coordinator, ollamas):
        for ollama in ollamas[1:]:
            ollama.faults.error_line("full", after=1, paths=["/api/pull"])
        line = (await progress(coordinator, "/api/pull", PULL))[-2]
        assert line["status"].startswith("not on agent-1: full; agent-2: full;")
        assert line["status"].endswith("agent-5: full; and 2 more")


@pytest.mark.spec("SURFACE-21")
async def test_another_agent_takes_the_place_of_one_that_fails() -> None:
    async with fleet(3) as (coordinator, ollamas):
        for ollama in ollamas[:2]:
            ollama.faults.error_line("no space left on device", after=1, paths=["/api/pull"])
        await progress(coordinator, "/api/pull?placement=1", PULL)
        assert names(ollamas[2]) == ["tiny:latest"]


@pytest.mark.spec("SURFACE-21")
@pytest.mark.parametrize("stream", [True, False])
async def test_a_pull_that_fails_everywhere_ends_with_ollamas_own_error(stream: bool) -> None:
    async with fleet(2) as (coordinator, _):
        body = {"model": "nope", "stream": stream}
        text = "pull model manifest: file does not exist"
        if stream:
            lines = await progress(coordinator, "/api/pull", body)
            assert lines == [{"status": "pulling manifest"}, {"error": text}]
        else:
            assert await coordinator.post("/api/pull", body) == (500, {"error": text})
        assert coordinator.parts.operations.pending() == []


@pytest.mark.spec("SURFACE-20")
async def test_a_detached_pull_survives_a_restart_of_the_coordinator(tmp_path: Any) -> None:
    url = f"sqlite:///{tmp_path}/c.db"
    async with StandIn([], registry=[TINY]) as ollama:
        _stall([ollama])
        async with running(database_url=url) as coordinator:
            await coordinator.register(ollama, "first")
            wanted = {"kind": "pull", "model": "tiny"}
            assert (await coordinator.post("/api/operations", wanted))[0] == 202
            await _all_stalled([ollama])
        ollama.faults.clear()
        async with running(database_url=url) as coordinator:
            await coordinator.until(lambda: names(ollama) == ["tiny:latest"])
            await coordinator.until(lambda: not coordinator.parts.operations.pending())
