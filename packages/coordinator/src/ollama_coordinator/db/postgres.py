"""PostgreSQL as the database: one session of a server, which one coordinator has at a time.

Needs psycopg, the extra `[postgres]`. The session has an advisory lock, so that a second
coordinator on the same schema is refused; the server ends a session that was silent for
`SILENT_SECONDS`, so that no lock outlives a coordinator that was cut off. A session that the server
ended is opened anew.
"""

import logging
import socket
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, TypeAlias

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import dict_row

from ollama_coordinator_common.error import ConfigError

from .database import InUse
from .schema import STEPS, Column, Table, Type, newer, opened

log = logging.getLogger(__name__)

OLDEST_VERSION = 14
"""Older servers lack `idle_session_timeout`."""

CONNECT_SECONDS = 5
"""For the server to accept a session; a busy one needs tens of milliseconds."""

ANSWER_SECONDS = 20.0
"""For one transaction; a frozen server answers never."""

SILENT_SECONDS = 3
"""After so much silence the server ends the session; it hears of the coordinator every second.

So does this side if for so long nothing that was sent arrives there, where the system can tell.
"""

PREPARING_SECONDS = 15
"""The same within a transaction, in which many rows may be prepared between two statements."""

ENDING_MS = 500
"""For the server to end another session; one that waits for its coordinator takes a millisecond."""

LOOPBACK = "127.0.0.1"

LOCK_KEY = 0x6F6C6C61
"""The first half of the advisory lock's key ("olla"); the second is made of the schema's name."""

EXPECTED = (
    "give postgresql://USER:PASSWORD@HOST:PORT/DATABASE, and write / @ and % in the password"
    " as %2F, %40 and %25"
)

_TYPES: dict[Type, str] = {
    str: 'TEXT COLLATE "C"',
    int: "BIGINT",
    float: "DOUBLE PRECISION",
    bytes: "BYTEA",
}

Session: TypeAlias = "psycopg.Connection[dict[str, Any]]"


