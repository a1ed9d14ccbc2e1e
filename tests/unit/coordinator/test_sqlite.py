"""SQLite's file: when it cannot be opened, and when it is deleted, replaced or held by another."""

import asyncio
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from ollama_coordinator.db import Database, DatabaseError, Store, database_of, sqlite, store
from support.databases import FULL_ROW, SqliteFile, agent_ids, agent_row
from support.deadline import DEADLINE_SECONDS


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "coordinator.db"


def stored(path: Path | None) -> Store:
    return Store(database_of("sqlite://:memory:" if path is None else SqliteFile(path).url))


def ids_in(path: Path) -> list[str]:
    """The agents that a process other than the coordinator finds in the file."""
    return agent_ids(SqliteFile(path))


async def refused(path: Path) -> str:
    opened = stored(path)
    with pytest.raises(DatabaseError) as caught:
        await opened.__aenter__()
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


async def test_a_database_in_memory_keeps_nothing() -> None:
    async with stored(None) as opened:
        await opened.save_agent(agent_row())
        assert await opened.agents() == [agent_row()]
    async with stored(None) as again:
        assert await again.agents() == []


@pytest.mark.spec("OPERATION-24")
async def test_a_second_coordinator_on_a_file_is_refused(path: Path) -> None:
    link = path.with_name("link.db")
    async with stored(path) as opened:
        link.symlink_to(path)
        for name in (path, link):
            assert "another coordinator uses it; stop that one" in await refused(name)
        await opened.save_agent(agent_row())
        assert opened.problem is None
    async with stored(link) as again:
        assert await again.agents() == [agent_row()]


@pytest.mark.spec("OPERATION-25")
@pytest.mark.parametrize(
    "left",
    [(), ("-wal",), ("-shm",), ("-wal", "-shm"), ("", "-shm"), ("", "-wal"), ("",)],
)
async def test_a_deleted_file_is_written_anew(path: Path, left: tuple[str, ...]) -> None:
    async with stored(path) as opened:
        await opened.save_agent(FULL_ROW)
        opened.note_document("rates", b'{"a":1}')
        await opened.flush()
        for suffix in {"", "-wal", "-shm"} - set(left):
            Path(f"{path}{suffix}").unlink()
        await opened.save_agent(agent_row("b"))
        assert opened.problem is None
        assert ids_in(path) == ["a", "b"]
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, f"{path.name}.lock"]
    async with stored(path) as again:
        assert await again.agents() == [FULL_ROW, agent_row("b")]
        assert await again.document("rates") == b'{"a":1}'


@pytest.mark.spec("OPERATION-25")
async def test_a_deleted_file_is_noticed_although_nothing_is_written(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store, "FLUSH_SECONDS", 0.0)
    async with stored(path) as opened, asyncio.timeout(DEADLINE_SECONDS):
        await opened.save_agent(agent_row())
        path.unlink()
        while not path.exists():
            await asyncio.sleep(0)
    assert ids_in(path) == ["a"]
    assert caplog.messages.count("the database's file was deleted or replaced; written anew") == 1


@pytest.mark.spec("OPERATION-25")
async def test_a_file_that_is_put_in_its_place_is_kept_beside_it(path: Path) -> None:
    other = path.with_name("other.db")
    async with stored(other) as opened:
        await opened.save_agent(agent_row("other"))
    async with stored(path) as opened:
        await opened.save_agent(agent_row())
        other.replace(path)
        await opened.flush()
        assert ids_in(path) == ["a"]
    [aside] = path.parent.glob("*.replaced-*")
    assert ids_in(aside) == ["other"]


@pytest.mark.spec("OPERATION-25")
async def test_a_folder_that_is_gone_is_a_problem_until_it_is_back(tmp_path: Path) -> None:
    path = tmp_path / "here" / "coordinator.db"
    path.parent.mkdir()
    async with stored(path) as opened:
        await opened.save_agent(agent_row())
        shutil.rmtree(path.parent)
        await opened.save_agent(agent_row("b"))
        assert "cannot be opened" in str(opened.problem)
        path.parent.mkdir()
        await opened.flush()
        assert opened.problem is None
        assert ids_in(path) == ["a", "b"]


@pytest.mark.spec("OPERATION-25")
async def test_a_path_that_another_coordinator_has_taken_is_left_to_it(path: Path) -> None:
    async with stored(path) as opened:
        await opened.save_agent(agent_row())
        for one in path.parent.iterdir():
            one.unlink()
        async with stored(path) as other:
            await other.save_agent(agent_row("other"))
            await opened.flush()
            assert "another coordinator uses it" in str(opened.problem)
            assert ids_in(path) == ["other"]
        await opened.flush()
        assert opened.problem is None
    assert ids_in(path) == ["a"]


@pytest.mark.spec("OPERATION-7")
async def test_an_older_database_is_brought_up_to_date_and_keeps_its_agents(path: Path) -> None:
    async with stored(path) as opened:
        await opened.save_agent(FULL_ROW)
        steps = await opened.run(applied)
    with closing(sqlite3.connect(path)) as older, older:
        tables = [name for (name,) in older.execute("SELECT name FROM sqlite_master") if name]
        for table in set(tables) & {
            "documents",
            "requests",
            "buckets",
            "coordinators",
            "usage_days",
            "audit",
        }:
            older.execute(f"DROP TABLE {table}")
        older.execute("DELETE FROM _sqlite_migrations WHERE name <> 'create_agents'")
    async with stored(path) as again:
        assert await again.agents() == [FULL_ROW]
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
    async with stored(path) as opened:
        await opened.save_agent(agent_row(tags=b'{"models":[]}' + b" " * 100_000))
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (path.stat().st_size - 4096))
    assert "damaged" in await refused(path)


@pytest.mark.spec("OPERATION-5")
async def test_a_locked_file_is_an_error_that_says_what_to_do(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "LOCK_SECONDS", 0.01)
    with locked(path):
        assert "another process holds it" in await refused(path)


async def test_a_database_of_a_newer_version_is_left_alone(path: Path) -> None:
    async with stored(path):
        pass
    with closing(sqlite3.connect(path)) as newer, newer:
        newer.execute(
            "INSERT INTO _sqlite_migrations (migration_set, name, applied_at)"
            " VALUES ('ollama_coordinator', 'change_tomorrow', '2030-01-01')"
        )
    assert "a newer version wrote it; update the coordinator" in await refused(path)


async def test_migrations_of_another_program_in_the_file_do_not_matter(path: Path) -> None:
    async with stored(path):
        pass
    with closing(sqlite3.connect(path)) as other, other:
        other.execute(
            "INSERT INTO _sqlite_migrations (migration_set, name, applied_at)"
            " VALUES ('another program', 'create_things', '2030-01-01')"
        )
    async with stored(path) as again:
        assert await again.agents() == []


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
        assert advice in sqlite.SqliteDatabase(None).advice(caught.value)


@pytest.mark.spec("OPERATION-6")
async def test_another_process_that_holds_the_file_does_not_stop_the_fleet(path: Path) -> None:
    async with stored(path) as opened:
        await opened.run(lambda db: db.execute("PRAGMA busy_timeout = 1"))
        with locked(path):
            await opened.save_agent(agent_row())
            assert opened.problem is not None
            assert "another process holds it" in opened.problem
        await opened.flush()
        assert opened.problem is None
        assert await opened.agents() == [agent_row()]
