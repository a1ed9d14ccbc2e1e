"""The feed by itself: differences, memory, and viewers of every pace."""

import json
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_coordinator.feed import Feed, Snapshot
from ollama_coordinator.feed import feed as module
from ollama_coordinator.feed.feed import difference
from support.viewer import merge

VALUES = st.recursive(
    st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=3),
    lambda inner: st.dictionaries(st.text(max_size=2), inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.text(max_size=2), VALUES, max_size=5)


@pytest.mark.spec("DASH-18")
@given(OBJECTS, OBJECTS)
def test_a_difference_leads_from_one_picture_to_the_next(old: Any, new: Any) -> None:
    assert merge(old, difference(old, new)) == new
    assert difference(new, new) == {}


class World:
    """Something to draw, and how often it was."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"count": 0}
        self.drawn = 0

    def take(self) -> Snapshot:
        self.drawn += 1
        return Snapshot(datetime.now(UTC), dict(self.state), dict)


def kinds(data: bytes) -> list[str]:
    return [line[7:] for line in data.decode().splitlines() if line.startswith("event: ")]


@pytest.mark.spec("DASH-20")
async def test_no_snapshot_is_taken_while_nobody_watches() -> None:
    world = World()
    feed = Feed(world.take)
    assert world.drawn == 0
    async with aclosing(feed.follow(None)) as events:
        await anext(events)
        await anext(events)
        assert feed.viewers == 1
    assert feed.viewers == 0


@pytest.mark.spec("DASH-20")
async def test_a_difference_is_drawn_once_for_all_viewers() -> None:
    world = World()
    feed = Feed(world.take)
    viewers = [feed.follow(None) for _ in range(20)]
    for viewer in viewers:
        await anext(viewer)
        assert kinds(await anext(viewer)) == ["snapshot"]
    before = world.drawn
    world.state["count"] = 1
    feed.tick()
    assert world.drawn == before + 1
    told = {await anext(viewer) for viewer in viewers}
    assert len(told) == 1
    assert json.loads(told.pop().split(b"data: ")[1])["patch"] == {"count": 1}
    for viewer in viewers:
        await viewer.aclose()


@pytest.mark.spec("DASH-20")
async def test_a_viewer_that_does_not_read_gets_a_snapshot_and_costs_nothing() -> None:
    world = World()
    feed = Feed(world.take)
    async with aclosing(feed.follow(None)) as slow:
        await anext(slow)
        await anext(slow)
        for count in range(module.REMEMBERED_PATCHES * 3):
            world.state["count"] = count + 1
            feed.tick()
        assert feed.remembered == module.REMEMBERED_PATCHES
        event = await anext(slow)
    assert kinds(event) == ["snapshot"]
    assert json.loads(event.split(b"data: ")[1])["state"] == world.state


@pytest.mark.spec("DASH-20")
async def test_what_is_remembered_is_bounded_in_bytes_too() -> None:
    world = World()
    feed = Feed(world.take)
    for count in range(12):
        world.state["count"] = str(count) * (1024 * 1024)
        feed.tick()
    assert feed.remembered <= 4


@pytest.mark.spec("DASH-22")
async def test_a_quiet_line_has_a_beat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.01)
    async with aclosing(Feed(World().take).follow(None)) as events:
        told = [kinds(await anext(events)) for _ in range(3)]
    assert told == [[], ["snapshot"], ["beat"]]
