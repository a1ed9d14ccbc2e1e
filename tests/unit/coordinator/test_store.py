"""The database: what is kept, what an operator hears when it cannot be, and what goes on."""

import asyncio
import logging
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlite_utils import Database

from ollama_coordinator.db import AgentRow, DatabaseError, Store, store
from ollama_coordinator_common.protocol import RegisterRequest
from ollama_coordinator_common.types import AgentId
from support.deadline import DEADLINE_SECONDS

AT = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
LATER = AT + timedelta(seconds=10)


def row(agent_id: str = "a", **more: object) -> AgentRow:
    request = RegisterRequest("gpü-1", "fd00::7", "0.33.0", 11434, "5b0c", 4000)
    values = {"registered_at": AT, "last_seen": AT, **more}
    return AgentRow(AgentId(agent_id), request, **values)  # type: ignore[arg-type]


FULL = row(
    has_left=True,
    settings='{"display_name":"Büro"}'.encode(),
    tags=b'{"models":[ {"name":"m"} ]}',
    blobs=b'{"m":"sha256:0"}',
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "coordinator.db"


def ids_in(path: Path) -> list[str]:
    """The agents that a process other than the coordinator finds in the file."""
    with closing(sqlite3.connect(path)) as connection:
        return [row[0] for row in connection.execute("SELECT id FROM agents ORDER BY rowid")]


def fail(db: Database) -> None:
    db.execute("PRAGMA query_only = ON")


def mend(db: Database) -> None:
    db.execute("PRAGMA query_only = OFF")


# ── what is kept ──────────────────────────────────────────────────────────────────────────────


async def test_an_agent_comes_back_as_it_was(path: Path) -> None:
    async with Store(path) as opened:
        await opened.save_agent(FULL)
        assert await opened.agents() == [FULL]
    async with Store(path) as again:
        assert await again.agents() == [FULL]


async def test_a_saved_agent_is_on_disk_before_the_answer(path: Path) -> None:
    async with Store(path) as opened:
        await opened.save_agent(row())
        assert ids_in(path) == ["a"]


async def test_a_database_in_memory_keeps_nothing() -> None:
    async with Store(None) as opened:
        await opened.save_agent(row())
        assert await opened.agents() == [row()]
    async with Store(None) as again:
        assert await again.agents() == []


async def test_agents_keep_their_order_when_they_change(path: Path) -> None:
    async with Store(path) as opened:
        for agent_id in "ba":
            await opened.save_agent(row(agent_id))
        await opened.save_agent(row("b", last_seen=LATER))
        assert [kept.id for kept in await opened.agents()] == ["b", "a"]


async def test_what_is_noted_is_written_at_the_end(path: Path) -> None:
    async with Store(path) as opened:
        opened.note_agent(row())
        opened.note_document("rates", b'{"a":1}')
        assert await opened.agents() == []
    async with Store(path) as again:
        assert await again.agents() == [row()]
        assert await again.document("rates") == b'{"a":1}'
        assert await again.document("other") is None


async def test_what_is_noted_is_written_soon(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "FLUSH_SECONDS", 0.0)
    async with Store(path) as opened, asyncio.timeout(DEADLINE_SECONDS):
        opened.note_agent(row())
        while not ids_in(path):
            await asyncio.sleep(0)


async def test_when_an_agent_was_heard_is_written_alone(path: Path) -> None:
    async with Store(path) as opened:
        await opened.save_agent(row())
        opened.note_seen(AgentId("a"), LATER)
        opened.note_seen(AgentId("nobody"), LATER)
        await opened.flush()
        assert await opened.agents() == [row(last_seen=LATER)]


async def test_the_newest_of_several_notes_wins(path: Path) -> None:
    async with Store(path) as opened:
        opened.note_seen(AgentId("a"), AT)
        opened.note_agent(row(last_seen=LATER))
        opened.note_document("rates", b"1")
        opened.note_document("rates", b"2")
        await opened.flush()
        assert await opened.agents() == [row(last_seen=LATER)]
        assert await opened.document("rates") == b"2"


async def test_a_document_given_as_a_function_is_asked_for_when_it_is_written(path: Path) -> None:
    asked: list[int] = []
    numbers = [1]

    def body() -> bytes:
        asked.append(len(numbers))
        return str(numbers).encode()

    async with Store(path) as opened:
        for number in range(1000):
            numbers.append(number)
            opened.note_document("numbers", body)
        await opened.run(fail)
        await opened.flush()
        assert asked == [1001]
        await opened.run(mend)
        await opened.flush()
        assert await opened.document("numbers") == str(numbers).encode()
        numbers.clear()
        opened.note_document("numbers", body)
    assert asked == [1001, 0]
    async with Store(path) as again:
        assert await again.document("numbers") == b"[]"


async def test_a_removal_beats_a_save_that_waits(path: Path) -> None:
    async with Store(path) as opened:
        opened.note_agent(row())
        opened.note_seen(AgentId("a"), LATER)
        await opened.remove_agent(AgentId("a"))
        assert await opened.agents() == []
        await opened.remove_agent(AgentId("never was"))
    async with Store(path) as again:
        assert await again.agents() == []


@pytest.mark.spec("OPERATION-24")
async def test_a_second_coordinator_on_a_file_is_refused(path: Path) -> None:
    link = path.with_name("link.db")
    async with Store(path) as opened:
        link.symlink_to(path)
        for name in (path, link):
            assert "another coordinator uses it; stop that one" in await refused(name)
        await opened.save_agent(row())
        assert opened.problem is None
    async with Store(link) as again:
        assert await again.agents() == [row()]


# ── a file that is deleted or replaced ────────────────────────────────────────────────────────


@pytest.mark.spec("OPERATION-25")
@pytest.mark.parametrize(
    "left",
    [(), ("-wal",), ("-shm",), ("-wal", "-shm"), ("", "-shm"), ("", "-wal"), ("",)],
)
async def test_a_deleted_file_is_written_anew(path: Path, left: tuple[str, ...]) -> None:
    async with Store(path) as opened:
        await opened.save_agent(FULL)
        opened.note_document("rates", b'{"a":1}')
        await opened.flush()
        for suffix in {"", "-wal", "-shm"} - set(left):
            Path(f"{path}{suffix}").unlink()
        await opened.save_agent(row("b"))
        assert opened.problem is None
        assert ids_in(path) == ["a", "b"]
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, f"{path.name}.lock"]
    async with Store(path) as again:
        assert await again.agents() == [FULL, row("b")]
        assert await again.document("rates") == b'{"a":1}'


