"""Backups while a coordinator runs, restored ones, and moves between engines."""

import asyncio
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from ollama_coordinator.db import DatabaseError, back_up, database_of
from ollama_coordinator.main import app
from support.coordinator import Running, running
from support.databases import PostgresSchema, Space, SqliteFile, store_of
from support.ollama import StandIn


async def run(*arguments: object, url: str = "") -> Result:
    environment = {"DATABASE_URL": url, "COLUMNS": "200"}
    texts = [str(argument) for argument in arguments]
    return await asyncio.to_thread(CliRunner(env=environment).invoke, app, texts)


async def lived(coordinator: Running, ollama: StandIn) -> None:
    """Have something of every kind in the database."""
    await coordinator.register(ollama, "gpü-1")
    for _ in range(3):
        assert (await coordinator.chat())[0] == 200
    assert (await coordinator.post("/api/keys", {"name": "anna"}))[0] == 201
    await coordinator.post("/api/aliases", {"name": "fast", "models": ["llama3.2"]})
    await coordinator.get("/api/history")
    await coordinator.parts.observation.sampler.write(everything=True)
    await coordinator.parts.store.flush()


async def known(coordinator: Running) -> Any:
    """What an operator would miss."""
    agents = [row["machine_name"] for row in await coordinator.get("/api/agents")]
    history = (await coordinator.get("/api/history"))["requests"]
    keys = (await coordinator.get("/api/keys"))["keys"]
    return agents, history, keys, await coordinator.get("/api/aliases")


@pytest.mark.spec("OPERATION-70")
async def test_a_backup_is_made_while_it_runs_and_restored_elsewhere(
    database: Space, tmp_path: Path
) -> None:
    file = tmp_path / "copy.db"
    async with StandIn() as ollama:
        async with running(database_url=database.url) as coordinator:
            await lived(coordinator, ollama)
            made = await run("backup", file, url=database.url)
            assert made.exit_code == 0, made.output
            before = await known(coordinator)
            assert len(before[1]) == 3
            refused = await run("restore", file, "--replace", url=database.url)
            assert refused.exit_code == 1
            assert "another coordinator uses it" in refused.output
        assert os.name == "nt" or file.stat().st_mode & 0o077 == 0
        assert sorted(path.name for path in tmp_path.glob("*copy*")) == ["copy.db"]
        again = await run("backup", file, url=database.url)
        assert "it exists already" in again.output
        full = await run("restore", file, url=database.url)
        assert full.exit_code == 1
        assert "--replace" in full.output
        other = f"sqlite:///{(tmp_path / 'other.db').as_posix()}"
        for url, more in ((other, ()), (database.url, ("--replace",))):
            restored = await run("restore", file, *more, url=url)
            assert restored.exit_code == 0, restored.output
            async with running(database_url=url) as coordinator:
                assert await known(coordinator) == before
                assert (await coordinator.chat())[0] in (200, 503)


@pytest.mark.spec("OPERATION-71")
async def test_everything_moves_from_sqlite_to_postgresql_and_back(
    postgres: PostgresSchema, tmp_path: Path
) -> None:
    first, last = SqliteFile(tmp_path / "first.db"), SqliteFile(tmp_path / "last.db")
    async with StandIn() as ollama, running(database_url=first.url) as coordinator:
        await lived(coordinator, ollama)
        before = await known(coordinator)
    for source, target in ((first, postgres), (postgres, last)):
        moved = await run("migrate-database", source.url, target.url)
        assert moved.exit_code == 0, moved.output
        async with running(database_url=target.url) as coordinator:
            assert await known(coordinator) == before
    secret = postgres.url.replace("postgresql://", "postgresql://u:secret@", 1)
    assert "secret" not in (await run("migrate-database", first.url, secret)).output


