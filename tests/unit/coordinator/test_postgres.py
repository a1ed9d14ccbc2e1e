"""A PostgreSQL server: when it cannot be reached or used, and when it goes and comes back."""

import asyncio
import builtins
import logging
import socket
from contextlib import closing
from typing import Any

import pytest

from ollama_coordinator.db import DatabaseError, Store, database_of, without_password
from ollama_coordinator_common.error import ConfigError
from support.databases import FULL_ROW, PostgresSchema, agent_ids, agent_row, store_of
from support.deadline import DEADLINE_SECONDS
from support.line import Line


async def refused(url: str) -> str:
    with pytest.raises(DatabaseError) as caught:
        await Store(database_of(url)).__aenter__()
    return str(caught.value)


# ── the URL ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.spec("OPERATION-60")
@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:secret@host:5432/db", "postgresql://u:***@host:5432/db"),
        ("postgres://u:se:cr@et@host/db?x=y", "postgres://u:***@host/db?x=y"),
        ("postgresql://u@host/db?password=secret&a=b", "postgresql://u@host/db?password=***&a=b"),
        ("postgresql://u:se/cret@host/db", "postgresql://u:***@host/db"),
        ("u:secret@host/db", "u:***@host/db"),
        ("postgresql://u@host/db", "postgresql://u@host/db"),
        ("postgresql:///db?host=/tmp", "postgresql:///db?host=/tmp"),
        ("sqlite:///C:/a@b.db", "sqlite:///C:/a@b.db"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert without_password(url) == shown


@pytest.mark.spec("OPERATION-60")
@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:sec@ret@127.0.0.1/db",
        "postgresql://u:1/sec@ret@127.0.0.1/db",
        "postgresql://u:sec/ret@127.0.0.1/db",
        "postgresql://u:sec%ret@127.0.0.1/db",
        "postgresql://u:secret@127.0.0.1/db?nonsense=1",
    ],
)
def test_a_url_that_cannot_work_is_told_without_its_password(url: str) -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(ConfigError, match="give postgresql://USER:PASSWORD@HOST") as caught:
        database_of(url)
    assert "ret" not in str(caught.value)


@pytest.mark.spec("OPERATION-60")
def test_a_missing_extra_is_an_error_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usual = builtins.__import__

    def without_psycopg(name: str, *more: Any, **named: Any) -> Any:
        if name == "postgres" or name.startswith("psycopg"):
            raise ImportError("no module named psycopg")
        return usual(name, *more, **named)

    monkeypatch.setattr(builtins, "__import__", without_psycopg)
    with pytest.raises(ConfigError, match=r"install ollama-coordinator\[postgres\]") as caught:
        database_of("postgresql://u:secret@host/db")
    assert "secret" not in str(caught.value)


# ── when it cannot be opened ──────────────────────────────────────────────────────────────────


@pytest.mark.spec("OPERATION-61")
async def test_a_server_that_is_not_there_is_an_error_that_says_what_to_do() -> None:
    pytest.importorskip("psycopg")
    with closing(socket.socket()) as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound, but nothing listens
        told = await refused(f"postgresql://u:secret@127.0.0.1:{nobody.getsockname()[1]}/db")
    assert "check that PostgreSQL runs there" in told
    assert "secret" not in told


