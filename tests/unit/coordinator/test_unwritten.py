"""Finished requests that the database does not take: what they may cost, and that they remain."""

import random
import tracemalloc
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
from sqlite_utils import Database

from ollama_coordinator.db import History, Store
from ollama_coordinator.journal import Attempt
from ollama_coordinator.scheduler import RequestId
from ollama_coordinator.scheduler.explain import Candidate, Decision
from ollama_coordinator_common.types import AgentId
from support.past import NOON, past

CANDIDATES = 50
MOST_BYTES = 5000
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


def break_writing(db: Database) -> None:
    db.execute("PRAGMA query_only = ON")


def mend(db: Database) -> None:
    db.execute("PRAGMA query_only = OFF")


@pytest.mark.spec("DASH-7")
async def test_full_accounts_are_small_while_the_database_fails(tmp_path: Path) -> None:
    async with Store(tmp_path / "fleet.db") as store:
        history = History(store)
        await store.run(break_writing)
        tracemalloc.start()
        try:
            for number in range(200):
                history.note(past(number), account(number))
            assert not await history.write(())
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert held / 200 < MOST_BYTES
        await store.run(mend)
        assert await history.write(())
        found = await history.find(past(7).id)
        assert found is not None
        assert msgspec.json.decode(found[1], type=list[Attempt]) == account(7)
