"""Several coordinators with one database, and models that move by themselves: one of them moves."""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from integration.test_models_move import KEY, TINY, from_internet, left_over, manifest
from ollama_coordinator.db import SharedDatabase, database_of
from ollama_coordinator.db.finished import INSERT, to_columns
from ollama_coordinator_agent import model_server, watch
from ollama_coordinator_common.settings import AgentConfig
from support import agent_world
from support.cluster import CHAT, Coordinator, started
from support.databases import PostgresSchema
from support.deadline import DEADLINE_SECONDS
from support.ollama import Model, StandIn
from support.past import crowd
from support.transfers import names

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals there are another matter")

HURRIED = """
from ollama_coordinator.journal import advice
from ollama_coordinator.operations import rebalance, runner

advice.KEPT_SECONDS = 0.0
rebalance.REBALANCE_SECONDS = runner.SWEEP_SECONDS = 0.5
follow = rebalance.Rebalance.apply

async def told(self, *given, **named):
    done = await follow(self, *given, **named)
    print("looked at the advice", flush=True)
    return done

rebalance.Rebalance.apply = told
"""
"""What a program is changed to before it starts: advice is followed twice a second."""

PACE = msgspec.structs.replace(agent_world.FAST, heartbeat=4.0)
"""As real ones, agents are silent for longer than a transfer waits for a machine that gives."""

FRESH = Model("fresh", size_bytes=200_000)
CHAT_MODEL = Model("llama3.2", size_bytes=10_000)


class Gate:
    """Holds the files that machines give back, once some bytes were given."""

    def __init__(self) -> None:
        self.opened, self.reached = asyncio.Event(), asyncio.Event()
        send = model_server.ModelServer._send

        async def held(server: Any, request: Any, file: Any) -> Any:
            self.reached.set()
            await self.opened.wait()
            return await send(server, request, file)

        self.send = held


class World:
    """Two coordinators, the first of which leads, and two machines; the first has the model."""

    def __init__(self, coordinators: list[Coordinator], ollamas: list[StandIn], url: str) -> None:
        self.coordinators = coordinators
        self.ollamas = ollamas
        self.url = url

    async def agents(self) -> dict[str, str]:
        """The ids of the machines by their names, once both have reported."""
        while True:
            agents = await self.coordinators[1].get("/api/agents", 503)
            heard = {
                one["machine_name"]: one["id"] for one in agents if one.get("memory_total_bytes")
            }
            if len(heard) == 2:
                return heard
            await asyncio.sleep(0.05)

    def crowd(self, agent_id: str) -> None:
        """Have had so many requests for the model that a second machine should have it."""
        database = database_of(self.url)
        assert isinstance(database, SharedDatabase)
        database.open_beside()
        with closing(database), database.atomic():
            past = [msgspec.structs.replace(one, model="tiny") for one in crowd(agent_id, 30)]
            database.execute_many(INSERT, [to_columns(one, b"[]") for one in past])


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate = Gate()
    monkeypatch.setattr(model_server.ModelServer, "_send", gate.send)
    return gate


