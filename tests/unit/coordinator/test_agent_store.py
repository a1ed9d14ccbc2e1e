"""Agents on their way into the database and back."""

import json
from datetime import UTC, datetime

import pytest

from ollama_coordinator.agent_store import AgentStore
from ollama_coordinator.clock import Clock
from ollama_coordinator.db import Store
from ollama_coordinator.registry import AgentSettings, AgentState, Registry
from ollama_coordinator_common.names import model_key
from ollama_coordinator_common.protocol import HealthReport, RegisterRequest
from ollama_coordinator_common.types import AgentId, AgentStatus
from support.databases import Space, store_of

AT = datetime(2026, 1, 1, tzinfo=UTC)
M = model_key("m")
TAGS = json.dumps({"models": [{"name": "m:latest", "digest": "d", "x": [1]}]}).encode()


class SetClock(Clock):
    """A monotonic clock that a test sets; the wall clock goes with it."""

    def __init__(self, monotonic: float) -> None:
        super().__init__()
        self.monotonic_now = monotonic

    def now(self) -> float:
        return self.monotonic_now

    def _epoch(self) -> float:
        return AT.timestamp() - 1000.0


class Process:
    """One run of a coordinator, as far as it keeps things."""

    def __init__(self, store: Store, now: float = 1000.0) -> None:
        self.clock = SetClock(now)
        self.registry = Registry(60.0)
        self.agent_store = AgentStore(self.registry, store, self.clock)

    def register(self, name: str = "gpu-1") -> AgentState:
        request = RegisterRequest(name, "10.0.0.1", "0.33.0", 11434, f"id of {name}")
        now = self.clock.now()
        return self.registry.register(request, AgentId(name), self.clock.utc(now), now).agent

    async def restored(self) -> AgentState:
        await self.agent_store.restore()
        (agent,) = self.registry
        return agent


async def test_an_agent_comes_back_with_everything_an_operator_would_miss(database: Space) -> None:
    async with store_of(database) as store:
        before = Process(store)
        agent = before.register()
        before.registry.list_models(agent, TAGS, {"m": "sha256:0"}, 1000.0)
        settings = AgentSettings("Rack 3", ["fast"], "new fan", True, 2.0)
        before.registry.update_settings(agent.id, settings)
        await before.agent_store.keep_now(agent)
    async with store_of(database) as store:
        after = Process(store, now=1030.0)
        again = await after.restored()
    assert again.id == agent.id
    assert again.registration == agent.registration
    assert again.registered_at == agent.registered_at
    assert again.settings == settings
    assert again.inventory.available == agent.inventory.available
    assert after.registry.holders(M) == [again]
    assert again.status(1030.0, 60.0) is AgentStatus.DRAINING


@pytest.mark.parametrize(("pause", "online"), [(59.0, True), (61.0, False)])
async def test_an_agent_is_as_alive_as_it_was_last_heard(
    database: Space, pause: float, online: bool
) -> None:
    async with store_of(database) as store:
        before = Process(store)
        agent = before.register()
        await before.agent_store.keep_now(agent)
        before.clock.monotonic_now += 50.0
        before.registry.heard(agent, before.clock.now())
        before.agent_store.keep_seen(agent)
        await store.flush()
        after = Process(store, now=1050.0 + pause)
        again = await after.restored()
        assert after.registry.is_online(again, after.clock.now()) is online


async def test_a_wall_clock_that_jumped_back_makes_nobody_hear_the_future(database: Space) -> None:
    async with store_of(database) as store:
        before = Process(store, now=5000.0)
        await before.agent_store.keep_now(before.register())
        after = Process(store, now=1000.0)
        again = await after.restored()
        assert again.heard_at == 1000.0


async def test_an_agent_that_said_goodbye_is_still_gone_after_a_restart(database: Space) -> None:
    async with store_of(database) as store:
        before = Process(store)
        agent = before.register()
        before.registry.heartbeat(HealthReport(agent.id, 0, 0, 0, leaving=True), 1000.0)
        before.agent_store.keep(agent)
        await store.flush()
        after = Process(store)
        again = await after.restored()
        assert again.left
        assert not after.registry.is_online(again, 1000.0)


async def test_a_removed_agent_does_not_come_back(database: Space) -> None:
    async with store_of(database) as store:
        before = Process(store)
        agent = before.register()
        await before.agent_store.keep_now(agent)
        before.registry.remove(agent.id)
        await before.agent_store.forget(agent.id)
        # The answer to a question that was asked before the removal.
        before.registry.list_models(agent, TAGS, {}, 1001.0)
        before.agent_store.keep(agent)
        before.agent_store.keep_seen(agent)
        await store.flush()
        after = Process(store)
        await after.agent_store.restore()
        assert list(after.registry) == []
