"""Copy, delete, load, unload: on every agent, also on those that are away for now."""

from pathlib import Path
from typing import Any

import pytest

from support.coordinator import Running, running
from support.ollama import Model, StandIn
from support.transfers import names

LLAMA = {"name": "llama3.2", "model": ""}


async def _delete(coordinator: Running, body: Any) -> tuple[int, str]:
    url = f"{coordinator.url}/api/delete"
    async with coordinator.session.delete(url, json=body) as response:
        return response.status, await response.text()


async def _ended(coordinator: Running, body: dict[str, Any]) -> dict[str, Any]:
    """An operation of our own API, once it has ended."""
    status, started = await coordinator.post("/api/operations", body)
    assert status == 202, started
    operation = coordinator.parts.operations.get(started["id"])
    await operation.feed.over()
    view: dict[str, Any] = await coordinator.get(f"/api/operations/{started['id']}")
    return view


@pytest.mark.spec("SURFACE-22")
async def test_copy_and_delete_happen_on_every_holder(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    async with StandIn([Model("other")]) as other:
        await coordinator.register(other, "other")
        ends = {"source": "llama3.2", "destination": "mine"}
        async with coordinator.session.post(f"{coordinator.url}/api/copy", json=ends) as response:
            assert (response.status, await response.read()) == (200, b"")
        assert [names(each) for each in (ollama, spare, other)] == [
            ["llama3.2:latest", "mine:latest"],
            ["llama3.2:latest", "mine:latest"],
            ["other:latest"],
        ]
        assert (await coordinator.chat("mine"))[0] == 200
        assert await _delete(coordinator, {"model": "MINE"}) == (200, "")
        assert [names(each) for each in (ollama, spare)] == [["llama3.2:latest"]] * 2
        assert (await coordinator.chat("mine"))[0] == 404


@pytest.mark.spec("SURFACE-22")
async def test_an_agent_that_is_away_deletes_when_it_returns_also_after_a_restart(
    tmp_path: Path,
) -> None:
    url = f"sqlite:///{tmp_path}/c.db"
    async with StandIn() as here, StandIn() as away:
        async with running(database_url=url) as coordinator:
            await coordinator.register(here, "here")
            agent_id = await coordinator.register(away, "away")
            await coordinator.heartbeat(agent_id, leaving=True)
            assert (await _delete(coordinator, LLAMA))[0] == 200
            assert (names(here), names(away)) == ([], ["llama3.2:latest"])
            assert (await coordinator.get("/api/tags"))["models"] == []
            owed = (await coordinator.get(f"/api/agents/{agent_id}"))["operations"]
            assert ("delete", "pending") in {(o["kind"], o["state"]) for o in owed}
        async with running(database_url=url) as coordinator:
            assert (await coordinator.get("/api/tags"))["models"] == []
            await coordinator.heartbeat(agent_id)
            await coordinator.until(lambda: names(away) == [])
            await coordinator.until(lambda: not coordinator.parts.operations.pending())


@pytest.mark.spec("SURFACE-22")
async def test_a_delete_that_an_agent_cannot_do_is_an_error(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    spare.faults.status(500, "permission denied", paths=["/api/delete"])
    status, text = await _delete(coordinator, LLAMA)
    assert (status, text) == (500, '{"error":"permission denied"}')


@pytest.mark.spec("SURFACE-22")
async def test_all_holders_away_delete_when_they_return(
    coordinator: Running, ollama: StandIn
) -> None:
    agent_id = next(agent.id for agent in coordinator.parts.registry)
    await coordinator.heartbeat(agent_id, leaving=True)
    assert (await _delete(coordinator, LLAMA))[0] == 200
    await coordinator.heartbeat(agent_id)
    await coordinator.until(lambda: names(ollama) == [])


@pytest.mark.spec("SURFACE-22")
async def test_a_copy_is_made_up_for_by_an_agent_that_was_away(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    away = next(agent.id for agent in coordinator.parts.registry if agent.name == "spare")
    await coordinator.heartbeat(away, leaving=True)
    ends = {"source": "llama3.2", "destination": "mine"}
    async with coordinator.session.post(f"{coordinator.url}/api/copy", json=ends) as response:
        assert response.status == 200
    await coordinator.heartbeat(away)
    await coordinator.until(lambda: "mine:latest" in names(spare))


@pytest.mark.spec("SURFACE-23")
async def test_an_agent_that_was_away_makes_the_newest_of_several_copies(
    coordinator: Running,
) -> None:
    models = [Model("a", digest="a" * 64), Model("b", digest="b" * 64)]
    async with StandIn(models) as here, StandIn(models) as away:
        await coordinator.register(here, "here")
        agent_id = await coordinator.register(away, "away")
        await coordinator.heartbeat(agent_id, leaving=True)
        for source in ("a", "b"):
            ends = {"source": source, "destination": "m"}
            async with coordinator.session.post(
                f"{coordinator.url}/api/copy", json=ends
            ) as response:
                assert response.status == 200
        await coordinator.heartbeat(agent_id)
        await coordinator.until(lambda: not coordinator.parts.operations.pending())
        copies = [ollama.models.find("m") for ollama in (here, away)]
        assert [copy.digest for copy in copies if copy is not None] == ["b" * 64] * 2


@pytest.mark.spec("SURFACE-23")
async def test_a_pull_makes_a_deferred_delete_void(coordinator: Running) -> None:
    registry = [Model("llama3.2")]
    async with StandIn(registry=registry) as here, StandIn(registry=registry) as away:
        await coordinator.register(here, "here")
        agent_id = await coordinator.register(away, "away")
        await coordinator.heartbeat(agent_id, leaving=True)
        assert (await _delete(coordinator, LLAMA))[0] == 200
        status, _ = await coordinator.post("/api/pull", {**LLAMA, "stream": False})
        assert status == 200
        assert [p.command.kind.value for p in coordinator.parts.operations.pending()] == ["pull"]
        await coordinator.heartbeat(agent_id)
        await coordinator.until(lambda: not coordinator.parts.operations.pending())
        assert names(away) == ["llama3.2:latest"]
        assert away.seen.count("/api/delete") == 0


async def _copy(coordinator: Running, source: str, destination: str) -> int:
    ends = {"source": source, "destination": destination}
    async with coordinator.session.post(f"{coordinator.url}/api/copy", json=ends) as response:
        return response.status


@pytest.mark.spec("SURFACE-44")
async def test_a_deleted_model_is_not_made_by_an_agent_that_was_away(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    away = next(agent.id for agent in coordinator.parts.registry if agent.name == "spare")
    await coordinator.heartbeat(away, leaving=True)
    assert await _copy(coordinator, "llama3.2", "mine") == 200
    create = {"model": "made", "from": "llama3.2", "system": "s", "stream": False}
    assert (await coordinator.post("/api/create", create))[0] == 200
    kinds = [deferred.command.kind.value for deferred in coordinator.parts.operations.pending()]
    assert kinds == ["copy", "create"]
    for name in ("mine", "made"):
        assert await _delete(coordinator, {"model": name}) == (200, "")
    assert coordinator.parts.operations.pending() == []
    await coordinator.heartbeat(away)
    assert (await coordinator.chat())[0] == 200
    assert [names(each) for each in (ollama, spare)] == [["llama3.2:latest"]] * 2


@pytest.mark.spec("SURFACE-44")
async def test_a_model_that_nobody_has_yet_is_deleted_from_what_is_deferred(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    there, away = [agent.id for agent in coordinator.parts.registry]
    await coordinator.heartbeat(away, leaving=True)
    assert await _copy(coordinator, "llama3.2", "mine") == 200
    async with coordinator.session.delete(f"{coordinator.url}/api/agents/{there}"):
        pass
    assert (await _delete(coordinator, {"model": "mine"}))[0] == 200
    assert coordinator.parts.operations.pending() == []
    assert (await _delete(coordinator, {"model": "mine"}))[0] == 404


@pytest.mark.spec("SURFACE-44")
async def test_a_delete_ends_what_is_about_to_make_the_model(coordinator: Running) -> None:
    async with StandIn([Model("m")]) as holder, StandIn([], registry=[Model("m")]) as puller:
        await coordinator.register(holder, "holder")
        await coordinator.register(puller, "puller")
        puller.faults.stall(after=1, paths=["/api/pull"])
        body = {"kind": "pull", "model": "m", "placement": "agents:puller"}
        _, started = await coordinator.post("/api/operations", body)
        await puller.seen.wait_for(lambda seen: seen.faulted == 1)
        assert await _delete(coordinator, {"model": "m"}) == (200, "")
        operation = coordinator.parts.operations.get(started["id"])
        await operation.feed.over()
        assert str(operation.error) == "a newer delete of the model takes its place"
        assert coordinator.parts.operations.pending() == []
        assert [names(each) for each in (holder, puller)] == [[], []]


@pytest.mark.spec("SURFACE-23")
async def test_a_newer_model_of_the_name_voids_the_older_one_that_another_agent_would_make(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    away = next(agent.id for agent in coordinator.parts.registry if agent.name == "spare")
    await coordinator.heartbeat(away, leaving=True)
    create = {"model": "made", "from": "llama3.2", "stream": False}
    assert (await coordinator.post("/api/create", {**create, "system": "old"}))[0] == 200
    assert len(coordinator.parts.operations.pending()) == 1
    path = "/api/create?placement=agents:first"
    assert (await coordinator.post(path, {**create, "system": "new"}))[0] == 200
    assert coordinator.parts.operations.pending() == []


@pytest.mark.spec("SURFACE-23")
async def test_a_deferred_delete_that_is_resumed_voids_nothing_newer(coordinator: Running) -> None:
    models = [Model("m"), Model("other")]
    async with StandIn(models) as here, StandIn(models) as old, StandIn([Model("other")]) as new:
        nodes = {"here": here, "old": old, "new": new}
        ids = {name: await coordinator.register(node, name) for name, node in nodes.items()}
        for name in ("old", "new"):
            await coordinator.heartbeat(ids[name], leaving=True)
        assert (await _delete(coordinator, {"model": "m"}))[0] == 200
        create = {"model": "m", "from": "other", "system": "s", "stream": False}
        status, _ = await coordinator.post("/api/create?placement=agents:here,new", create)
        assert status == 200
        await coordinator.heartbeat(ids["old"])
        await coordinator.until(lambda: "m:latest" not in names(old))
        await coordinator.heartbeat(ids["new"])
        await coordinator.until(lambda: "m:latest" in names(new))
        assert "m:latest" in names(here)


@pytest.mark.spec("SURFACE-27")
async def test_a_model_is_loaded_on_several_agents_and_unloaded_on_all(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    view = await _ended(
        coordinator,
        {"kind": "load", "model": "llama3.2", "placement": "2", "keep_alive": "1h"},
    )
    assert view["state"] == "done"
    assert [ollama.loaded, spare.loaded] == [["llama3.2:latest"]] * 2
    assert len((await coordinator.get("/api/models"))["models"][0]["loaded_on"]) == 2
    view = await _ended(coordinator, {"kind": "unload", "model": "llama3.2"})
    assert [target["state"] for target in view["targets"]] == ["done", "done"]
    assert [ollama.loaded, spare.loaded] == [[], []]


@pytest.mark.spec("SURFACE-27")
async def test_an_agent_that_drains_loads_only_where_no_other_can(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    ids = {agent.name: agent.id for agent in coordinator.parts.registry}
    load = {"kind": "load", "model": "llama3.2", "placement": "2"}

    async def drain(name: str) -> None:
        url = f"{coordinator.url}/api/agents/{ids[name]}"
        await coordinator.session.patch(url, json={"draining": True})

    await drain("first")
    assert (await _ended(coordinator, load))["state"] == "done"
    assert [ollama.loaded, spare.loaded] == [[], ["llama3.2:latest"]]
    await drain("spare")
    assert (await _ended(coordinator, load))["state"] == "done"
    assert [ollama.loaded, spare.loaded] == [["llama3.2:latest"]] * 2


@pytest.mark.spec("SURFACE-27")
async def test_a_model_that_embeds_is_loaded_without_generating(coordinator: Running) -> None:
    async with StandIn([Model("embedder", capabilities=("embedding",))]) as ollama:
        await coordinator.register(ollama, "first")
        view = await _ended(coordinator, {"kind": "load", "model": "embedder"})
        assert (view["state"], ollama.loaded) == ("done", ["embedder:latest"])


@pytest.mark.spec("SURFACE-26")
@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"kind": "load", "model": "nope"}, 404),
        ({"kind": "delete", "model": "nope"}, 404),
        ({"kind": "unload", "model": "nope"}, 404),
        ({"kind": "copy", "model": "llama3.2"}, 400),
        ({"kind": "copy", "model": "llama3.2", "destination": "a b"}, 400),
        ({"kind": "pull", "model": "a b"}, 400),
        ({"kind": "pull", "model": "m", "placement": "some"}, 400),
        ({"kind": "melt", "model": "m"}, 400),
        ({"kind": "load", "model": "llama3.2", "placement": "label:gpu"}, 503),
    ],
)
async def test_an_operation_that_cannot_start_is_refused(
    coordinator: Running, ollama: StandIn, body: dict[str, str], status: int
) -> None:
    answer = await coordinator.post("/api/operations", body)
    assert answer[0] == status, answer
    assert isinstance(answer[1]["error"], str)


@pytest.mark.spec("SURFACE-26")
async def test_operations_are_listed_followed_and_cancelled(coordinator: Running) -> None:
    async with StandIn([], registry=[Model("tiny", size_bytes=1_000)]) as ollama:
        await coordinator.register(ollama, "first")
        ollama.faults.stall(after=1, paths=["/api/pull"])
        _, started = await coordinator.post("/api/operations", {"kind": "pull", "model": "tiny"})
        await ollama.seen.wait_for(lambda seen: seen.faulted == 1)
        path = f"{coordinator.url}/api/operations/{started['id']}"
        async with coordinator.session.get(f"{path}/progress") as following:
            assert await following.content.readline() == b'{"status":"pulling manifest"}\n'
            async with coordinator.session.delete(path) as cancelled:
                assert (await cancelled.json())["state"] == "cancelled"
            assert await following.content.read() == b'{"error":"the operation was cancelled"}\n'
        await ollama.seen.wait_for(lambda seen: seen.open == 0)
        agent_id = next(iter(coordinator.parts.registry)).id
        mine = await coordinator.get(f"/api/operations?agent={agent_id}")
        assert [view["id"] for view in mine["operations"]] == [started["id"]]
        assert mine["pending"] == []
        nobodys = await coordinator.get("/api/operations?agent=nobody")
        assert nobodys == {"operations": [], "pending": []}
        async with coordinator.session.get(f"{path}x") as unknown:
            assert unknown.status == 404
