"""One name, several contents: who is asked, and who is told."""

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
        kept = {content["digest"]: content for content in row["contents"]}
        assert kept[NEW]["holders"] == [ids[2]]
        assert (kept[OLD]["is_preferred"], kept[NEW]["is_preferred"]) == (True, False)
