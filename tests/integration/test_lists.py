"""What the fleet lists as if it were one Ollama."""

import time

import ollama as ollama_client
import pytest

from support.coordinator import Running
from support.ollama import Model, StandIn


async def load(coordinator: Running, ollama: StandIn, model: str, **options: object) -> None:
    body = {"model": model, "prompt": "", "options": options}
    async with coordinator.session.post(f"{ollama.url}/api/generate", json=body) as response:
        assert response.status == 200


@pytest.mark.spec("FLEET-21")
async def test_tags_are_the_union_newest_first_in_ollamas_own_rows(coordinator: Running) -> None:
    now = time.time()
    shared = Model("shared", modified_at=now - 50)
    async with (
        StandIn([shared, Model("old", modified_at=now - 900)]) as one,
        StandIn([shared, Model("new", modified_at=now)]) as two,
    ):
        await coordinator.register(one)
        await coordinator.register(two)
        rows = (await coordinator.get("/api/tags"))["models"]
        assert [row["name"] for row in rows] == ["new:latest", "shared:latest", "old:latest"]
        async with coordinator.session.get(f"{one.url}/api/tags") as response:
            own = {row["name"]: row for row in (await response.json())["models"]}
        assert rows[1] == own["shared:latest"]
        openai = await coordinator.get("/v1/models")
        assert [row["id"] for row in openai["data"]] == [row["name"] for row in rows]


@pytest.mark.spec("FLEET-21")
async def test_a_model_stays_listed_while_its_agent_is_offline(
    coordinator: Running, ollama: StandIn
) -> None:
    agent_id = (await coordinator.get("/api/agents"))[0]["id"]
    await coordinator.heartbeat(agent_id, leaving=True)
    assert [row["name"] for row in (await coordinator.get("/api/tags"))["models"]] == [
        "llama3.2:latest"
    ]


@pytest.mark.spec("FLEET-21")
async def test_an_empty_fleet_lists_nothing_as_ollama_does(coordinator: Running) -> None:
    assert await coordinator.get("/api/tags") == {"models": []}
    assert await coordinator.get("/api/ps") == {"models": []}
    assert await coordinator.get("/v1/models") == {"object": "list", "data": None}


@pytest.mark.spec("FLEET-22")
async def test_ps_adds_up_what_several_agents_have_in_memory(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    await load(coordinator, ollama, "llama3.2", num_ctx=8192)
    await load(coordinator, spare, "llama3.2", num_ctx=4096)
    rows = []
    for url in (ollama.url, spare.url):
        async with coordinator.session.get(f"{url}/api/ps") as response:
            rows += (await response.json())["models"]
    await coordinator.parts.monitor.refresh(coordinator.parts.registry, older_than=-1, seconds=5)
    merged = (await coordinator.get("/api/ps"))["models"]
    assert len(merged) == 1
    assert merged[0]["size"] == sum(row["size"] for row in rows)
    assert merged[0]["size_vram"] == sum(row["size_vram"] for row in rows)
    assert merged[0]["context_length"] == 4096
    assert merged[0]["expires_at"] == max(row["expires_at"] for row in rows)
    assert merged[0]["digest"] == rows[0]["digest"]


@pytest.mark.spec("FLEET-23")
async def test_the_version_is_the_lowest_in_rotation(coordinator: Running) -> None:
    assert await coordinator.get("/api/version") == {"version": "0.0.0"}
    versions = ("0.10.1", "0.9.6", "0.0.0")
    one, two, three = (StandIn(version=version) for version in versions)
    async with one, two, three:
        for ollama in (one, two, three):
            await coordinator.register(ollama)
        assert await coordinator.get("/api/version") == {"version": "0.9.6"}
        agents = await coordinator.get("/api/agents")
        slow = next(agent["id"] for agent in agents if agent["ollama_version"] == "0.9.6")
        await coordinator.heartbeat(slow, leaving=True)
        assert await coordinator.get("/api/version") == {"version": "0.10.1"}


@pytest.mark.spec("FLEET-24")
async def test_the_lists_wait_for_no_dead_machine(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    await load(coordinator, spare, "llama3.2")
    ollama.faults.hang()
    agent_id = next(
        a["id"] for a in await coordinator.get("/api/agents") if a["machine_name"] == "spare"
    )
    await coordinator.parts.monitor.refresh([coordinator.agent(agent_id)], older_than=-1, seconds=5)
    for path in ("/api/tags", "/api/ps", "/v1/models", "/api/version"):
        started = time.monotonic()
        await coordinator.get(path)
        assert time.monotonic() - started < 2


async def test_the_python_client_lists(coordinator: Running, ollama: StandIn) -> None:
    await load(coordinator, ollama, "llama3.2")
    client = ollama_client.AsyncClient(coordinator.url)
    await coordinator.parts.monitor.refresh(coordinator.parts.registry, older_than=-1, seconds=5)
    assert [model.model for model in (await client.list()).models] == ["llama3.2:latest"]
    assert [model.model for model in (await client.ps()).models] == ["llama3.2:latest"]
    assert (await client.show("llama3.2")).modelinfo
    await client._client.aclose()


@pytest.mark.spec("SCHED-26")
async def test_what_a_model_can_do_is_asked_once_where_no_list_says_it(
    coordinator: Running,
) -> None:
    """Ollama lists no capabilities before 0.30: a chat model that embeds is asked for them."""
    models = [Model("chatty"), Model("embedder", capabilities=("embedding",))]
    async with StandIn(models, version="0.24.0") as ollama:
        agent = coordinator.agent(await coordinator.register(ollama))
        rows = agent.inventory.available
        assert all(not row.model.capabilities for row in rows.values())
        for name in ("chatty", "chatty", "embedder"):
            status, _ = await coordinator.post("/api/embed", {"model": name, "input": "x"})
            assert status == 200
        await coordinator.until(
            lambda: all(row.model.capabilities for row in agent.inventory.available.values())
        )
        found = {row.model.name: row for row in agent.inventory.available.values()}
        assert (found["chatty:latest"].completes, found["chatty:latest"].embeds) == (True, False)
        assert (found["embedder:latest"].completes, found["embedder:latest"].embeds) == (
            False,
            True,
        )
        await coordinator.post("/api/embed", {"model": "chatty", "input": "x"})
        assert ollama.seen.count("/api/show") == 2