@pytest.mark.spec("OPERATION-61")
async def test_a_server_that_says_nothing_is_an_error_soon(
    postgres: PostgresSchema, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ollama_coordinator.db.postgres.CONNECT_SECONDS", 2)  # libpq's least
    async with Line(postgres.url) as line:
        line.freeze()
        assert "check that PostgreSQL runs there" in await refused(line.url)


@pytest.mark.spec("OPERATION-61")
async def test_a_database_that_is_not_there_is_an_error_that_says_so(
    postgres: PostgresSchema,
) -> None:
    url = postgres.url.replace("///postgres", "///nowhere")
    assert 'database "nowhere" does not exist' in await refused(url)


@pytest.mark.spec("OPERATION-61")
async def test_a_second_coordinator_on_a_database_is_refused(postgres: PostgresSchema) -> None:
    async with store_of(postgres) as opened:
        assert "another coordinator uses it; stop that one" in await refused(postgres.url)
        await opened.save_agent(agent_row())
        assert opened.problem is None
    async with store_of(postgres) as again:
        assert await again.agents() == [agent_row()]


@pytest.mark.spec("OPERATION-7")
async def test_a_step_that_fails_leaves_neither_a_table_nor_a_record(
    postgres: PostgresSchema,
) -> None:
    postgres.ask("CREATE TABLE documents (mine TEXT)")
    assert "another program has a table of that name" in await refused(postgres.url)
    sql = "SELECT tablename FROM pg_tables WHERE schemaname = current_schema()"
    assert postgres.ask(sql) == [("documents",)]


@pytest.mark.spec("OPERATION-7")
async def test_an_older_database_is_brought_up_to_date_and_keeps_its_agents(
    postgres: PostgresSchema,
) -> None:
    async with store_of(postgres) as opened:
        await opened.save_agent(FULL_ROW)
    steps = postgres.ask("SELECT name FROM migrations ORDER BY name")
    for table in ("documents", "requests", "buckets"):
        postgres.ask(f"DROP TABLE {table}")
        postgres.ask(f"DELETE FROM migrations WHERE name = 'create_{table}'")  # noqa: S608
    async with store_of(postgres) as again:
        assert await again.agents() == [FULL_ROW]
        assert await again.document("rates") is None
    assert postgres.ask("SELECT name FROM migrations ORDER BY name") == steps


async def test_a_database_of_a_newer_version_is_left_alone(postgres: PostgresSchema) -> None:
    async with store_of(postgres):
        pass
    postgres.ask("INSERT INTO migrations VALUES ('change_tomorrow', '2030-01-01')")
    assert "a newer version wrote it; update the coordinator" in await refused(postgres.url)


# ── when it fails while running ───────────────────────────────────────────────────────────────


def sessions(postgres: PostgresSchema) -> str:
    return f"""
        SELECT pg_terminate_backend(pid) FROM pg_locks
        WHERE locktype = 'advisory' AND objid = hashtext('{postgres.schema}')::oid
    """  # noqa: S608


@pytest.mark.spec("OPERATION-62")
async def test_a_session_that_the_server_ends_is_opened_anew(
    postgres: PostgresSchema, caplog: pytest.LogCaptureFixture
) -> None:
    async with store_of(postgres) as opened:
        for agent_id in ("a", "b"):
            assert postgres.ask(sessions(postgres)) == [(True,)]
            await opened.save_agent(agent_row(agent_id))
            assert opened.problem is None
            assert "another coordinator uses it" in await refused(postgres.url)
        assert agent_ids(postgres) == ["a", "b"]
    assert caplog.messages.count("the database ended the session; opened anew") == 2


@pytest.mark.spec("OPERATION-62")
@pytest.mark.parametrize("how", ["cut", "freeze"])
async def test_a_server_that_is_lost_is_reported_and_nothing_is_lost(
    postgres: PostgresSchema,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("ollama_coordinator.db.postgres.CONNECT_SECONDS", 2)
    monkeypatch.setattr("ollama_coordinator.db.postgres.ANSWER_SECONDS", 0.5)
    async with Line(postgres.url) as line, Store(database_of(line.url)) as opened:
        await opened.save_agent(agent_row("a"))
        getattr(line, how)()
        async with asyncio.timeout(DEADLINE_SECONDS):
            await opened.save_agent(agent_row("b"))
        assert opened.problem is not None
        assert "check that PostgreSQL runs there" in opened.problem
        opened.note_document("rates", b"1")
        await line.mend()
        async with asyncio.timeout(DEADLINE_SECONDS):
            while opened.problem is not None:
                await opened.flush()
        assert agent_ids(postgres) == ["a", "b"]
        assert await opened.document("rates") == b"1"
    told = [record.message for record in caplog.records if record.name.endswith("db.store")]
    assert told == ["database not writable; going on from memory", "database writable again"]


@pytest.mark.spec("OPERATION-62")
async def test_a_database_that_another_coordinator_has_taken_is_left_to_it(
    postgres: PostgresSchema,
) -> None:
    async with Line(postgres.url) as line, Store(database_of(line.url)) as opened:
        line.cut()
        async with asyncio.timeout(DEADLINE_SECONDS):
            while postgres.ask(sessions(postgres)):
                await asyncio.sleep(0.01)
        async with store_of(postgres) as other:
            await other.save_agent(agent_row("other"))
            await line.mend()
            await opened.save_agent(agent_row())
            assert "another coordinator uses it" in str(opened.problem)
            assert agent_ids(postgres) == ["other"]
        # Also once the other has gone, whose session the server may end a moment later.
        await opened.flush()
        assert opened.lost.is_set()
        assert agent_ids(postgres) == ["other"]


@pytest.mark.spec("OPERATION-62")
async def test_the_server_ends_the_session_of_a_coordinator_that_is_silent(
    postgres: PostgresSchema, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ollama_coordinator.db.postgres.SILENT_SECONDS", 1)
    database = database_of(postgres.url)
    database.open()  # without a store, nobody asks for a sign of life
    async with asyncio.timeout(DEADLINE_SECONDS):
        while postgres.ask(sessions(postgres).replace("pg_terminate_backend", "")):
            await asyncio.sleep(0.05)
    database.close()


async def test_a_text_with_a_zero_is_kept_without_it(postgres: PostgresSchema) -> None:
    async with store_of(postgres) as opened:
        await opened.save_agent(agent_row("a\0b"))
        assert agent_ids(postgres) == ["a\N{REPLACEMENT CHARACTER}b"]


@pytest.mark.spec("OPERATION-61")
async def test_who_has_ended_hinders_nobody_who_begins(postgres: PostgresSchema) -> None:
    for _ in range(150):  # the server takes a moment to notice a session that ended
        async with store_of(postgres):
            pass
