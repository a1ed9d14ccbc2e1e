"""Lists of a large fleet: made in slices, and only as far as something changed."""

import asyncio

import pytest
from starlette.requests import Request

from ollama_coordinator import aio
from ollama_coordinator.api.models import lists
from ollama_coordinator.api.models.lists import FleetApi, FleetModel, ListsApi, fleet_model
from ollama_coordinator.api.own.agents import AgentsApi
from ollama_coordinator.registry import Registry
from support.coordinator import Running

PATHS = {"/api/tags": "models", "/v1/models": "data", "/api/models": "models"}


def tags(*names: str, digest: str = "1") -> object:
    at = "2026-01-01T00:00:00Z"
    rows = [{"name": name, "digest": digest * 64, "modified_at": at, "size": 1} for name in names]
    return {"models": rows}


async def agents(coordinator: Running, count: int, *names: str) -> list[str]:
    """Agents that report these models, and where nothing listens."""
    found = []
    for number in range(count):
        facts = {"ollama_port": 1 + number, "machine_name": f"gpu-{number}"}
        facts |= {"ip_address": "127.0.0.1", "ollama_version": "0.33.0"}
        _, answer = await coordinator.post("/api/agents", facts)
        found.append(answer["agent_id"])
        await coordinator.heartbeat(found[-1], tags=tags(*names), ps={"models": []})
    return found


@pytest.mark.spec("FLEET-27")
async def test_others_run_while_a_list_is_made(
    coordinator: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    await agents(coordinator, 3, *(f"m{number}" for number in range(50)))
    monkeypatch.setattr(aio, "SLICE_SECONDS", 0.0)
    request = Request({"type": "http"})
    parts = coordinator.parts
    made = ListsApi(parts)
    for make in (made.tags, FleetApi(parts).models, made.ps, AgentsApi(parts).list):
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        counting = asyncio.create_task(count())
        await make(request)
        counting.cancel()
        assert turns >= 2, make


@pytest.mark.spec("FLEET-27")
async def test_only_what_changed_is_made_anew(
    coordinator: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = await agents(coordinator, 2, "a", "b", "c")
    asked: list[str] = []

    def make(registry: Registry, key: str) -> FleetModel:
        asked.append(key)
        return fleet_model(registry, key)

    monkeypatch.setattr(lists, "fleet_model", make)
    assert len((await coordinator.get("/api/models"))["models"]) == 3
    assert len(asked) == 3
    asked.clear()
    await coordinator.get("/api/models")
    assert asked == []
    await coordinator.heartbeat(first, tags=tags("a", "b"))
    rows = (await coordinator.get("/api/models"))["models"]
    assert [key.rpartition("/")[2] for key in asked] == ["c:latest"]
    assert [len(row["holders"]) for row in rows] == [2, 2, 1]
    asked.clear()
    await coordinator.heartbeat(second, ps={"models": [{"name": "b", "size": 1}]})
    rows = (await coordinator.get("/api/models"))["models"]
    assert [key.rpartition("/")[2] for key in asked] == ["b:latest"]
    assert [row["loaded_on"] for row in rows] == [[], [second], []]


@pytest.mark.spec("FLEET-27")
async def test_every_list_tells_what_is_so_now(coordinator: Running) -> None:
    first, second = await agents(coordinator, 2, "a", "b")

    async def names() -> list[list[str]]:
        listed = []
        for path, field in PATHS.items():
            rows = (await coordinator.get(path))[field] or []
            listed.append(sorted(row.get("name") or row["id"] for row in rows))
        return listed

    assert await names() == [["a", "b"]] * 3
    await coordinator.heartbeat(first, tags=tags("a"))
    await coordinator.heartbeat(second, tags=tags("a", "new"))
    assert await names() == [["a", "new"]] * 3
    for agent_id in (first, second):
        url = f"{coordinator.url}/api/agents/{agent_id}"
        async with coordinator.session.delete(url) as response:
            assert response.status == 204
    assert await names() == [[]] * 3


@pytest.mark.spec("FLEET-27")
async def test_an_agent_that_goes_takes_its_vote_for_a_content_along(coordinator: Running) -> None:
    """What is kept of a model follows the preferred content, also without a new list."""
    ids = await agents(coordinator, 3, "a")
    await coordinator.heartbeat(ids[0], tags=tags("a", digest="2"))
    assert (await coordinator.get("/api/tags"))["models"][0]["digest"] == "1" * 64
    for agent_id in ids[1:]:
        await coordinator.heartbeat(agent_id, leaving=True)
    assert (await coordinator.get("/api/tags"))["models"][0]["digest"] == "2" * 64
