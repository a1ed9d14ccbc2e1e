"""The database: what is kept, what an operator hears when it cannot be, and what goes on."""

import asyncio
import logging
from datetime import timedelta

import pytest

from ollama_coordinator.db import Database, DatabaseError, store
from ollama_coordinator_common.types import AgentId
from support.databases import AT, FULL_ROW, Space, agent_ids, agent_row, slow, store_of
from support.deadline import DEADLINE_SECONDS

LATER = AT + timedelta(seconds=10)


# ── what is kept ──────────────────────────────────────────────────────────────────────────────


async def test_an_agent_comes_back_as_it_was(database: Space) -> None:
    async with store_of(database) as opened:
        await opened.save_agent(FULL_ROW)
        assert await opened.agents() == [FULL_ROW]
    async with store_of(database) as again:
        assert await again.agents() == [FULL_ROW]


async def test_a_saved_agent_is_on_disk_before_the_answer(database: Space) -> None:
    async with store_of(database) as opened:
        await opened.save_agent(agent_row())
        assert agent_ids(database) == ["a"]


async def test_agents_keep_their_order_when_they_change(database: Space) -> None:
    async with store_of(database) as opened:
        await opened.save_agent(agent_row("b"))
        await opened.save_agent(agent_row("a", registered_at=LATER))
        await opened.save_agent(agent_row("b", last_seen=LATER, registered_at=LATER))
        assert [kept.id for kept in await opened.agents()] == ["b", "a"]


async def test_what_is_noted_is_written_at_the_end(database: Space) -> None:
    async with store_of(database) as opened:
        opened.note_agent(agent_row())
        opened.note_document("rates", b'{"a":1}')
        assert await opened.agents() == []
    async with store_of(database) as again:
        assert await again.agents() == [agent_row()]
        assert await again.document("rates") == b'{"a":1}'
        assert await again.document("other") is None


async def test_what_is_noted_is_written_soon(
    database: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "FLUSH_SECONDS", 0.0)
    async with store_of(database) as opened, asyncio.timeout(DEADLINE_SECONDS):
        opened.note_agent(agent_row())
        while not agent_ids(database):
            await asyncio.sleep(0)


async def test_when_an_agent_was_heard_is_written_alone(database: Space) -> None:
    async with store_of(database) as opened:
        await opened.save_agent(agent_row())
        opened.note_seen(AgentId("a"), LATER)
        opened.note_seen(AgentId("nobody"), LATER)
        await opened.flush()
        assert await opened.agents() == [agent_row(last_seen=LATER)]


async def test_the_newest_of_several_notes_wins(database: Space) -> None:
    async with store_of(database) as opened:
        opened.note_seen(AgentId("a"), AT)
        opened.note_agent(agent_row(last_seen=LATER))
        opened.note_document("rates", b"1")
        opened.note_document("rates", b"2")
        await opened.flush()
        assert await opened.agents() == [agent_row(last_seen=LATER)]
        assert await opened.document("rates") == b"2"


async def test_a_document_given_as_a_function_is_asked_for_when_it_is_written(
    database: Space,
) -> None:
    asked: list[int] = []
    numbers = [1]

    def body() -> bytes:
        asked.append(len(numbers))
        return str(numbers).encode()

    async with store_of(database) as opened:
        for number in range(1000):
            numbers.append(number)
            opened.note_document("numbers", body)
        await opened.run(database.stop_writing)
        await opened.flush()
        assert asked == [1001]
        await opened.run(database.mend)
        await opened.flush()
        assert await opened.document("numbers") == str(numbers).encode()
        numbers.clear()
        opened.note_document("numbers", body)
    assert asked == [1001, 0]
    async with store_of(database) as again:
        assert await again.document("numbers") == b"[]"


async def test_a_removal_beats_a_save_that_waits(database: Space) -> None:
    async with store_of(database) as opened:
        opened.note_agent(agent_row())
        opened.note_seen(AgentId("a"), LATER)
        await opened.remove_agent(AgentId("a"))
        assert await opened.agents() == []
        await opened.remove_agent(AgentId("never was"))
    async with store_of(database) as again:
        assert await again.agents() == []


async def test_a_write_that_is_cancelled_is_not_forgotten(database: Space) -> None:
    async with store_of(database) as opened:
        busy = asyncio.create_task(opened.run(slow))
        saving = asyncio.create_task(opened.save_agent(agent_row()))
        await asyncio.sleep(0)
        saving.cancel()
        await asyncio.gather(saving, return_exceptions=True)
        await busy
    async with store_of(database) as again:
        assert await again.agents() == [agent_row()]


@pytest.mark.parametrize(
    ("column", "value"),
    [("registration", "{"), ("registration", "{}"), ("last_seen", "yesterday")],
)
async def test_a_damaged_row_is_an_error_that_says_what_to_do(
    database: Space, column: str, value: str
) -> None:
    async with store_of(database) as opened:
        await opened.save_agent(agent_row())
        await opened.run(lambda db: damage(db, column, value))
        with pytest.raises(DatabaseError, match="a row is damaged; restore a copy"):
            await opened.agents()


def damage(db: Database, column: str, value: str) -> None:
    db.execute(f"UPDATE agents SET {column} = ?", [value])  # noqa: S608


# ── when it fails while running ───────────────────────────────────────────────────────────────


@pytest.mark.spec("OPERATION-6")
async def test_a_database_that_fails_is_reported_and_nothing_is_lost(
    database: Space, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with store_of(database) as opened:
        await opened.run(database.stop_writing)
        await opened.save_agent(agent_row())
        opened.note_seen(AgentId("a"), LATER)
        opened.note_document("rates", b"1")
        await opened.flush()
        await opened.flush()
        assert opened.problem is not None
        assert "it is read-only" in opened.problem
        await opened.run(database.mend)
        await opened.flush()
        assert opened.problem is None
        assert await opened.agents() == [agent_row(last_seen=LATER)]
        assert await opened.document("rates") == b"1"
    told = [record.message for record in caplog.records if record.name.endswith("db.store")]
    assert told == ["database not writable; going on from memory", "database writable again"]


async def test_a_newer_fact_beats_one_that_could_not_be_written(database: Space) -> None:
    async with store_of(database) as opened:
        await opened.run(database.stop_writing)
        await opened.save_agent(agent_row("a"))
        await opened.save_agent(agent_row("b"))
        opened.note_agent(agent_row("a", last_seen=LATER))
        await opened.remove_agent(AgentId("b"))
        await opened.run(database.mend)
        await opened.flush()
        assert await opened.agents() == [agent_row("a", last_seen=LATER)]


async def test_a_write_that_failed_does_not_come_back_over_a_newer_one(database: Space) -> None:
    async with store_of(database) as opened:
        await opened.save_agent(agent_row())
        await opened.run(database.stop_writing)
        failing = asyncio.create_task(opened.save_agent(agent_row(last_seen=LATER)))
        mended = asyncio.create_task(opened.run(database.mend))
        removing = asyncio.create_task(opened.remove_agent(AgentId("a")))
        await asyncio.gather(failing, mended, removing)
        await opened.flush()
        assert await opened.agents() == []


async def test_a_database_that_fails_to_the_end_does_not_prevent_the_end(database: Space) -> None:
    async with store_of(database) as opened:
        await opened.run(database.stop_writing)
        opened.note_agent(agent_row())
    async with store_of(database) as again:
        assert await again.agents() == []


async def test_a_store_is_used_while_it_is_open(database: Space) -> None:
    with pytest.raises(RuntimeError, match="not open"):
        await store_of(database).agents()
