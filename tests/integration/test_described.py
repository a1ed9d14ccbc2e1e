"""Whatever the description allows, and what it does not: every answer is one that it tells of.

Schemathesis makes requests from the description that the coordinator itself serves, right ones and
wrong ones; they go over real sockets to a coordinator with stand-ins behind it. The same seed every
time.
"""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from ollama_coordinator.api.http.openapi import document
from ollama_coordinator.api.routes import endpoints
from ollama_coordinator.app import create_app
from ollama_coordinator_common.settings import CoordinatorConfig
from support import deaf
from support.asgi import connection
from support.background import Background, background
from support.coordinator import Running, running
from support.deadline import DEADLINE_SECONDS
from support.ollama import StandIn

NEVER_ENDS = {"get_dashboard_events"}
"""An event stream is over when its reader leaves; tests/integration/test_dashboard.py reads it."""

CHECKED = [
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
FUZZ = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def described() -> dict[str, Any]:
    """Our own operations as Schemathesis reads them, by their ids."""
    app = create_app(CoordinatorConfig(database_url="sqlite://:memory:"))
    told = document(endpoints(app.state.parts))
    schema = schemathesis.openapi.from_dict(told).include(tag="coordinator")
    operations: list[Any] = [found.ok() for found in schema.get_all_operations()]  # type: ignore[union-attr]
    return {one.definition.raw["operationId"]: one for one in operations}


def _can_be_wrong(one: Any) -> bool:
    """Whether there is anything in it that could be sent otherwise than described."""
    return bool(one.body) or bool(one.query)


OPERATIONS = {name: one for name, one in described().items() if name not in NEVER_ENDS}
ASKED = [
    *((name, GenerationMode.POSITIVE) for name in OPERATIONS),
    *((name, GenerationMode.NEGATIVE) for name, one in OPERATIONS.items() if _can_be_wrong(one)),
]


@dataclass
class World:
    """A fleet in the background, and things in it to ask for."""

    loop: Background
    coordinator: Running
    session: requests.Session
    known: dict[str, list[str]]
    dead_port: int
    tasks: int

    def at_home(self, case: Any, choose: Any) -> None:
        """Point a case at what is there: ids, models, and no machine but this one."""
        for name in list(case.path_parameters or {}):
            if self.known.get(name) and choose(st.booleans()):
                case.path_parameters[name] = choose(st.sampled_from(self.known[name]))
        if not isinstance(case.body, dict):
            return
        keeps = case.body.get("kind") != "delete"
        if isinstance(case.body.get("model"), str) and keeps and choose(st.booleans()):
            case.body["model"] = "llama3.2"
        if isinstance(case.body.get("agent_id"), str) and choose(st.booleans()):
            case.body["agent_id"] = self.known["agent_id"][0]
        if isinstance(case.body.get("ip_address"), str):
            case.body["ip_address"] = choose(st.sampled_from(["127.0.0.1", "::1", "a b", ""]))
            for port in ("ollama_port", "relay_port"):
                if isinstance(case.body.get(port), int) and 0 < case.body[port] < 65536:
                    case.body[port] = self.dead_port


@asynccontextmanager
async def _fleet() -> AsyncIterator[tuple[Running, dict[str, list[str]]]]:
    async with running() as coordinator, StandIn() as ollama, StandIn() as spare:
        first = await coordinator.register(ollama, "first")
        await coordinator.register(spare, "spare")
        assert (await coordinator.chat())[0] == 200
        load = {"kind": "load", "model": "llama3.2"}
        _, started = await coordinator.post("/api/operations", load)
        (request,) = (await coordinator.get("/api/history"))["requests"]
        known = {
            "agent_id": [first],
            "request_id": [request["id"]],
            "operation_id": [started["id"]],
            "path": ["index.html", "js/app.js"],
        }
        yield coordinator, known


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """One fleet for all examples: what one leaves behind, the next ones meet."""
    with background() as loop, loop.holding(_fleet()) as (coordinator, known):
        with requests.Session() as session:
            tasks = loop.call(lambda: len(asyncio.all_tasks()))
            yield World(loop, coordinator, session, known, _unused_port(), tasks)


def _unused_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.mark.spec("SURFACE-41")
@pytest.mark.parametrize(("name", "mode"), ASKED)
@FUZZ
@given(data=st.data())
def test_an_answer_is_one_that_is_described(
    world: World, name: str, mode: GenerationMode, data: st.DataObject
) -> None:
    described = OPERATIONS[name]
    case = data.draw(described.as_strategy(generation_mode=mode))
    world.at_home(case, data.draw)
    response = case.call(
        base_url=world.coordinator.url, session=world.session, timeout=DEADLINE_SECONDS
    )
    case.validate_response(response, checks=CHECKED)
    told = described.definition.raw["responses"]
    assert response.status_code < 500 or str(response.status_code) in told, response.text


@pytest.mark.spec("SURFACE-41")
async def test_a_registration_of_two_machines_is_described(coordinator: Running) -> None:
    machine = {"machine_name": "gpu", "ip_address": "127.0.0.1", "ollama_version": "0.33.0"}
    disk = {"ollama_port": _unused_port(), "machine_id": "image"}
    statuses = []
    for run in ("one", "other", "one"):
        body = {**machine, **disk, "instance_id": run}
        status, answer = await coordinator.post("/api/agents", body)
        statuses.append(status)
    assert statuses == [201, 200, 409]
    assert list(answer) == ["error"]
    told = OPERATIONS["post_api_agents"].definition.raw["responses"]
    assert set(map(str, statuses)) <= told.keys()


@pytest.mark.spec("SURFACE-41")
@pytest.mark.parametrize("name", [name for name, one in OPERATIONS.items() if one.body])
async def test_a_body_that_stands_still_is_described(ollama: StandIn, name: str) -> None:
    one = OPERATIONS[name]
    async with running(body_timeout=0.05) as coordinator:
        agent_id = await coordinator.register(ollama)
        request = deaf.post(one.path.replace("{agent_id}", agent_id), b"{", length=10)
        async with connection(coordinator.url) as client:
            client.send(request.replace(b"POST", one.method.upper().encode(), 1))
            status = (await client.answer()).status
    assert status == 408
    assert str(status) in one.definition.raw["responses"]


@pytest.mark.spec("SURFACE-41")
def test_nothing_is_left_of_it(world: World) -> None:
    """Runs after the examples above, on the same fleet."""
    coordinator, loop, url = world.coordinator, world.loop, world.coordinator.url
    rows = world.session.get(f"{url}/api/settings").json()["settings"]
    defaults = {row["name"]: None for row in rows if row["editable"]}
    assert world.session.patch(f"{url}/api/settings", json=defaults).status_code == 200
    for agent in world.session.get(f"{url}/api/agents").json():
        if agent["machine_name"] != "spare":
            world.session.delete(f"{url}/api/agents/{agent['id']}")
    loop.run(coordinator.until(coordinator.at_rest))
    operations = coordinator.parts.operations
    loop.run(coordinator.until(lambda: not operations.pending()))
    loop.run(coordinator.until(lambda: all(view.ended_at for view in operations.views())))
    stored = loop.run(coordinator.parts.store.agents())
    assert len(stored) == len(coordinator.parts.registry) == 1
    (agent,) = list(coordinator.parts.registry)
    assert loop.run(coordinator.heartbeat(agent.id)) == 200
    assert loop.run(coordinator.chat())[0] == 200
    world.session.close()
    loop.run(coordinator.session.close())
    _eventually(lambda: not _connections(url))
    _eventually(lambda: loop.call(lambda: len(asyncio.all_tasks())) <= world.tasks)


def _connections(url: str) -> list[Any]:
    """The server's ends of connections."""
    port = int(url.rpartition(":")[2])
    ended = (psutil.CONN_LISTEN, psutil.CONN_TIME_WAIT)
    return [
        one
        for one in psutil.Process().net_connections("tcp")
        if one.laddr.port == port and one.status not in ended
    ]


def _eventually(condition: Callable[[], bool], seconds: float = DEADLINE_SECONDS) -> None:
    """Wait for a fact of the operating system, which announces none."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it does not come about"
        time.sleep(0.01)
