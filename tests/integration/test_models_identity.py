"""One name, several contents: who is asked, and who is told."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from support.coordinator import Running
from support.ollama import Model, StandIn

OLD, NEW = "a" * 64, "b" * 64


def _old() -> StandIn:
    return StandIn([Model("m", digest=OLD, modified_at=1_700_000_000.0)])


def _new() -> StandIn:
    return StandIn([Model("m", digest=NEW, modified_at=1_700_000_100.0)])


@pytest.mark.spec("SURFACE-11")
async def test_requests_go_only_to_the_content_that_most_agents_have(
    coordinator: Running,
) -> None:
    async with _old() as first, _old() as second, _new() as stranger:
        for name, ollama in (("first", first), ("second", second), ("stranger", stranger)):
            await coordinator.register(ollama, name)
        for _ in range(6):
            assert (await coordinator.chat("m"))[0] == 200
        assert stranger.seen.count("/api/chat") == 0
        rows = (await coordinator.get("/api/tags"))["models"]
        assert [row["digest"] for row in rows] == [OLD]


@pytest.mark.spec("SURFACE-11")
async def test_of_as_many_agents_the_newest_content_counts(coordinator: Running) -> None:
    async with _old() as first, _new() as second:
        await coordinator.register(first, "first")
        await coordinator.register(second, "second")
        assert (await coordinator.chat("m"))[0] == 200
        assert (first.seen.count("/api/chat"), second.seen.count("/api/chat")) == (0, 1)


@pytest.mark.spec("SURFACE-11")
async def test_agents_that_are_away_do_not_make_a_model_unreachable(
    coordinator: Running,
) -> None:
    async with _old() as first, _old() as second, _new() as third:
        ids = [await coordinator.register(o, f"a{o.port}") for o in (first, second, third)]
        for agent_id in ids[:2]:
            await coordinator.heartbeat(agent_id, leaving=True)
        assert (await coordinator.chat("m"))[0] == 200
        assert third.seen.count("/api/chat") == 1
        await coordinator.heartbeat(ids[0])
        await coordinator.heartbeat(ids[1])
        assert (await coordinator.chat("m"))[0] == 200
        assert third.seen.count("/api/chat") == 1


@pytest.mark.spec("SURFACE-13")
async def test_the_models_of_the_fleet_with_their_contents(coordinator: Running) -> None:
    async with _old() as first, _old() as second, _new() as third:
        ids = [await coordinator.register(o, f"a{o.port}") for o in (first, second, third)]
        await coordinator.chat("m")
        row = (await coordinator.get("/api/models"))["models"][0]
        assert (row["name"], row["conflict"], row["digest"]) == ("m:latest", True, OLD)
        assert sorted(row["holders"]) == sorted(ids[:2])
        assert len(row["loaded_on"]) == 1
        await coordinator.chat("m", options={"num_ctx": 2048})
        row = (await coordinator.get("/api/models"))["models"][0]
        assert [row["contexts"].get(agent) for agent in row["loaded_on"]].count(2048) == 1
        kept = {content["digest"]: content for content in row["contents"]}
        assert kept[NEW]["holders"] == [ids[2]]
        assert (kept[OLD]["is_preferred"], kept[NEW]["is_preferred"]) == (True, False)


WEIGHTS = "sha256:" + "c" * 64


async def _served_by(coordinator: Running, ollamas: list[StandIn]) -> list[int]:
    """How many of twelve simultaneous requests each serves."""
    for _ in range(4):
        await asyncio.gather(*(coordinator.chat("m") for _ in range(3)))
    return [ollama.seen.count("/api/chat") for ollama in ollamas]


async def _conflict(coordinator: Running) -> bool:
    row = (await coordinator.get("/api/models"))["models"][0]
    return bool(row["conflict"])


@pytest.mark.spec("SURFACE-12")
async def test_a_created_model_is_one_content_on_machines_without_an_agent(
    coordinator: Running,
) -> None:
    """Its manifest has the machine's own path, so its digest differs from machine to machine."""
    created: dict[str, Any] = {
        "blob": WEIGHTS,
        "system": "You are brief.",
        "parameters": {"num_ctx": 8192},
    }
    ollamas = [StandIn([Model("m", digest=digit * 64, **created)]) for digit in "123"]
    async with ollamas[0], ollamas[1], ollamas[2]:
        for ollama in ollamas:
            await coordinator.register(ollama)
        for _ in range(200):
            if not await _conflict(coordinator):
                break
            await asyncio.sleep(0.05)
        assert not await _conflict(coordinator)
        assert min(await _served_by(coordinator, ollamas)) > 0
        # Each manifest was asked for once.
        assert [ollama.seen.count("/api/show") for ollama in ollamas] == [1, 1, 1]


