"""Finished requests that the database does not take: what they may cost, and that they remain."""

import asyncio
import random
import tracemalloc
from datetime import timedelta

import msgspec
import pytest

from ollama_coordinator.db import Filter, History, StoredBucket
from ollama_coordinator.journal import Attempt
from ollama_coordinator.scheduler import RequestId
from ollama_coordinator.scheduler.explain import Candidate, Decision
from ollama_coordinator_common.types import AgentId
from support.coordinator import Running
from support.databases import Space, slow, store_of
from support.past import NOON, past

CANDIDATES = 50
MOST_BYTES = 5500
"""What one request may take in memory; the objects of its account alone are 13 kB."""


def account(number: int) -> list[Attempt]:
    """A full account in a large fleet, of numbers as they come."""
    chance = random.Random(number)
    candidates = tuple(
        Candidate(
            agent_id=AgentId(f"{chance.getrandbits(64):016x}"),
            agent=f"machine-{index}",
            action="go",
            cost=chance.random(),
            wait_seconds=chance.random(),
            prefill_seconds=chance.random(),
            decode_seconds=chance.random(),
        )
        for index in range(CANDIDATES)
    )
    chosen = candidates[0]
    told = Decision(RequestId(f"r{number}"), "m", "go", chosen.agent_id, candidates=candidates)
    return [Attempt(chosen.agent_id, chosen.agent, NOON + timedelta(seconds=number), decision=told)]


@pytest.mark.spec("DASH-7")
async def test_full_accounts_are_small_while_the_database_fails(database: Space) -> None:
    async with store_of(database) as store:
        history = History(store)
        await store.run(database.stop_writing)
        tracemalloc.start()
        try:
            for number in range(200):
                history.note(past(number), account(number))
            assert not await history.write(())
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert held / 200 < MOST_BYTES
        await store.run(database.mend)
        assert await history.write(())
        found = await history.find(past(7).id)
        assert found is not None
        assert msgspec.json.decode(found[1], type=list[Attempt]) == account(7)


async def kept(history: History) -> list[str]:
    """The ids in the database, oldest first."""
    page, _ = await history.page(Filter(), limit=100)
    return [request.id for request in reversed(page)]


@pytest.mark.spec("DASH-12")
async def test_the_newest_remain_when_the_database_fails_for_long(
    database: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ollama_coordinator.db.history.UNWRITTEN_AT_MOST", 4)
    async with store_of(database) as store:
        unwritten = History(store)
        await store.run(database.stop_writing)
        for number in range(4):
            unwritten.note(past(number), None)
        failing = asyncio.create_task(unwritten.write(()))
        await asyncio.sleep(0)
        for number in range(4, 6):
            unwritten.note(past(number), None)
        assert not await failing
        await store.run(database.mend)
        assert await kept(unwritten) == [past(number).id for number in range(2, 6)]


@pytest.mark.spec("DASH-12")
async def test_what_waited_for_the_database_is_written_in_many_transactions(
    database: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ollama_coordinator.db.history.ROWS_AT_ONCE", 3)
    async with store_of(database) as store:
        unwritten = History(store)
        for number in range(7):
            unwritten.note(past(number), None)
        buckets = [StoredBucket(10, start, "", b"{}") for start in range(4)]
        writing = asyncio.create_task(unwritten.write(buckets))
        await asyncio.sleep(0)
        # Another's turn comes after the first transaction, not after the last.
        assert await store.run(lambda db: db.query("SELECT count(*) AS n FROM requests")) == [
            {"n": 3}
        ]
        assert await writing
        assert await kept(unwritten) == [past(number).id for number in range(7)]
        assert len(await unwritten.buckets(10, "", 0, 9)) == 4


@pytest.mark.spec("DASH-7")
@pytest.mark.parametrize("begun", [True, False])
async def test_a_write_that_is_cancelled_is_made_up_for(database: Space, begun: bool) -> None:
    async with store_of(database) as store:
        unwritten = History(store)
        unwritten.note(past(1), None)
        unwritten.note(past(2), None)
        before = None if begun else asyncio.create_task(store.run(slow))
        await asyncio.sleep(0)
        bucket = StoredBucket(10, 0, "", b"{}")
        writing = asyncio.create_task(unwritten.write([bucket]))
        await asyncio.sleep(0.1 if begun else 0)
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        unwritten.note(past(3), None)
        assert await unwritten.write(())
        if before is not None:
            await before
        assert await kept(unwritten) == [past(number).id for number in (1, 2, 3)]


@pytest.mark.spec("DASH-12")
async def test_numbers_whose_write_is_cancelled_are_written_later(coordinator: Running) -> None:
    observation, store = coordinator.parts.observation, coordinator.parts.store
    observation.sampler.series.fresh("someone").readings += 1
    busy = asyncio.create_task(store.run(slow))
    await asyncio.sleep(0)
    writing = asyncio.create_task(observation.sampler.write(everything=True))
    await asyncio.sleep(0)
    writing.cancel()
    await asyncio.gather(busy, writing, return_exceptions=True)
    rows = observation.sampler.series.take_changed(fleet_only=False)
    assert [row.name for row in rows].count("someone") == 2
