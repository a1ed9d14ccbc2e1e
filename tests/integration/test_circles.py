"""Coordinators among each other's agents: no request goes in circles."""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import pytest

from ollama_coordinator.registry import AgentState
from ollama_coordinator_common.protocol import RegisterRequest
from ollama_coordinator_common.types import AgentId
from support.coordinator import Running, running
from support.ollama import StandIn
from support.ollama.node import VERSION


def registration(of: str, name: str = "other") -> dict[str, Any]:
    where = {"ip_address": "127.0.0.1", "ollama_port": urlsplit(of).port}
    return {"machine_name": name, "ollama_version": "unknown", **where}


def put(coordinator: Running, of: str) -> AgentState:
    """An agent that an earlier version took, as it is restored from the database."""
    port = urlsplit(of).port
    assert port is not None
    request = RegisterRequest("other", "127.0.0.1", "0.33.0", port)
    now = coordinator.parts.clock.now()
    agent = AgentState(AgentId(f"at-{port}"), request, datetime.now(UTC), heard_at=now)
    agent.inventory.read_tags(b'{"models":[{"name":"m"}]}', {})
    coordinator.parts.registry.restore(agent, now)
    return agent


@asynccontextmanager
async def circle(count: int) -> AsyncIterator[list[Running]]:
    """Coordinators, each of them the agent of the one before, and the first that of the last."""
    async with _all(count) as coordinators:
        for one, next_one in pairwise([*coordinators, coordinators[0]]):
            put(one, next_one.url)
        yield coordinators


@asynccontextmanager
async def _all(count: int) -> AsyncIterator[list[Running]]:
    if count == 0:
        yield []
        return
    async with running() as one, _all(count - 1) as others:
        yield [one, *others]


def requests() -> Iterable[tuple[str, str, dict[str, Any]]]:
    yield "DELETE", "/api/delete", {"model": "m"}
    yield "POST", "/api/copy", {"source": "m", "destination": "n"}
    # It looks at the agent first, which leaves the rotation then: a delete would be kept for it.
    yield "POST", "/api/pull", {"model": "m"}
    yield "POST", "/api/chat", {"model": "m", "messages": []}
    yield "POST", "/v1/chat/completions", {"model": "m", "messages": []}
    yield "POST", "/api/show", {"model": "m"}


@pytest.mark.spec("FLEET-31")
@pytest.mark.parametrize("count", [1, 2, 3])
async def test_a_request_that_comes_back_ends(count: int) -> None:
    """However many coordinators it passes, every request is answered, and none by itself."""
    async with circle(count) as coordinators:
        first = coordinators[0]
        for method, path, body in requests():
            async with first.session.request(method, first.url + path, json=body) as response:
                text = await response.text()
            # A pull answers 200 and the error in its stream.
            assert response.status >= 400 or '"error"' in text, (method, path, text)
        for one in coordinators:
            await one.until(one.at_rest)


@pytest.mark.spec("FLEET-31")
async def test_a_coordinator_is_not_registered_with_itself(coordinator: Running) -> None:
    status, refused = await coordinator.post("/api/agents", registration(coordinator.url))
    assert status == 400
    assert "is this coordinator itself" in refused["error"]
    assert "give the address and port of an Ollama" in refused["error"]
    assert await coordinator.get("/api/agents") == []


@pytest.mark.spec("FLEET-31")
async def test_one_coordinator_may_stand_behind_another_but_not_in_a_circle(
    coordinator: Running,
) -> None:
    async with running() as middle, running() as last, StandIn() as ollama:
        await last.register(ollama)
        for one, behind in ((middle, last), (coordinator, middle)):
            assert (await one.post("/api/agents", registration(behind.url)))[0] == 201
        assert (await coordinator.chat())[0] == 200
        for behind in (middle, coordinator):
            status, refused = await last.post("/api/agents", registration(behind.url))
            assert status == 400, behind.url
            assert "requests would go in circles" in refused["error"]
        assert len(await last.get("/api/agents")) == 1


@pytest.mark.spec("FLEET-31")
async def test_a_circle_from_before_is_out_of_rotation_and_says_why(coordinator: Running) -> None:
    agent = put(coordinator, coordinator.url)
    await coordinator.until(lambda: agent.out_of_rotation() is not None)
    (row,) = await coordinator.get("/api/agents")
    assert "is this coordinator itself" in row["out_of_rotation"]
    status, answer = await coordinator.chat("m")
    assert status == 503
    assert "is this coordinator itself" in answer["error"]


@pytest.mark.spec("FLEET-32")
async def test_the_version_that_a_probe_reads_counts(coordinator: Running) -> None:
    async with StandIn() as ollama:
        for said in ("unknown", "0.5.7", "", "0.0.0"):
            await coordinator.register(ollama, ollama_version=said)
            assert (await coordinator.get("/api/version"))["version"] == VERSION
            (row,) = await coordinator.get("/api/agents")
            assert row["ollama_version"] == VERSION
    # It is gone: what was read last still counts, and no version of another agent's does.
    for number, said in enumerate(("unknown", "", "0.0.0", "dev")):
        facts = registration(f"http://x:{number + 1}", f"m{number}") | {"ollama_version": said}
        await coordinator.post("/api/agents", facts)
    assert (await coordinator.get("/api/version"))["version"] == VERSION