@pytest.fixture
async def world(
    tmp_path: Path, postgres: PostgresSchema, monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> AsyncIterator[World]:
    folders: dict[int, Path] = {}

    def environment(port: int) -> dict[str, str]:
        return {"OLLAMA_MODELS": str(folders[port])}

    monkeypatch.setattr(watch, "environment_of_listener", environment)
    (tmp_path / "changed").mkdir()
    (tmp_path / "changed" / "sitecustomize.py").write_text(HURRIED)
    settings = {"PYTHONPATH": str(tmp_path / "changed"), "COORDINATOR_REBALANCE": "auto"}
    async with AsyncExitStack() as stack:
        coordinators = []
        for number in range(2):
            folder = tmp_path / f"coordinator-{number}"
            made = await stack.enter_async_context(started(folder, postgres.url, **settings))
            await made.program.says("stands by" if number else "coordinator leads")
            coordinators.append(made)
        ollamas = []
        for number, held in enumerate(([TINY, CHAT_MODEL], [])):
            folder = tmp_path / f"machine-{number}"
            ollama = await stack.enter_async_context(
                StandIn(held, registry=[FRESH], on_disk=True, models_path=str(folder))
            )
            folders[ollama.port] = folder
            config = AgentConfig(
                coordinator_url=",".join(one.url for one in coordinators),
                ollama_port=ollama.port, machine_name=f"machine-{number}",
                state_dir=tmp_path / f"state-{number}", manage_ollama=False,
                ip_address="127.0.0.1",
            )  # fmt: skip
            await stack.enter_async_context(agent_world.running(config, pace=PACE))
            ollamas.append(ollama)
        yield World(coordinators, ollamas, postgres.url)


SIGNALS = {"killed": signal.SIGKILL, "told to stop": signal.SIGTERM, "frozen": signal.SIGSTOP}


def _pulls(ollama: StandIn) -> list[Any]:
    return ollama.seen.of("/api/pull")


@pytest.mark.spec("CLUSTER-15")
@pytest.mark.parametrize("end", SIGNALS)
async def test_a_leader_that_is_lost_amid_a_move_leaves_it_to_the_next_one(
    world: World, gate: Gate, postgres: PostgresSchema, end: str
) -> None:
    first, second = world.coordinators
    async with asyncio.timeout(DEADLINE_SECONDS):
        there = await world.agents()
        world.crowd(there["machine-0"])
        await gate.reached.wait()
    # The move is in the database, and the leader has looked again while it was under way.
    seen = first.program.output.count("looked at the advice")
    await first.program.says_so_often("looked at the advice", seen + 4)
    assert "looked at the advice" not in second.program.output
    assert len(_pulls(world.ollamas[1])) == 1
    async with AsyncExitStack() as stack:
        if end == "told to stop":  # it stays as long as this answer
            world.ollamas[0].hold(after=1)
            request = first.session.post(f"{first.url}/api/chat", json=CHAT)
            await (await stack.enter_async_context(request)).content.readline()
        first.program.send(SIGNALS[end])
        await second.leads(epoch=2)
        await second.program.says_so_often("looked at the advice", 2)
        gate.opened.set()
        async with asyncio.timeout(DEADLINE_SECONDS):
            while names(world.ollamas[1]) != ["tiny:latest"]:
                await asyncio.sleep(0.05)
    if end == "frozen":
        first.program.send(signal.SIGCONT)
        await first.program.says("stands by")
    seen = second.program.output.count("looked at the advice")
    await second.program.says_so_often("looked at the advice", seen + 3)
    assert names(world.ollamas[1]) == ["tiny:latest"]
    assert left_over(world.ollamas[1]) == []
    assert manifest(world.ollamas[1]) == manifest(world.ollamas[0])
    pulls = _pulls(world.ollamas[1])
    assert len(pulls) == 2, [(one.at, one.ended, one.body) for one in pulls]
    if end != "frozen":  # which holds its connections
        assert (pulls[0].ended or 0) <= pulls[1].at
    audit = await second.get("/api/audit")
    moves = [one["subject"] for one in audit["changes"] if one["by"] == "rebalance"]
    assert moves == [KEY]
    # It may leave again for another one, as nobody brought it by hand.
    [(kept,)] = postgres.ask("SELECT body FROM documents WHERE name = 'moves'")
    moved = json.loads(kept)["brought"]
    assert [(one["agent_id"], one["key"]) for one in moved] == [(there["machine-1"], KEY)]


@pytest.mark.spec("CLUSTER-15")
async def test_a_pull_that_a_new_leader_goes_on_with_comes_once_from_the_internet(
    world: World, gate: Gate, postgres: PostgresSchema
) -> None:
    first, second = world.coordinators
    gate.opened.set()
    stalls = [one.faults.stall(paths=("/api/pull",)) for one in world.ollamas]
    async with asyncio.timeout(DEADLINE_SECONDS):
        await world.agents()
        order = {"kind": "pull", "model": "fresh", "placement": "all"}
        async with first.session.post(f"{first.url}/api/operations", json=order) as response:
            assert response.status == 202, await response.text()
        kept = "SELECT body FROM documents WHERE name = 'pending-operations' AND body <> '[]'"
        while not postgres.ask(kept) or not from_internet(world.ollamas):
            await asyncio.sleep(0.05)
        first.program.send(signal.SIGKILL)
        await second.leads(epoch=2)
        for stall in stalls:
            stall.clear()
        while any("fresh:latest" not in names(one) for one in world.ollamas):
            await asyncio.sleep(0.05)
    # One before, and one after.
    assert len(from_internet(world.ollamas)) == 2