@pytest.mark.spec("OPERATION-25")
async def test_a_deleted_file_is_noticed_although_nothing_is_written(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store, "FLUSH_SECONDS", 0.0)
    async with Store(path) as opened, asyncio.timeout(DEADLINE_SECONDS):
        await opened.save_agent(row())
        path.unlink()
        while not path.exists():
            await asyncio.sleep(0)
    assert ids_in(path) == ["a"]
    assert caplog.messages.count("the database's file was deleted or replaced; written anew") == 1


@pytest.mark.spec("OPERATION-25")
async def test_a_file_that_is_put_in_its_place_is_kept_beside_it(path: Path) -> None:
    other = path.with_name("other.db")
    async with Store(other) as opened:
        await opened.save_agent(row("other"))
    async with Store(path) as opened:
        await opened.save_agent(row())
        other.replace(path)
        await opened.flush()
        assert ids_in(path) == ["a"]
    [aside] = path.parent.glob("*.replaced-*")
    assert ids_in(aside) == ["other"]


@pytest.mark.spec("OPERATION-25")
async def test_a_folder_that_is_gone_is_a_problem_until_it_is_back(tmp_path: Path) -> None:
    path = tmp_path / "here" / "coordinator.db"
    path.parent.mkdir()
    async with Store(path) as opened:
        await opened.save_agent(row())
        shutil.rmtree(path.parent)
        await opened.save_agent(row("b"))
        assert "cannot be opened" in str(opened.problem)
        path.parent.mkdir()
        await opened.flush()
        assert opened.problem is None
        assert ids_in(path) == ["a", "b"]


@pytest.mark.spec("OPERATION-25")
async def test_a_path_that_another_coordinator_has_taken_is_left_to_it(path: Path) -> None:
    async with Store(path) as opened:
        await opened.save_agent(row())
        for one in path.parent.iterdir():
            one.unlink()
        async with Store(path) as other:
            await other.save_agent(row("other"))
            await opened.flush()
            assert "another coordinator uses it" in str(opened.problem)
            assert ids_in(path) == ["other"]
        await opened.flush()
        assert opened.problem is None
    assert ids_in(path) == ["a"]


