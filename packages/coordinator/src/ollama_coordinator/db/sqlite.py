"""SQLite as the database: a file, or memory; what one coordinator needs without any server.

A file that was deleted or replaced while it was open is written anew from the open one.
"""

import logging
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, closing
from functools import partial
from pathlib import Path
from typing import Any

import sqlite_utils
from sqlite_utils import Migrations

from .database import InUse
from .file import FileClaim
from .schema import STEPS, Column, Table, newer, opened

log = logging.getLogger(__name__)

LOCK_SECONDS = 2.0
"""How long to wait for another process's lock, such as a backup's."""


class SqliteDatabase:
    """The database in a file; with `None`, in memory."""

    errors: tuple[type[Exception], ...] = (sqlite3.Error, OSError)
    of_machines = False

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._claim = FileClaim(path)
        self._opened: sqlite_utils.Database | None = None

    @property
    def name(self) -> str:
        """The file's whole path, whatever folder the program was started in."""
        return "in memory" if self._path is None else str(self._path.absolute())

    def look(self, document: str) -> bytes | None:
        """A document before the database is open."""
        if self._path is None or not self._path.is_file():
            return None
        try:
            with closing(sqlite3.connect(self._path, timeout=LOCK_SECONDS)) as connection:
                sql = "SELECT body FROM documents WHERE name = ?"
                row = connection.execute(sql, [document]).fetchone()
        except sqlite3.Error:
            return None
        return str(row[0]).encode() if row else None

    def open(self) -> None:
        """Claim the file, connect, bring the schema up to date, and try to write."""
        self._claim.take()
        try:
            self._connect()
        except (sqlite3.Error, ValueError):
            self._claim.release()
            raise

    def _connect(self) -> None:
        target = ":memory:" if self._path is None else str(self._path)
        connection = sqlite3.connect(target, timeout=LOCK_SECONDS)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            self._opened = sqlite_utils.Database(connection)
            self._check_age(serves=True)
            _migrations.apply(self._opened)
            # A schema that is up to date needed no write: find out now whether one works.
            connection.execute("BEGIN IMMEDIATE")
            sql = "INSERT OR REPLACE INTO documents VALUES ('opened', ?)"
            connection.execute(sql, [opened()])
            connection.execute("COMMIT")
        except (sqlite3.Error, ValueError):
            connection.close()
            raise
        self._claim.note()

    def _check_age(self, *, serves: bool) -> None:
        steps = [step.name for step in _migrations.applied(self._db)]
        sql = "SELECT body FROM documents WHERE name = 'opened'"
        rows = list(self._db.query(sql)) if "create_documents" in steps else []
        text = newer(steps, rows[0]["body"] if rows else None, serves=serves)
        if text:
            raise sqlite3.DatabaseError(text)

    def open_to_read(self) -> None:
        """Connect, and see what is in it now."""
        if self._path is None or not self._path.is_file():
            raise sqlite3.OperationalError("there is no such file")
        uri = f"{self._path.absolute().as_uri()}?mode=ro"
        connection = sqlite3.connect(uri, uri=True, timeout=LOCK_SECONDS, isolation_level=None)
        try:
            self._opened = sqlite_utils.Database(connection)
            connection.execute("BEGIN")
            self._check_age(serves=False)
            if "documents" not in self._opened.table_names():
                raise sqlite3.DatabaseError("it is not a database of a coordinator")
        except (sqlite3.Error, ValueError):
            connection.close()
            raise

    def open_beside(self) -> None:
        """Connect as a process that does not lead; what it writes may be lost in a crash."""
        if self._path is None:
            raise sqlite3.OperationalError("a database in memory is one process's alone")
        connection = sqlite3.connect(self._path, timeout=LOCK_SECONDS)
        connection.execute("PRAGMA synchronous = NORMAL")
        self._opened = sqlite_utils.Database(connection)

    def address_here(self) -> str:
        """Loopback: all that have the file are on this machine."""
        return "127.0.0.1"

    def now_ms(self) -> int:
        """The machine's clock."""
        return int(time.time() * 1000)

    def is_led(self) -> bool:
        """Whether a process has claimed the file."""
        try:
            self._claim.take()
        except InUse:
            return True
        self._claim.release()
        return False

    def end_silent_leader(self, seconds: float) -> bool:
        """No: the file is claimed as long as its process lives."""
        return False

    def yield_lead(self) -> None:
        """Leave the file to another process; the connection stays."""
        self._claim.release()

    def settle(self) -> None:
        """Have everything in the one file, for copies that are only read."""
        self._db.conn.execute("PRAGMA journal_mode = DELETE")

    def close(self) -> None:
        """Close the file, and leave it to others."""
        self._db.close()
        self._claim.release()

    def check(self) -> None:
        """Where the path names another file now, or none, write everything anew.

        A deleted file can be read as long as it is open.
        """
        if self._path is None or self._claim.is_true():
            return
        # The lock may have been deleted with it: take it again, or leave the path to another.
        self._claim.release()
        self._claim.take()
        draft = self._path.with_name(f"{self._path.name}.anew")
        draft.unlink(missing_ok=True)
        with closing(sqlite3.connect(draft)) as connection:
            self._db.conn.backup(connection)
        aside = self._claim.put_aside()
        draft.replace(self._path)
        deleted = self._db
        try:
            self._connect()
        except (sqlite3.Error, ValueError):
            self._opened = deleted
            raise
        deleted.close()
        extra = {"database": str(self._path), "put_aside": aside}
        log.error("the database's file was deleted or replaced; written anew", extra=extra)

    @property
    def _db(self) -> sqlite_utils.Database:
        if self._opened is None:
            raise RuntimeError("the database is not open")
        return self._opened

    def atomic(self, *, is_long: bool = False) -> AbstractContextManager[object]:
        """A transaction."""
        # Without it, sqlite3 leaves a transaction open when a statement fails, and every later
        # write becomes part of it and is never committed.
        return self._db.atomic()

    def query(self, sql: str, values: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """The rows of a statement."""
        return list(self._db.query(sql, values))

    def execute(self, sql: str, values: Sequence[Any] = ()) -> None:
        """A statement without rows."""
        self._db.execute(sql, values)

    def execute_many(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        """A statement for each row of values."""
        self._db.conn.executemany(sql, rows)

    def advice(self, error: Exception) -> str:
        """SQLite's text, with what an operator can do about it."""
        text, _, _ = str(error).partition(" with text ")  # what is damaged may be a secret
        hint = next((hint for key, hint in _HINTS.items() if key in text), None)
        return f"{text} ({hint})" if hint else text


_HINTS = {
    "locked": "another process holds it; stop that one, or give another DATABASE_URL",
    "readonly": "it is read-only; make the file and its folder writable",
    "read-only": "it is read-only; make the file and its folder writable",
    "full": "the disk is full; free some space",
    "not a database": "the file is not an SQLite database; move it away or restore a copy",
    "malformed": "the file is damaged; move it away or restore a copy",
    "not decode": "the file is damaged; move it away or restore a copy",
    "unknown here": "a newer version wrote it; update the coordinator, or give another"
    " DATABASE_URL",
    "unable to open": "the file cannot be opened; check that its folder exists and is writable",
}


def _make(what: Table | Column, db: sqlite_utils.Database) -> None:
    if isinstance(what, Column):
        db.table(what.table).add_column(what.name, what.kind)
        return
    made = db.table(what.name)
    key = what.key if len(what.key) > 1 else what.key[0]
    made.create(dict(what.columns), pk=key, not_null=set(what.required))
    for columns in what.indexes:
        made.create_index(list(columns))


def _migrations_of(steps: Iterable[tuple[str, Table | Column]]) -> Migrations:
    made = Migrations("ollama_coordinator")
    for name, what in steps:
        step: Callable[[sqlite_utils.Database], None] = partial(_make, what)
        made(name=name)(step)
    return made


_migrations = _migrations_of(STEPS.items())
