"""The databases that a coordinator can have, and what tests do to them from outside.

The PostgreSQL half runs where `TEST_DATABASE_URL` names a server; each test has a schema there.
"""

import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex
from typing import Any, Protocol

import pytest

from ollama_coordinator.db import AgentRow, Database, Store, database_of
from ollama_coordinator_common.protocol import RegisterRequest
from ollama_coordinator_common.types import AgentId

Query = Callable[[str, Sequence[Any]], list[dict[str, Any]]]

SERVER = "TEST_DATABASE_URL"


class Space(Protocol):
    """A database of a test's own; `url` is its `DATABASE_URL`."""

    url: str

    def ask(self, sql: str) -> list[tuple[Any, ...]]:
        """The rows of a statement that another process runs; none for a change."""

    @staticmethod
    def stop_writing(db: Database) -> None:
        """From now on no write succeeds; for `Store.run`."""

    @staticmethod
    def mend(db: Database) -> None:
        """The opposite of `stop_writing`."""

    @staticmethod
    def plan(query: Query, sql: str, values: Sequence[Any]) -> str:
        """How the engine would go about a statement in a table too large to be read as a whole."""


AT = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


def agent_row(agent_id: str = "a", **more: object) -> AgentRow:
    request = RegisterRequest("gpü-1", "fd00::7", "0.33.0", 11434, "5b0c", 4000)
    values = {"registered_at": AT, "last_seen": AT, **more}
    return AgentRow(AgentId(agent_id), request, **values)  # type: ignore[arg-type]


FULL_ROW = agent_row(
    has_left=True,
    settings='{"display_name":"Büro"}'.encode(),
    tags=b'{"models":[ {"name":"m"} ]}',
    blobs=b'{"m":"sha256:0"}',
)


def slow(db: Database) -> None:
    """Keep the database's thread busy for a moment; for `Store.run`."""
    time.sleep(0.05)


def store_of(space: Space) -> Store:
    return Store(database_of(space.url))


def agent_ids(space: Space) -> list[str]:
    """The agents that another process finds."""
    return [str(row[0]) for row in space.ask("SELECT id FROM agents ORDER BY registered_at, id")]


class SqliteFile:
    """A file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = f"sqlite:///{path.as_posix()}"

    def ask(self, sql: str) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self.path)) as connection, connection:
            return list(connection.execute(sql))

    @staticmethod
    def stop_writing(db: Database) -> None:
        db.execute("PRAGMA query_only = ON")

    @staticmethod
    def mend(db: Database) -> None:
        db.execute("PRAGMA query_only = OFF")

    @staticmethod
    def plan(query: Query, sql: str, values: Sequence[Any]) -> str:
        return str(query(f"EXPLAIN QUERY PLAN {sql}", values))


class PostgresSchema:
    """A schema on a server."""

    def __init__(self, server: str, schema: str) -> None:
        self.schema = schema
        joint = "&" if "?" in server else "?"
        self.url = f"{server}{joint}options=-csearch_path%3D{schema}"

    def ask(self, sql: str) -> list[tuple[Any, ...]]:
        import psycopg

        with closing(psycopg.connect(self.url, autocommit=True)) as session:
            cursor = session.execute(sql)
            return cursor.fetchall() if cursor.description else []

    @staticmethod
    def stop_writing(db: Database) -> None:
        db.execute("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY")

    @staticmethod
    def mend(db: Database) -> None:
        db.execute("SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE")

    @staticmethod
    def plan(query: Query, sql: str, values: Sequence[Any]) -> str:
        for dear in ("enable_seqscan", "enable_sort", "enable_bitmapscan"):
            query(f"SELECT set_config('{dear}', 'off', true)", ())
        return str(query(f"EXPLAIN {sql}", values))


@contextmanager
def postgres_schema() -> Iterator[PostgresSchema]:
    """An empty schema during the block; the test is skipped where there is no server."""
    server = os.environ.get(SERVER)
    if not server:
        pytest.skip(f"no PostgreSQL: {SERVER}=postgresql://USER@HOST/DATABASE names one")
    space = PostgresSchema(server, f"test_{token_hex(6)}")
    space.ask(f"CREATE SCHEMA {space.schema}")
    try:
        yield space
    finally:
        space.ask(f"DROP SCHEMA {space.schema} CASCADE")