async def test_a_write_that_is_cancelled_is_not_forgotten(path: Path) -> None:
    async with Store(path) as opened:
        busy = asyncio.create_task(opened.run(lambda db: list(db.execute(SLOW))))
        saving = asyncio.create_task(opened.save_agent(row()))
        await asyncio.sleep(0)
        saving.cancel()
        await asyncio.gather(saving, return_exceptions=True)
        await busy
    async with Store(path) as again:
        assert await again.agents() == [row()]


SLOW = """
    WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000)
    SELECT max(i) FROM n
"""


# ── the schema ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.spec("OPERATION-7")
async def test_an_older_database_is_brought_up_to_date_and_keeps_its_agents(path: Path) -> None:
    async with Store(path) as opened:
        await opened.save_agent(FULL)
        steps = await opened.run(applied)
    with closing(sqlite3.connect(path)) as older, older:
        tables = [name for (name,) in older.execute("SELECT name FROM sqlite_master") if name]
        for table in set(tables) & {"documents", "requests", "buckets"}:
            older.execute(f"DROP TABLE {table}")
        older.execute("DELETE FROM _sqlite_migrations WHERE name <> 'create_agents'")
    async with Store(path) as again:
        assert await again.agents() == [FULL]
        assert await again.document("rates") is None
        assert await again.run(applied) == steps


@pytest.mark.spec("OPERATION-7")
async def test_a_step_that_fails_leaves_neither_a_table_nor_a_record(path: Path) -> None:
    with closing(sqlite3.connect(path)) as foreign, foreign:
        foreign.execute("CREATE TABLE documents (mine)")
    assert "documents" in await refused(path)
    with closing(sqlite3.connect(path)) as foreign:
        names = [name for (name,) in foreign.execute("SELECT name FROM _sqlite_migrations")]
        assert names == ["create_agents"]
        assert list(foreign.execute("SELECT * FROM documents")) == []


def applied(db: Database) -> list[str]:
    return [str(step["name"]) for step in db.query("SELECT name FROM _sqlite_migrations")]


# ── when it cannot be opened ──────────────────────────────────────────────────────────────────


async def refused(path: Path) -> str:
    opened = Store(path)
    with pytest.raises(DatabaseError) as caught:
        await opened.__aenter__()
    assert caught.value.path == path
    assert str(caught.value).startswith(f"database {path}: ")
    return str(caught.value)


HOLD = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print("held", flush=True)
sys.stdin.read()
connection.close()
"""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another process at work in the file."""
    held = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with held:
        assert held.stdout is not None
        assert held.stdout.readline() == b"held\n"
        yield  # its input is closed at the end, and then it ends


async def test_a_missing_folder_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    assert "check that its folder exists" in await refused(tmp_path / "no" / "coordinator.db")


async def test_a_folder_in_the_files_place_is_an_error_that_says_what_to_do(path: Path) -> None:
    path.mkdir()
    assert "cannot be opened" in await refused(path)


@pytest.mark.spec("OPERATION-5")
async def test_another_kind_of_file_is_an_error_that_says_what_to_do(path: Path) -> None:
    path.write_bytes(b"Dear diary, " * 1000)
    assert "the file is not an SQLite database" in await refused(path)


@pytest.mark.spec("OPERATION-5")
async def test_a_damaged_file_is_an_error_that_says_what_to_do(path: Path) -> None:
    async with Store(path) as opened:
        await opened.save_agent(row(tags=b'{"models":[]}' + b" " * 100_000))
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (path.stat().st_size - 4096))
    assert "damaged" in await refused(path)


@pytest.mark.spec("OPERATION-5")
async def test_a_locked_file_is_an_error_that_says_what_to_do(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "LOCK_SECONDS", 0.01)
    with locked(path):
        assert "another process holds it" in await refused(path)


async def test_a_database_of_a_newer_version_is_left_alone(path: Path) -> None:
    async with Store(path):
        pass
    with closing(sqlite3.connect(path)) as newer, newer:
        newer.execute(
            "INSERT INTO _sqlite_migrations (migration_set, name, applied_at)"
            " VALUES ('ollama_coordinator', 'create_tomorrow', '2030-01-01')"
        )
    assert "a newer version wrote it; update the coordinator" in await refused(path)


