"""What is kept over restarts: what is written, when, and that nobody waits for it."""

import asyncio

import msgspec
import pytest
from msgspec import Struct

from ollama_coordinator.db import Store
from ollama_coordinator.saved_state import ROWS_AT_ONCE, SavedState, encoded, pause
from support.databases import Space, store_of


class Row(Struct, frozen=True):
    """One of many."""

    name: str
    value: float


class Body(Struct, frozen=True):
    """Lists that may be long, and other things."""

    number: int = 0
    rows: list[Row] = []
    more: dict[str, list[float]] = {}
    last: list[float] = []


def rows(count: int) -> list[Row]:
    return [Row(f"{number}", number / 7) for number in range(count)]


@pytest.mark.parametrize("count", [0, 1, ROWS_AT_ONCE, 3 * ROWS_AT_ONCE + 1])
async def test_a_document_is_encoded_as_msgspec_does(count: int) -> None:
    body = Body(3, rows(count), {"a": [1.5], "b": []}, [0.5])
    assert await encoded(body) == msgspec.json.encode(body)


async def test_others_have_their_turn_while_a_long_one_is_encoded() -> None:
    turns, over = 0, asyncio.Event()

    async def take_turns() -> None:
        nonlocal turns
        while not over.is_set():
            turns += 1
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        group.create_task(take_turns())
        await encoded(Body(rows=rows(20 * ROWS_AT_ONCE)))
        over.set()
    assert turns >= 20


def test_a_long_one_is_written_more_seldom() -> None:
    assert pause(10.0, 0) == pause(10.0, 1_000_000) == 10.0
    assert pause(10.0, 20_000_000) == 100.0


class Part:
    """Its state is how often it was asked for."""

    def __init__(self) -> None:
        self.given = 0
        self.again = asyncio.Event()
        self.taken: list[Body] = []

    def export_state(self) -> Body:
        self.given += 1
        if self.given == 2:
            self.again.set()
        return Body(self.given)

    def import_state(self, state: Body, /) -> None:
        self.taken.append(state)


@pytest.mark.spec("OPERATION-22")
async def test_it_is_asked_for_at_its_pace_and_at_the_end(database: Space) -> None:
    part = Part()

    def document(store: Store, every: float) -> SavedState[Body]:
        return SavedState("body", Body, store, part, every=every)

    async with store_of(database) as store:
        async with document(store, every=0.01).running():
            await part.again.wait()
        async with document(store, every=3600.0).running():
            await asyncio.sleep(0)
            before = part.given
        assert part.given == before + 1
        await store.flush()
        async with document(store, every=3600.0).running():
            pass
    assert part.taken[-1] == Body(before + 1)