@pytest.mark.spec("OPERATION-70")
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        (b"no database at all, but long enough for a header" * 10, "not a database"),
        (b"", "not a database of a coordinator"),
    ],
)
async def test_what_is_no_backup_is_refused(
    tmp_path: Path, content: bytes | None, words: str
) -> None:
    file = tmp_path / "copy.db"
    if content is not None:
        file.write_bytes(content)
    refused = await run("restore", file, url=f"sqlite:///{tmp_path.as_posix()}/new.db")
    assert refused.exit_code == 1
    assert words in refused.output
    nothing = await run("backup", tmp_path / "b.db", url=f"sqlite:///{tmp_path.as_posix()}/no.db")
    assert nothing.exit_code == 1
    assert "no such file" in nothing.output
    assert not (tmp_path / "b.db").exists()


@pytest.mark.spec("OPERATION-70")
@pytest.mark.parametrize(
    ("table", "column"), [("documents", "body"), ("sqlite_master", "sql"), ("agents", "id")]
)
async def test_a_damaged_backup_is_refused_and_nothing_of_it_is_shown(
    tmp_path: Path, table: str, column: str
) -> None:
    file, target = tmp_path / "copy.db", tmp_path / "new.db"
    async with StandIn() as ollama, running(database_url=f"sqlite:///{tmp_path}/a.db") as running_:
        await lived(running_, ollama)
        back_up(database_of(f"sqlite:///{tmp_path}/a.db"), file)
    with closing(sqlite3.connect(file)) as db:
        texts = [row[0] for row in db.execute(f"SELECT {column} FROM {table}") if row[0]]  # noqa: S608
    texts = [text for text in texts if '"hash"' in text] or texts
    damaged = file.read_bytes()
    for text in texts:
        damaged = damaged.replace(text.encode(), text.encode()[:-2] + b"\xff" + text.encode()[-1:])
    file.write_bytes(damaged)
    done = await run("restore", file, url=f"sqlite:///{target}")
    assert done.exit_code == 1
    assert "damaged" in done.output
    assert "Traceback" not in done.output
    assert '"hash"' not in done.output
    if target.exists():
        with closing(sqlite3.connect(target)) as db:
            assert db.execute("SELECT count(*) FROM agents").fetchone() == (0,)


def take_step(database: Space, name: str) -> None:
    """What version 99.1.0 leaves in a database that it has changed."""
    body = """'{"version":"99.1.0"}'"""
    database.ask("UPDATE documents SET body = " + body + " WHERE name = 'opened'")  # noqa: S608
    if isinstance(database, SqliteFile):
        with closing(sqlite3.connect(database.path)) as connection, connection:
            sql = (
                "INSERT INTO _sqlite_migrations (migration_set, name, applied_at)"
                " VALUES ('ollama_coordinator', ?, '9')"
            )
            connection.execute(sql, [name])
    else:
        database.ask(f"INSERT INTO migrations VALUES ('{name}', '9')")  # noqa: S608


@pytest.mark.spec("OPERATION-72")
@pytest.mark.parametrize("step", ["create_tomorrow", "add_tomorrow"])
async def test_what_a_newer_version_added_is_no_hindrance_and_is_not_lost_in_a_backup(
    database: Space, tmp_path: Path, step: str
) -> None:
    async with running(database_url=database.url):
        pass
    take_step(database, step)
    with pytest.raises(DatabaseError, match=r"version 99\.1\.0 wrote it"):
        back_up(database_of(database.url), tmp_path / "copy.db")
    async with running(database_url=database.url) as coordinator:
        async with StandIn() as ollama:
            await coordinator.register(ollama, "first")
        async with coordinator.session.get(f"{coordinator.url}/api/history") as answer:
            assert answer.status == 200
    with pytest.raises(DatabaseError, match=f"it has {step}, unknown here \\("):
        back_up(database_of(database.url), tmp_path / "copy.db")


@pytest.mark.spec("OPERATION-72")
async def test_a_database_of_a_newer_version_is_refused_with_both_versions(
    database: Space, tmp_path: Path
) -> None:
    async with running(database_url=database.url):
        pass
    take_step(database, "later")
    with pytest.raises(DatabaseError, match=r"version 99\.1\.0 wrote it, this is .*update"):
        async with store_of(database):
            pass
    with pytest.raises(DatabaseError, match=r"version 99\.1\.0 wrote it"):
        back_up(database_of(database.url), tmp_path / "copy.db")