@pytest.mark.spec("SURFACE-12")
@pytest.mark.parametrize(
    "other", [{"system": "You are a pirate."}, {"template": "x"}, {"parameters": {"num_ctx": 1}}]
)
async def test_the_same_weights_with_another_text_are_another_content(
    coordinator: Running, other: dict[str, Any]
) -> None:
    models = [Model("m", digest="1" * 64, blob=WEIGHTS), Model("m", digest="2" * 64, blob=WEIGHTS)]
    async with StandIn([models[0]]) as one, StandIn([replace(models[1], **other)]) as two:
        for ollama in (one, two):
            await coordinator.register(ollama)
        await coordinator.until(lambda: one.seen.count("/api/show") == 1)
        await coordinator.until(lambda: two.seen.count("/api/show") == 1)
        assert await _conflict(coordinator)
        assert sorted(await _served_by(coordinator, [one, two])) == [0, 12]


@pytest.mark.spec("SURFACE-12")
async def test_agents_tell_the_contents_by_their_layers(coordinator: Running) -> None:
    models = [Model("m", digest=digit * 64, blob=WEIGHTS) for digit in "12"]
    async with StandIn([models[0]]) as one, StandIn([models[1]]) as two:
        ids = [await coordinator.register(ollama) for ollama in (one, two)]
        for contents, differ in ((("c", "c"), False), (("c", "d"), True)):
            for agent_id, ollama, content in zip(ids, (one, two), contents, strict=True):
                async with coordinator.session.get(f"{ollama.url}/api/tags") as tags:
                    more = {"tags": await tags.json(), "model_contents": {"m:latest": content}}
                blobs = {"model_blobs": {"m:latest": WEIGHTS}}
                assert await coordinator.heartbeat(agent_id, **more, **blobs) == 200
            if differ:
                assert await _conflict(coordinator)
        assert (await coordinator.get("/api/models"))["models"][0]["contents"][0]["blob"] == WEIGHTS


@pytest.mark.spec("FLEET-33")
async def test_a_model_whose_file_is_missing_is_not_offered_there(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    rows = {row["machine_name"]: row["id"] for row in await coordinator.get("/api/agents")}
    async with coordinator.session.get(f"{ollama.url}/api/tags") as answer:
        tags = await answer.json()
    fault = "its file sha256:00 is missing; pull or create the model again"
    broken = {"tags": tags, "broken_models": {"llama3.2:latest": fault}}
    assert await coordinator.heartbeat(rows["first"], **broken) == 200
    for _ in range(4):
        assert (await coordinator.chat())[0] == 200
    assert ollama.seen.count("/api/chat") == 0
    row = await coordinator.get(f"/api/agents/{rows['first']}")
    assert (row["models"], row["broken_models"]) == ([], {"llama3.2:latest": fault})
    # It was pulled again.
    assert await coordinator.heartbeat(rows["first"], tags=tags) == 200
    row = await coordinator.get(f"/api/agents/{rows['first']}")
    assert (row["models"], row["broken_models"]) == (["llama3.2:latest"], {})
