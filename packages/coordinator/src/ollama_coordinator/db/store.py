"""The database: one thread of its own does every read and write.

Registrations are written before they are answered. What changes all the time (last seen, models,
learned rates) is written behind: the newest value of each, in one transaction, at most
`FLUSH_SECONDS` late. When the database fails while running, the fleet continues from memory, what
is unwritten waits for the next try, and `problem` tells the operator. A file that was deleted or
replaced meanwhile is written anew from the open one.
"""

import asyncio
import logging
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import msgspec
from sqlite_utils import Database

from ollama_coordinator_common.error import OllamaCoordinatorError
from ollama_coordinator_common.types import AgentId

from .agents import PUT_AGENT, AgentRow, from_columns, to_columns
from .file import FileClaim
from .migrations import migrations, steps_of_the_future

log = logging.getLogger(__name__)

T = TypeVar("T")

FLUSH_SECONDS = 1.0
"""How often it is written behind: so much may be lost in a crash."""

LOCK_SECONDS = 2.0
"""How long to wait for another process's lock, such as a backup's."""


class DatabaseError(OllamaCoordinatorError):
    """The database cannot be opened, read or written; the text has the file and the reason."""

    def __init__(self, path: Path | None, cause: Exception) -> None:
        super().__init__(f"database {path or 'in memory'}: {_advice(cause)}")
        self.path = path


