"""Finished requests and statistics: written behind in batches, bounded in number, read in pages.

Prompts and answers are never kept. A page starts at a key (`Cursor`), so that the last page of
100,000 rows costs as much as the first.
"""

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from functools import partial
from typing import Any, NamedTuple, TypeVar

import msgspec
from msgspec import Struct, structs

from . import audit
from .audit import Change
from .database import Database, DatabaseError
from .finished import (
    INSERT,
    SHOWN,
    Cursor,
    Filter,
    Finished,
    conditions,
    from_columns,
    milliseconds,
    moved_why,
    packed,
    to_columns,
    why_of,
)
from .store import Store
from .usage import Used, add_up, day_of
from .usage import move as move_usage
from .usage import prune as prune_usage
from .usage import read as read_usage
from .usage import to_column as column_of_usage

T = TypeVar("T")

UNWRITTEN_AT_MOST = 20_000
"""When the database fails for long, older requests are dropped: each takes a kilobyte or two."""

ROWS_AT_ONCE = 500
"""The most rows that one transaction writes, deletes or corrects: some tens of milliseconds on a
slow disk, after which the others that wait for the database have their turn."""

_PUT_BUCKET = """
    INSERT INTO buckets (tier, start, name, body) VALUES (?, ?, ?, ?)
    ON CONFLICT (tier, name, start) DO UPDATE SET body = excluded.body
"""


IDS_AT_ONCE = 500
"""Values of one statement: SQLite's limit was 999 for long."""


class Unwritten(NamedTuple):
    """A request that is not in the database yet, with its packed reasons and what it used.

    `stepped_by`: by how much the wall clock had been set when its times were read.
    """

    request: Finished
    why: bytes
    used: Used | None
    stepped_by: float


class StoredBucket(Struct, frozen=True):
    """Statistics of one period; `body` is JSON, `start` is in Unix seconds."""

    tier: int
    start: int
    name: str
    body: bytes


class Move(Struct):
    """Rows of a table after `after`, up to `last`, whose times are to become `seconds` later."""

    table: str
    after: int
    last: int
    seconds: float


class Wait(NamedTuple):
    """One request: what it waited for, in seconds; `ended_at` is Unix time."""

    model: str
    agent_id: str | None
    status: str
    ended_at: float
    total_seconds: float
    waited_seconds: float
    load_seconds: float
    prompt_tokens: int
    output_tokens: int


_WAITS = """
    SELECT model, agent_id, status, CAST(finished_ms AS double precision) / 1000 AS ended_at,
        total_seconds, waited_seconds, coalesce(load_seconds, 0) AS load_seconds,
        coalesce(prompt_tokens, 0) AS prompt_tokens, coalesce(output_tokens, 0) AS output_tokens
    FROM requests WHERE finished_ms >= ? AND status IN ('served', 'cancelled')
        AND coalesce(lane, '') <> 'batch'
    ORDER BY finished_ms DESC LIMIT ?
"""