async def test_migrations_of_another_program_in_the_file_do_not_matter(path: Path) -> None:
    async with Store(path):
        pass
    with closing(sqlite3.connect(path)) as other, other:
        other.execute(
            "INSERT INTO _sqlite_migrations (migration_set, name, applied_at)"
            " VALUES ('another program', 'create_things', '2030-01-01')"
        )
    async with Store(path) as again:
        assert await again.agents() == []


@pytest.mark.parametrize(
    ("column", "value"),
    [("registration", "{"), ("registration", "{}"), ("last_seen", "yesterday")],
)
async def test_a_damaged_row_is_an_error_that_says_what_to_do(
    path: Path, column: str, value: str
) -> None:
    async with Store(path) as opened:
        await opened.save_agent(row())
        await opened.run(lambda db: damage(db, column, value))
        with pytest.raises(DatabaseError, match="a row is damaged; restore a copy"):
            await opened.agents()


def damage(db: Database, column: str, value: str) -> None:
    with db.atomic():
        db.table("agents").update("a", {column: value})


@pytest.mark.spec("OPERATION-5")
@pytest.mark.parametrize(
    ("setting", "advice"),
    [
        ("PRAGMA query_only = ON", "it is read-only; make the file and its folder writable"),
        ("PRAGMA max_page_count = 1", "the disk is full; free some space"),
    ],
)
def test_sqlites_own_words_become_advice(setting: str, advice: str) -> None:
    with closing(sqlite3.connect(":memory:")) as database:
        database.execute("CREATE TABLE t (x)")
        database.execute(setting)
        with pytest.raises(sqlite3.OperationalError) as caught:
            database.execute("CREATE TABLE u AS SELECT zeroblob(100000)")
        assert advice in str(DatabaseError(None, caught.value))


# ── when it fails while running ───────────────────────────────────────────────────────────────


@pytest.mark.spec("OPERATION-6")
async def test_a_database_that_fails_is_reported_and_nothing_is_lost(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with Store(path) as opened:
        await opened.run(fail)
        await opened.save_agent(row())
        opened.note_seen(AgentId("a"), LATER)
        opened.note_document("rates", b"1")
        await opened.flush()
        await opened.flush()
        assert opened.problem is not None
        assert "it is read-only" in opened.problem
        await opened.run(mend)
        await opened.flush()
        assert opened.problem is None
        assert await opened.agents() == [row(last_seen=LATER)]
        assert await opened.document("rates") == b"1"
    told = [record.message for record in caplog.records if record.name.endswith("db.store")]
    assert told == ["database not writable; going on from memory", "database writable again"]


async def test_a_newer_fact_beats_one_that_could_not_be_written(path: Path) -> None:
    async with Store(path) as opened:
        await opened.run(fail)
        await opened.save_agent(row("a"))
        await opened.save_agent(row("b"))
        opened.note_agent(row("a", last_seen=LATER))
        await opened.remove_agent(AgentId("b"))
        await opened.run(mend)
        await opened.flush()
        assert await opened.agents() == [row("a", last_seen=LATER)]


async def test_a_write_that_failed_does_not_come_back_over_a_newer_one(path: Path) -> None:
    async with Store(path) as opened:
        await opened.save_agent(row())
        await opened.run(fail)
        failing = asyncio.create_task(opened.save_agent(row(last_seen=LATER)))
        mended = asyncio.create_task(opened.run(mend))
        removing = asyncio.create_task(opened.remove_agent(AgentId("a")))
        await asyncio.gather(failing, mended, removing)
        await opened.flush()
        assert await opened.agents() == []


@pytest.mark.spec("OPERATION-6")
async def test_another_process_that_holds_the_file_does_not_stop_the_fleet(path: Path) -> None:
    async with Store(path) as opened:
        await opened.run(lambda db: list(db.execute("PRAGMA busy_timeout = 1")))
        with locked(path):
            await opened.save_agent(row())
            assert opened.problem is not None
            assert "another process holds it" in opened.problem
        await opened.flush()
        assert opened.problem is None
        assert await opened.agents() == [row()]


async def test_a_database_that_fails_to_the_end_does_not_prevent_the_end(path: Path) -> None:
    async with Store(path) as opened:
        await opened.run(fail)
        opened.note_agent(row())
    async with Store(path) as again:
        assert await again.agents() == []


async def test_a_store_is_used_while_it_is_open(path: Path) -> None:
    with pytest.raises(RuntimeError, match="not open"):
        await Store(path).agents()