class Store:
    """The database of one coordinator; open between `async with` only."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._claim = FileClaim(path)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="database")
        self._database: Database | None = None
        self._agents: dict[AgentId, AgentRow | None] = {}
        self._seen: dict[AgentId, datetime] = {}
        self._documents: dict[str, bytes | Callable[[], bytes]] = {}
        self._flusher: asyncio.Task[None] | None = None
        self._flushing = asyncio.Lock()
        self.problem: str | None = None

    async def __aenter__(self) -> "Store":
        """Open the database and bring its schema up to date.

        Raises:
            DatabaseError: it is locked, read-only, full, or not a database, or another coordinator
                uses it.
        """
        try:
            await self._run(self._open)
        except DatabaseError:
            self._thread.shutdown()
            raise
        self._flusher = asyncio.create_task(self._flush_for_ever())
        return self

    async def __aexit__(self, *raised: object) -> None:
        if self._flusher is not None:
            self._flusher.cancel()
            await asyncio.gather(self._flusher, return_exceptions=True)
        await self.flush()
        await self._run(self._close)
        self._thread.shutdown()

    # ── agents ────────────────────────────────────────────────────────────────────────────────

    async def agents(self) -> list[AgentRow]:
        """Every agent in the database.

        Raises:
            DatabaseError: the database cannot be read.
        """
        return await self._run(self._read_agents)

    async def save_agent(self, row: AgentRow) -> None:
        """Write an agent before returning; if the database fails, behind."""
        self.note_agent(row)
        await self.flush()

    def note_agent(self, row: AgentRow) -> None:
        """Write an agent behind."""
        self._agents[row.id] = row
        self._seen.pop(row.id, None)

    def note_seen(self, agent_id: AgentId, at: datetime) -> None:
        """Write behind when an agent was last heard."""
        self._seen[agent_id] = at

    async def remove_agent(self, agent_id: AgentId) -> None:
        """Delete an agent before returning; if the database fails, behind."""
        self._agents[agent_id] = None
        await self.flush()

    # ── documents ─────────────────────────────────────────────────────────────────────────────

    async def document(self, name: str) -> bytes | None:
        """A document, or `None` if it was never written.

        Raises:
            DatabaseError: the database cannot be read.
        """
        return await self._run(lambda: self._read_document(name))

    def note_document(self, name: str, body: bytes | Callable[[], bytes]) -> None:
        """Write a document behind; a function is called when it is written."""
        self._documents[name] = body

    async def run(self, work: Callable[[Database], T]) -> T:
        """Run `work` with the database in its thread, in a transaction of its own.

        Raises:
            DatabaseError: it failed; nothing of it was written.
        """

        def transaction() -> T:
            # Without it, sqlite3 leaves a transaction open when a statement fails, and every later
            # write becomes part of it and is never committed.
            with self._db.atomic():
                return work(self._db)

        return await self._run(transaction)

    # ── writing behind ────────────────────────────────────────────────────────────────────────

    async def flush(self) -> None:
        """Write everything that was noted; what cannot be written stays noted.

        One flush at a time: a caller must not return while another flush writes what it noted.
        """
        async with self._flushing:
            await self._flush()

    async def _flush(self) -> None:
        documents = {
            name: body if isinstance(body, bytes) else body()
            for name, body in self._documents.items()
        }
        agents, seen = self._agents, self._seen
        self._agents, self._seen, self._documents = {}, {}, {}
        try:
            await self._run(lambda: self._write(agents, seen, documents))
        except (DatabaseError, asyncio.CancelledError) as exc:
            # A cancelled write may not have begun; what is written twice is the same twice.
            self._agents = agents | self._agents
            self._seen = seen | self._seen
            self._documents = {**documents, **self._documents}
            if not isinstance(exc, DatabaseError):
                raise
            self._report(str(exc))
        else:
            self._report(None)

    def _report(self, problem: str | None) -> None:
        """Log once when writing stops or goes on."""
        if problem is not None and self.problem is None:
            log.error("database not writable; going on from memory", extra={"problem": problem})
        elif problem is None and self.problem is not None:
            log.info("database writable again")
        self.problem = problem

    async def _flush_for_ever(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            try:
                await self.flush()
            except Exception:
                log.exception("writing behind failed and goes on")

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except (sqlite3.Error, OSError, ValueError, msgspec.DecodeError) as exc:
            raise DatabaseError(self._path, exc) from exc

    # ── in the thread ─────────────────────────────────────────────────────────────────────────

    def _open(self) -> None:
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
            self._database = Database(connection)
            newer = steps_of_the_future(self._database)
            if newer:
                raise sqlite3.DatabaseError(f"it has {newer[-1]}, unknown here")
            migrations.apply(self._database)
            # A schema that is up to date needed no write: find out now whether one works.
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("INSERT OR REPLACE INTO documents VALUES ('opened', '{}')")
            connection.execute("COMMIT")
        except (sqlite3.Error, ValueError):
            connection.close()
            raise
        self._claim.note()

    def _close(self) -> None:
        self._db.close()
        self._claim.release()

    def _stay_on_file(self) -> None:
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
            self._database = deleted
            raise
        deleted.close()
        extra = {"database": str(self._path), "put_aside": aside}
        log.error("the database's file was deleted or replaced; written anew", extra=extra)

    @property
    def _db(self) -> Database:
        if self._database is None:
            raise RuntimeError("the database is not open")
        return self._database

    def _read_agents(self) -> list[AgentRow]:
        return [from_columns(row) for row in self._db.table("agents").rows_where(order_by="rowid")]

    def _read_document(self, name: str) -> bytes | None:
        rows = list(self._db.table("documents").rows_where("name = ?", [name]))
        return str(rows[0]["body"]).encode() if rows else None

    def _write(
        self,
        agents: dict[AgentId, AgentRow | None],
        seen: dict[AgentId, datetime],
        documents: dict[str, bytes],
    ) -> None:
        self._stay_on_file()
        if not agents and not seen and not documents:
            return
        with self._db.atomic():
            rows = [to_columns(row) for row in agents.values() if row is not None]
            self._db.conn.executemany(PUT_AGENT, rows)
            for removed in (agent_id for agent_id, row in agents.items() if row is None):
                self._db.table("agents").delete_where("id = ?", [removed])
            for agent_id, at in seen.items():
                self._db.execute(
                    "UPDATE agents SET last_seen = ? WHERE id = ?", [at.isoformat(), agent_id]
                )
            named = [(name, body.decode()) for name, body in documents.items()]
            self._db.conn.executemany(_PUT_DOCUMENT, named)


_PUT_DOCUMENT = "INSERT OR REPLACE INTO documents (name, body) VALUES (?, ?)"


def _advice(cause: Exception) -> str:
    """What an operator can do about an error of SQLite's."""
    text = str(cause)
    if isinstance(cause, ValueError | msgspec.DecodeError):
        return f"{text} (a row is damaged; restore a copy, or move the file away)"
    hints = {
        "locked": "another process holds it; stop that one, or give another DATABASE_URL",
        "readonly": "it is read-only; make the file and its folder writable",
        "read-only": "it is read-only; make the file and its folder writable",
        "full": "the disk is full; free some space",
        "not a database": "the file is not an SQLite database; move it away or restore a copy",
        "malformed": "the file is damaged; move it away or restore a copy",
        "unknown here": "a newer version wrote it; update the coordinator, or give another"
        " DATABASE_URL",
        "unable to open": "the file cannot be opened; check that its folder exists and is writable",
    }
    hint = next((hint for key, hint in hints.items() if key in text), None)
    return f"{text} ({hint})" if hint else text