class History:
    """The tables of finished requests and of statistics."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._unwritten: deque[Unwritten] = deque(maxlen=UNWRITTEN_AT_MOST)
        self._changes: deque[tuple[Change, float]] = deque(maxlen=UNWRITTEN_AT_MOST)
        self._before = dict.fromkeys(TIMED, 0)
        self._stepped_by = 0.0
        self._moves: list[Move] = []
        self._following = asyncio.Lock()

    async def begin(self) -> None:
        """Know which rows are those of earlier processes.

        Raises:
            DatabaseError: the database cannot be read.
        """
        self._before = await self._store.run(_last_rows)

    # ── writing ───────────────────────────────────────────────────────────────────────────────

    def note(
        self, request: Finished, why: Any, used: Used | None = None, *, stepped_by: float = 0.0
    ) -> None:
        """Write a request behind, and what it used; `why` is kept as JSON.

        `stepped_by`: the seconds by which the wall clock had been set since the start, when its
        times were read. It is packed at once: as objects it is several times as large, and it may
        wait long.
        """
        self._unwritten.append(Unwritten(request, packed(why), used, stepped_by))

    def note_change(self, change: Change, *, stepped_by: float = 0.0) -> None:
        """Write behind that somebody changed something; `stepped_by` as in `note`."""
        self._changes.append((change, stepped_by))

    async def write(self, buckets: Sequence[StoredBucket]) -> bool:
        """Write what was noted and these buckets; a request that cannot be written stays noted.

        At most `ROWS_AT_ONCE` of a kind are one transaction: what waited while the database was
        away is too much for a single one.
        """
        rows = max(len(self._unwritten), len(self._changes), len(buckets))
        for start in range(0, rows, ROWS_AT_ONCE):
            if not await self._write_some(buckets[start : start + ROWS_AT_ONCE]):
                return False
        return True

    async def _write_some(self, buckets: Sequence[StoredBucket]) -> bool:
        batch, changes = _first(self._unwritten), _first(self._changes)
        stepped_by = self._stepped_by
        try:
            await self._store.run(lambda db: _write(db, batch, stepped_by, changes, buckets))
        except (DatabaseError, asyncio.CancelledError) as exc:
            # A cancelled write may not have begun; what is written twice is in there once.
            newer, self._unwritten = self._unwritten, deque(batch, maxlen=UNWRITTEN_AT_MOST)
            self._unwritten.extend(newer)
            self._changes.extendleft(reversed(changes))
            if not isinstance(exc, DatabaseError):
                raise
            return False
        return True

    async def follow(self, stepped_by: float) -> None:
        """Correct the times that were written by this process before the wall clock was set.

        Of requests, with the days of what they used, and of changes.

        `stepped_by`: the seconds by which it was set since the start.

        Raises:
            DatabaseError: the database cannot be written; the next call goes on.
        """
        async with self._following:
            if stepped_by != self._stepped_by:
                await self._begin_move(stepped_by)
            while self._moves:
                move = self._moves[0]
                until = min(move.after + ROWS_AT_ONCE, move.last)
                await self._store.run(partial(_move, move=move, until=until))
                move.after = until
                if until >= move.last:
                    del self._moves[0]

    async def _begin_move(self, stepped_by: float) -> None:
        before, self._stepped_by = self._stepped_by, stepped_by
        try:
            # Writes that began earlier are in by then, and later ones have the new times.
            last = await self._store.run(_last_rows)
        except BaseException:
            self._stepped_by = before
            raise
        for table in TIMED:
            move = Move(table, self._before[table], last[table], stepped_by - before)
            self._moves.append(move)

    async def prune_to(self, rows: int) -> None:
        """Delete the oldest requests and changes, until there are so many of each.

        Raises:
            DatabaseError: the database cannot be written.
        """
        for table in ("requests", "audit"):
            where = f"seq <= (SELECT max(seq) FROM {table}) - ?"  # noqa: S608
            await self._delete(table, ("seq",), where, [rows])

    async def prune_before(self, oldest: datetime) -> None:
        """Delete the requests and changes of earlier, and the usage of the days before.

        Raises:
            DatabaseError: the database cannot be written.
        """
        first_day = oldest.astimezone(UTC).date()
        await self._store.run(lambda db: prune_usage(db, first_day))
        await self._delete("requests", ("seq",), "finished_ms < ?", [milliseconds(oldest)])
        await self._delete("audit", ("seq",), "at_ms < ?", [milliseconds(oldest)])

    async def prune_buckets(self, tier: int, of_fleet: float, of_agents: float) -> None:
        """Delete the buckets of a tier that began earlier (Unix seconds).

        Raises:
            DatabaseError: the database cannot be written.
        """
        key = ("tier", "name", "start")
        for oldest, name in ((of_fleet, "name = ''"), (of_agents, "name <> ''")):
            where = f"tier = ? AND start < ? AND {name}"
            await self._delete("buckets", key, where, [tier, oldest])

    async def _delete(
        self, table: str, key: Sequence[str], where: str, values: Sequence[Any]
    ) -> None:
        """Delete rows, a few at a time: others that wait for the database come between."""
        one = " AND ".join(f"{column} = ?" for column in key)
        columns = ", ".join(key)
        find = f"SELECT {columns} FROM {table} WHERE {where} LIMIT {ROWS_AT_ONCE}"  # noqa: S608
        delete = f"DELETE FROM {table} WHERE {one}"  # noqa: S608

        def some(db: Database) -> int:
            rows = [list(row.values()) for row in db.query(find, values)]
            db.execute_many(delete, rows)
            return len(rows)

        while await self._store.run(some) == ROWS_AT_ONCE:
            pass

    # ── reading ───────────────────────────────────────────────────────────────────────────────

    async def page(
        self, wanted: Filter, *, limit: int, after: Cursor | None = None
    ) -> tuple[list[Finished], Cursor | None]:
        """The next finished requests, newest first, and where to go on; `None` at the end.

        The first page includes what is not written yet.

        Raises:
            DatabaseError: the database cannot be read.
        """
        if after is None:
            await self.write(())
        where, values = conditions(wanted, after)
        sql = f"SELECT {SHOWN} FROM requests {where} ORDER BY finished_ms DESC, seq DESC LIMIT ?"  # noqa: S608
        return await self._store.run(lambda db: _page(db, sql, [*values, limit + 1]))

    async def find(self, request_id: str) -> tuple[Finished, bytes] | None:
        """One request and its reasons as JSON; `None` if it is not in the database.

        Raises:
            DatabaseError: the database cannot be read.
        """
        return await self._store.run(lambda db: _find(db, request_id))

    async def written(self, ids: Sequence[str]) -> set[str]:
        """Which of these requests are in the database.

        Raises:
            DatabaseError: the database cannot be read.
        """
        return await self._store.run(lambda db: _written(db, ids))

    async def waits(self, since: float, most: int) -> list[tuple[Any, ...]]:
        """The fields of a `Wait` for each request that ended since a Unix time, the newest first.

        Batches are left out: nobody waits for them.

        Raises:
            DatabaseError: the database cannot be read.
        """
        await self.write(())
        values = [round(since * 1000), most]
        return await self._store.run(
            lambda db: [tuple(row.values()) for row in db.query(_WAITS, values)]
        )

    async def usage(
        self, by: Sequence[str], since: date, until: date, only: dict[str, str]
    ) -> list[Used]:
        """Usage from one day to another, both included; see `usage.read`.

        Raises:
            DatabaseError: the database cannot be read.
        """
        await self.write(())
        return await self._store.run(lambda db: read_usage(db, by, since, until, only))

    async def changes(self, limit: int, **wanted: Any) -> tuple[list[Change], int | None]:
        """The next changes, newest first, and where to go on; see `audit.page`.

        Raises:
            DatabaseError: the database cannot be read.
        """
        await self.write(())
        return await self._store.run(lambda db: audit.page(db, limit=limit, **wanted))

    async def choices(self) -> dict[str, list[str]]:
        """The models, agents and clients to filter by.

        Raises:
            DatabaseError: the database cannot be read.
        """
        return await self._store.run(_choices)

    async def buckets(self, tier: int, name: str, first: float, last: float) -> list[StoredBucket]:
        """The buckets of one series that began between two Unix times.

        Raises:
            DatabaseError: the database cannot be read.
        """
        sql = "SELECT * FROM buckets WHERE tier = ? AND name = ? AND start BETWEEN ? AND ?"
        rows = await self._store.run(lambda db: db.query(sql, [tier, name, first, last]))
        return [_bucket(row) for row in rows]

    async def last_buckets(self, starts: dict[int, int]) -> list[StoredBucket]:
        """The buckets of all series that began at the given time of their tier.

        Raises:
            DatabaseError: the database cannot be read.
        """
        any_of = " OR ".join(["(tier = ? AND start = ?)"] * len(starts))
        sql = f"SELECT * FROM buckets WHERE {any_of}"  # noqa: S608
        values = [value for pair in starts.items() for value in pair]
        rows = await self._store.run(lambda db: db.query(sql, values))
        return [_bucket(row) for row in rows]


def _first(noted: deque[T]) -> list[T]:
    """Take the oldest ones, for one transaction."""
    return [noted.popleft() for _ in range(min(len(noted), ROWS_AT_ONCE))]


# ── in the database's thread ──────────────────────────────────────────────────────────────────


def _write(
    db: Database,
    requests: Sequence[Unwritten],
    stepped_by: float,
    changes: Sequence[tuple[Change, float]],
    buckets: Iterable[StoredBucket],
) -> None:
    """Write what was noted, with its times by the wall clock that was set by `stepped_by`."""
    # A write that was cancelled may have been done: what is in there already is not written again.
    known = _known(db, "requests", [one.request.id for one in requests])
    new = [_at_last(one, stepped_by) for one in requests if one.request.id not in known]
    rows = [to_columns(one.request, one.why, column_of_usage(one.used)) for one in new]
    db.execute_many(INSERT, rows)
    known = _known(db, "audit", [one.id for one, _ in changes])
    late = [
        structs.replace(one, at=one.at + timedelta(seconds=stepped_by - then))
        for one, then in changes
        if one.id not in known
    ]
    db.execute_many(audit.INSERT, [audit.to_columns(one) for one in late])
    add_up(db, [one.used for one in new if one.used is not None])
    stored = [(row.tier, row.start, row.name, row.body.decode()) for row in buckets]
    db.execute_many(_PUT_BUCKET, stored)


def _known(db: Database, table: str, ids: Sequence[str]) -> set[str]:
    """Which of these ids a table has."""
    found: set[str] = set()
    for at in range(0, len(ids), IDS_AT_ONCE):
        some = ids[at : at + IDS_AT_ONCE]
        sql = f"SELECT id FROM {table} WHERE id IN ({', '.join('?' * len(some))})"  # noqa: S608
        found.update(row["id"] for row in db.query(sql, some))
    return found


def _at_last(noted: Unwritten, stepped_by: float) -> Unwritten:
    """What was noted, with its times by the clock that was set by `stepped_by`."""
    if noted.stepped_by == stepped_by:
        return noted
    by = timedelta(seconds=stepped_by - noted.stepped_by)
    request, used = noted.request.moved(by), noted.used
    if used is not None:
        used = structs.replace(used, day=day_of(milliseconds(request.finished_at)))
    return Unwritten(request, _moved(noted.why, by), used, stepped_by)


TIMED = {"requests": ("arrived_ms", "finished_ms"), "audit": ("at_ms",)}
"""The tables with times, numbered in the order in which they were written."""


def _last_rows(db: Database) -> dict[str, int]:
    """The number of the last row of each."""
    sql = "SELECT coalesce(max(seq), 0) AS last FROM "
    return {table: int(db.query(sql + table)[0]["last"]) for table in TIMED}


def _move(db: Database, *, move: Move, until: int) -> None:
    """Correct the times of the rows after `move.after`, up to `until`."""
    by, add = timedelta(seconds=move.seconds), round(move.seconds * 1000)
    if move.table == "requests":
        sql = "SELECT * FROM requests WHERE seq > ? AND seq <= ?"
        rows = db.query(sql, [move.after, until])
        reasons = [
            [_moved(bytes(row["why"]), by), row["seq"]]
            for row in rows
            if isinstance(row["why"], bytes)
        ]
        db.execute_many("UPDATE requests SET why = ? WHERE seq = ?", reasons)
        move_usage(db, rows, add)
    columns = TIMED[move.table]
    later = ", ".join(f"{column} = {column} + ?" for column in columns)
    sql = f"UPDATE {move.table} SET {later} WHERE seq > ? AND seq <= ?"  # noqa: S608
    db.execute(sql, [*[add] * len(columns), move.after, until])


def _moved(why: bytes, by: timedelta) -> bytes:
    """The column of the reasons with its times so much later; as it is where it is damaged."""
    with suppress(ValueError, msgspec.DecodeError, OverflowError):
        return moved_why(why_of({"why": why}), by)
    return why


def _page(db: Database, sql: str, values: list[Any]) -> tuple[list[Finished], Cursor | None]:
    """The rows, and the cursor of the next page if there are more than the limit asks for."""
    rows = db.query(sql, values)
    shown = rows[: values[-1] - 1]
    last = shown[-1] if len(rows) > len(shown) else None
    cursor = None if last is None else Cursor(last["finished_ms"], last["seq"])
    return [from_columns(row) for row in shown], cursor


def _find(db: Database, request_id: str) -> tuple[Finished, bytes] | None:
    rows = db.query("SELECT * FROM requests WHERE id = ?", [request_id])
    return (from_columns(rows[0]), why_of(rows[0])) if rows else None


def _written(db: Database, ids: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for at in range(0, len(ids), IDS_AT_ONCE):
        some = ids[at : at + IDS_AT_ONCE]
        sql = f"SELECT id FROM requests WHERE id IN ({', '.join('?' * len(some))})"  # noqa: S608
        found.update(row["id"] for row in db.query(sql, some))
    return found


def _choices(db: Database) -> dict[str, list[str]]:
    return {
        column: [row[column] for row in db.query(_distinct(column)) if row[column]]
        for column in ("model", "agent", "client")
    }


def _distinct(column: str) -> str:
    """The distinct values of an indexed column, by jumping through its index (500 at most)."""
    return f"""
        WITH RECURSIVE jump(value) AS (
            SELECT min({column}) FROM requests
            UNION ALL
            SELECT (SELECT min({column}) FROM requests WHERE {column} > value)
            FROM jump WHERE value IS NOT NULL
        )
        SELECT value AS {column} FROM jump WHERE value IS NOT NULL LIMIT 500
    """  # noqa: S608


def _bucket(row: dict[str, Any]) -> StoredBucket:
    return StoredBucket(row["tier"], row["start"], row["name"], str(row["body"]).encode())
