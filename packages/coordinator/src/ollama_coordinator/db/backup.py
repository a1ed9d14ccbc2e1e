"""Copies of whole databases, from either engine to either: backups, restored ones, and moves.

A backup is an SQLite file with the tables of the schema, whatever it is a backup of.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any

from .address import file_database
from .database import IN_USE, Database, DatabaseError, InUse
from .schema import STEPS, Table

ROWS_AT_ONCE = 1000
"""A row takes one or two kilobytes."""

TABLES = tuple(step for step in STEPS.values() if isinstance(step, Table))

OF_EVERY_START = "opened"
"""The document that also an empty database has."""


def back_up(source: Database, file: Path) -> int:
    """Write everything in a database, which may be in use, into a new file; how many rows.

    Raises:
        DatabaseError: the file exists, one of the two fails, or a newer version wrote the source.
    """
    if file.exists():
        raise DatabaseError(str(file), "it exists already; give the name of a new file")
    draft = file.with_name(f".{file.name}.{token_hex(4)}")
    target = file_database(draft)
    try:
        with _read(source):
            if not file.parent.is_dir():
                raise DatabaseError(str(file), "its folder does not exist")
            os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))  # it has secrets
            with _written(target):
                rows = _copy(source, target)
                target.settle()
            draft.replace(file)
    except OSError as exc:
        raise DatabaseError(str(file), str(exc.strerror)) from exc
    finally:
        for suffix in ("", ".lock", "-wal", "-shm"):
            Path(f"{draft}{suffix}").unlink(missing_ok=True)
    return rows


def move(source: Database, target: Database, *, replace: bool = False) -> int:
    """Copy everything from one database into another, all or nothing; how many rows.

    Raises:
        DatabaseError: one of the two fails, a coordinator uses the target, or it is not empty and
            not to be replaced.
    """
    with _read(source), _written(target):
        if not replace and any(_has_rows(target, table) for table in TABLES):
            text = "it is not empty; --replace deletes what is in it"
            raise DatabaseError(target.name, text)
        return _copy(source, target)


def restored(file: Path, target: Database, *, replace: bool = False) -> int:
    """Copy everything from a backup into a database; see `move`.

    Raises:
        DatabaseError: as `move`; there is no such file.
    """
    if not file.is_file():
        raise DatabaseError(str(file), "there is no such file")
    return move(file_database(file), target, replace=replace)


def _copy(source: Database, target: Database) -> int:
    rows = 0
    with _named(target), target.atomic(is_long=True):
        for table in TABLES:
            target.execute(f"DELETE FROM {table.name}")  # noqa: S608 - the schema's own names
            for some in _rows(source, table):
                # The numbers of rows are the database's own; their order stays.
                columns = [name for name in some[0] if not (table.numbered and name in table.key)]
                places = ", ".join("?" * len(columns))
                sql = f"INSERT INTO {table.name} ({', '.join(columns)}) VALUES ({places})"  # noqa: S608
                target.execute_many(sql, [[row[name] for name in columns] for row in some])
                rows += len(some)
    return rows


def _rows(source: Database, table: Table) -> Iterator[list[dict[str, Any]]]:
    """All rows, some at a time, in the order of their key."""
    key = ", ".join(table.key)
    places = ", ".join("?" * len(table.key))
    after: list[Any] = []
    while True:
        where = f"WHERE ({key}) > ({places})" if after else ""
        sql = f"SELECT * FROM {table.name} {where} ORDER BY {key} LIMIT ?"  # noqa: S608
        with _named(source):
            rows = source.query(sql, [*after, ROWS_AT_ONCE])
        if not rows:
            return
        yield rows
        after = [rows[-1][name] for name in table.key]


def _has_rows(db: Database, table: Table) -> bool:
    with _named(db):
        rows = db.query(f"SELECT * FROM {table.name} LIMIT 2")  # noqa: S608
    return any(row.get("name") != OF_EVERY_START for row in rows)


@contextmanager
def _read(db: Database) -> Iterator[None]:
    yield from _opened(db, db.open_to_read)


@contextmanager
def _written(db: Database) -> Iterator[None]:
    yield from _opened(db, db.open)


def _opened(db: Database, way: Callable[[], None]) -> Iterator[None]:
    with _named(db):
        way()
    try:
        yield
    finally:
        db.close()


@contextmanager
def _named(db: Database) -> Iterator[None]:
    """An engine's error as that of this database."""
    try:
        yield
    except InUse as exc:
        raise DatabaseError(db.name, IN_USE, in_use=True) from exc
    except db.errors as exc:
        raise DatabaseError(db.name, db.advice(exc)) from exc
    except ValueError as exc:
        raise DatabaseError(db.name, f"{exc} (it is damaged; use another copy)") from exc