class PostgresDatabase:
    """The database that a `postgresql://` URL names."""

    errors: tuple[type[Exception], ...] = (psycopg.Error, OSError)
    of_machines = True

    def __init__(self, url: str, shown: str) -> None:
        """Take the address; nothing is connected yet. `shown` is the URL without its password.

        Raises:
            ConfigError: the URL cannot work.
        """
        try:
            given = {key: str(value) for key, value in conninfo_to_dict(url).items()}
        except psycopg.Error as exc:
            # Its text may contain a part of the password.
            raise ConfigError("DATABASE_URL", shown, EXPECTED) from exc
        if "@" in given.get("host", "") + given.get("dbname", ""):
            raise ConfigError("DATABASE_URL", shown, EXPECTED)
        usual = {
            "connect_timeout": str(CONNECT_SECONDS),
            "tcp_user_timeout": str(SILENT_SECONDS * 1000),
            "application_name": "ollama-coordinator",
        }
        self._conninfo = make_conninfo("", **(usual | given))
        self._name = shown
        self._session: Session | None = None
        self._way_back = self.open

    @property
    def name(self) -> str:
        """The URL without its password."""
        return self._name

    # ── opening and closing ───────────────────────────────────────────────────────────────────

    def look(self, document: str) -> bytes | None:
        """A document before the database is open."""
        try:
            with closing(psycopg.connect(self._conninfo)) as session:
                sql = "SELECT body FROM documents WHERE name = %s"
                row = session.execute(sql, [document]).fetchone()
        except psycopg.Error:
            return None
        return str(row[0]).encode() if row else None

    def open(self) -> None:
        """Connect, be the only coordinator, bring the schema up to date, and try to write."""
        session: Session = psycopg.connect(self._conninfo, autocommit=True, row_factory=dict_row)
        try:
            self._take(session)
        except (psycopg.Error, ValueError, InUse):
            session.close()
            raise
        self._session = session

    def _take(self, session: Session) -> None:
        version = session.info.server_version // 10_000
        if version < OLDEST_VERSION:
            text = f"PostgreSQL {version} is too old; it needs {OLDEST_VERSION} or newer"
            raise psycopg.NotSupportedError(text)
        session.execute(f"SET idle_session_timeout = '{SILENT_SECONDS}s'")
        session.execute(f"SET idle_in_transaction_session_timeout = '{PREPARING_SECONDS}s'")
        [facts] = session.execute(
            "SELECT current_setting('server_encoding') AS encoding, current_schema() AS schema,"
            " pg_try_advisory_lock(%s, hashtext(current_schema())) AS locked",
            [LOCK_KEY],
        )
        if facts["encoding"] != "UTF8":
            text = f"its encoding is {facts['encoding']}; create it with the encoding UTF8"
            raise psycopg.NotSupportedError(text)
        if facts["schema"] is None:
            raise psycopg.NotSupportedError("its search_path has no schema; create it")
        if not facts["locked"]:
            raise InUse
        with session.transaction():
            _migrate(session)
            # A schema that is up to date needed no write: find out now whether one works.
            session.execute(
                "INSERT INTO documents VALUES ('opened', %s)"
                " ON CONFLICT (name) DO UPDATE SET body = excluded.body",
                [opened()],
            )

    def open_to_read(self) -> None:
        """Connect, and see what is in it now, in one transaction that changes nothing."""
        session: Session = psycopg.connect(self._conninfo, row_factory=dict_row)
        try:
            session.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            session.read_only = True
            _check_age(session, _applied(session), serves=False)
        except (psycopg.Error, ValueError):
            session.close()
            raise
        self._session = session

    def open_beside(self) -> None:
        """Connect as a coordinator that does not lead."""
        self._session = psycopg.connect(self._conninfo, autocommit=True, row_factory=dict_row)
        self._way_back = self.open_beside

    def address_here(self) -> str:
        """This machine's address towards the server; loopback's if that is on this machine."""
        with closing(_socket_of(self._db)) as connection:
            name = connection.getsockname()
        return str(name[0]) if isinstance(name, tuple) else LOOPBACK

    def now_ms(self) -> int:
        """The server's clock."""
        [row] = self.query("SELECT EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS now")
        return int(row["now"])

    def is_led(self) -> bool:
        """Whether a session has the advisory lock."""
        return bool(self.query(_LED, [LOCK_KEY]))

    def end_silent_leader(self, seconds: float) -> bool:
        """End the leader's session if it has waited so long for its coordinator; whether it did.

        The server's own time-outs are longer, and do not count between the parts of one message.
        """
        return any(row["ended"] for row in self.query(_END_SILENT, [ENDING_MS, LOCK_KEY, seconds]))

    def yield_lead(self) -> None:
        """Release the advisory lock; the session stays."""
        self.execute("SELECT pg_advisory_unlock(?, hashtext(current_schema()))", [LOCK_KEY])

    def close(self) -> None:
        """Give the lock back, and end the session: the server notices that only some time later."""
        if self._session is None:
            return
        if not self._session.closed:
            with suppress(*self.errors), self.atomic():
                self.execute("SELECT pg_advisory_unlock_all()")
        self._session.close()

    def check(self) -> None:
        """Ask the server for a sign of life; a session that it ended is opened anew."""
        with suppress(psycopg.OperationalError), self.atomic():
            self.execute("SELECT 1")
            return
        self._reopen()

    def _reopen(self) -> None:
        if self._session is not None:
            self._session.close()
        self._way_back()
        log.warning("the database ended the session; opened anew", extra={"database": self.name})

    @property
    def _db(self) -> Session:
        if self._session is None:
            raise RuntimeError("the database is not open")
        return self._session

    # ── working ───────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def atomic(self, *, is_long: bool = False) -> Iterator[None]:
        """A transaction; one that takes too long ends with its connection."""
        if self._db.closed:
            self._reopen()
        if is_long:
            with self._db.transaction():
                yield
            return
        cut = threading.Timer(ANSWER_SECONDS, _cut, [self._db])
        cut.daemon = True
        cut.start()
        try:
            with self._db.transaction():
                yield
        finally:
            cut.cancel()

    def query(self, sql: str, values: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """The rows of a statement."""
        rows: list[dict[str, Any]] = self._db.execute(_translated(sql), _taken(values)).fetchall()
        return rows

    def execute(self, sql: str, values: Sequence[Any] = ()) -> None:
        """A statement without rows."""
        self._db.execute(_translated(sql), _taken(values))

    def execute_many(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        """A statement for each row of values."""
        with self._db.cursor() as cursor:
            cursor.executemany(_translated(sql), [_taken(row) for row in rows])

    def advice(self, error: Exception) -> str:
        """The server's text in one line, with what an operator can do about it."""
        text = " ".join(str(error).split())
        state = getattr(error, "sqlstate", None)
        hint = _HINTS.get(state or "")
        if state is None and isinstance(error, psycopg.OperationalError):
            hint = _UNREACHABLE
        return f"{text} ({hint})" if hint else text


_LED = """
    SELECT 1 AS led FROM pg_locks
    WHERE locktype = 'advisory' AND granted AND objsubid = 2 AND classid = ?
    AND objid = (hashtext(current_schema())::bigint & 4294967295)::oid
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
_END_SILENT = """
    SELECT pg_terminate_backend(a.pid, ?) AS ended
    FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
    WHERE l.locktype = 'advisory' AND l.granted AND l.classid = ?
    AND l.objid = (hashtext(current_schema())::bigint & 4294967295)::oid
    AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND a.wait_event = 'ClientRead' AND a.state_change < now() - make_interval(secs => ?)
"""
"""A lock with two keys: the server shows the second one unsigned (pg_locks, objsubid 2)."""

_UNREACHABLE = (
    "check that PostgreSQL runs there, and the user, password and database in DATABASE_URL"
)
_HINTS = {
    "42501": "make the user the owner of the database, or grant it CREATE on the schema",
    "25006": "it is read-only; give the primary server",
    "53100": "its disk is full; free some space",
    "42P07": "another program has a table of that name; give a database of its own",
}


@lru_cache
def _translated(sql: str) -> str:
    """With psycopg's placeholders; no statement of ours has a question mark in a text."""
    return sql.replace("?", "%s")


def _taken(values: Sequence[Any]) -> list[Any]:
    """Values as PostgreSQL takes them: no text of it may contain the character 0."""
    return [
        value.replace("\0", "\N{REPLACEMENT CHARACTER}") if isinstance(value, str) else value
        for value in values
    ]


def _cut(session: Session) -> None:
    """End a connection that another thread waits for: that one gets an error at once."""
    with suppress(psycopg.Error, OSError, ValueError), closing(_socket_of(session)) as connection:
        connection.shutdown(socket.SHUT_RDWR)


def _socket_of(session: Session) -> socket.socket:
    """The socket of a session, once more; its family is asked of nobody and may be another."""
    return socket.fromfd(session.fileno(), socket.AF_INET, socket.SOCK_STREAM)


def _migrate(session: Session) -> None:
    session.execute(
        "CREATE TABLE IF NOT EXISTS migrations (name TEXT PRIMARY KEY, applied_at TEXT NOT NULL)"
    )
    applied = _applied(session)
    _check_age(session, applied, serves=True)
    for name, what in STEPS.items():
        if name not in applied:
            for statement in _made(what):
                session.execute(statement)
            at = datetime.now(UTC).isoformat()
            session.execute("INSERT INTO migrations VALUES (%s, %s)", [name, at])


def _applied(session: Session) -> list[str]:
    rows = session.execute("SELECT name FROM migrations ORDER BY applied_at").fetchall()
    return [row["name"] for row in rows]


def _check_age(session: Session, applied: list[str], *, serves: bool) -> None:
    rows: list[dict[str, Any]] = []
    if "create_documents" in applied:
        rows = session.execute("SELECT body FROM documents WHERE name = 'opened'").fetchall()
    why_not = newer(applied, rows[0]["body"] if rows else None, serves=serves)
    if why_not:
        text = "a newer version wrote it; update the coordinator, or give another DATABASE_URL"
        raise psycopg.NotSupportedError(f"{why_not} ({text})")


def _made(table: Table | Column) -> Iterator[str]:
    """The statements that make a table, or add a column."""
    if isinstance(table, Column):
        yield f'ALTER TABLE {table.table} ADD COLUMN "{table.name}" {_TYPES[table.kind]}'
        return
    columns = [
        f'"{name}" {_TYPES[kind]}{" NOT NULL" * (name in table.required)}'
        f"{' GENERATED BY DEFAULT AS IDENTITY' * (table.numbered and name in table.key)}"
        for name, kind in table.columns.items()
    ]
    yield f"CREATE TABLE {table.name} ({', '.join(columns)}, PRIMARY KEY ({_listed(table.key)}))"
    for index in table.indexes:
        yield f"CREATE INDEX ON {table.name} ({_listed(index)})"


def _listed(columns: Iterable[str]) -> str:
    return ", ".join(f'"{column}"' for column in columns)
