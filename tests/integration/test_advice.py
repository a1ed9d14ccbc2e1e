"""Advice: which replica would have cut the recorded waiting."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ollama_coordinator.db import Finished
from ollama_coordinator_common.names import model_key
from support import programs
from support.coordinator import Running, running
from support.databases import Space
from support.ollama import Model, StandIn
from support.past import crowd

LARGE = Model("qwen3:32b", size_bytes=4_000_000_000)


async def remember(coordinator: Running, requests: list[Finished]) -> None:
    history = coordinator.parts.observation.history
    for request in requests:
        history.note(request, [])
    assert await history.write(())


@asynccontextmanager
async def fleet(**settings: Any) -> AsyncIterator[tuple[Running, str]]:
    """One agent that has the model, and a free one that could have it; the id of the first."""
    async with (
        running(**settings) as coordinator,
        StandIn([LARGE]) as one,
        StandIn([Model("llama3.2")]) as other,
    ):
        ids = [
            await coordinator.register(one, "busy"), await coordinator.register(other, "gpu-3")
        ]  # fmt: skip
        gpu = {"name": "GPU", "memory_total_bytes": 24 * 2**30, "memory_used_bytes": 0}
        for agent in ids:
            await coordinator.heartbeat(agent, gpus=[gpu], disk_free_bytes=10**11)
        key = model_key("qwen3:32b")
        await coordinator.until(lambda: bool(coordinator.parts.registry.holders(key)))
        yield coordinator, ids[0]


async def advised(folder: Path, url: str, *arguments: str) -> str:
    command = programs.command("ollama-coordinator")
    settings = {"COORDINATOR_URL": url, "COLUMNS": "80"}
    log = folder / f"advise{len(arguments)}.log"
    async with programs.program(log, command, "advise", *arguments, **settings) as started:
        assert await started.ended() == 0
        return str(started.output)


@pytest.mark.spec("DASH-60")
@pytest.mark.spec("OPERATION-65")
async def test_a_replica_where_nothing_ran_is_advised(tmp_path: Path, database: Space) -> None:
    async with fleet(database_url=database.url) as (coordinator, busy):
        await remember(coordinator, crowd(busy, 10))
        answer = await coordinator.get("/api/advice")
        assert (answer["requests"], answer["waited_seconds"]) == (10, pytest.approx(2700, abs=1))
        (piece,) = answer["advice"]
        assert (piece["action"], piece["model"], piece["agent"]) == ("pull", "qwen3:32b", "gpu-3")
        assert 2000 < piece["saved_seconds"] < 2700
        assert piece["bytes"] == LARGE.size_bytes
        assert "estimated" in piece["doubts"][0]
        shown = await advised(tmp_path, coordinator.url)
        assert "qwen3:32b on gpu-3 would have saved" in shown
        assert max(map(len, shown.splitlines())) <= 80
        as_json = await advised(tmp_path, coordinator.url, "--json", "--hours", "24")
        assert msgspec.json.decode(as_json)["advice"] == answer["advice"]


@pytest.mark.spec("DASH-61")
async def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    async with fleet() as (coordinator, busy):
        answer = await coordinator.get("/api/advice")
        assert (answer["advice"], answer["since"]) == ([], None)
        assert "nothing is known" in answer["notes"][0]
        await remember(coordinator, crowd(busy, 10, lane="batch"))
        assert (await coordinator.get("/api/advice?hours=23"))["requests"] == 0
        assert "nothing is known" in await advised(tmp_path, coordinator.url, "--hours", "22")
        for hours in ("0", "soon", "10000"):
            async with coordinator.session.get(
                f"{coordinator.url}/api/advice?hours={hours}"
            ) as refused:
                assert refused.status == 400
    async with fleet(policy="round-robin") as (coordinator, busy):
        await remember(coordinator, crowd(busy, 10))
        (note,) = (await coordinator.get("/api/advice"))["notes"]
        assert "does not predict" in note


@pytest.mark.spec("DASH-60")
async def test_no_replica_is_advised_where_it_has_no_room() -> None:
    async with fleet() as (coordinator, busy):
        agents = await coordinator.get("/api/agents")
        free = next(agent["id"] for agent in agents if agent["machine_name"] == "gpu-3")
        await remember(coordinator, crowd(busy, 10))
        await coordinator.heartbeat(free, disk_free_bytes=5 * 10**9)
        answer = await coordinator.get("/api/advice")
        assert (answer["advice"], len(answer["notes"])) == ([], 1)
        gpu = {"name": "GPU", "memory_total_bytes": 2 * 2**30, "memory_used_bytes": 0}
        await coordinator.heartbeat(free, disk_free_bytes=10**11, gpus=[gpu])
        assert (await coordinator.get("/api/advice?hours=23"))["advice"] == []
