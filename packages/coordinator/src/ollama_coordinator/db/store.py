"""The database: one thread of its own does every read and write.

Registrations are written before they are answered. What changes all the time (last seen, models,
learned rates) is written behind: the newest value of each, in one transaction, at most
`FLUSH_SECONDS` late. When the database fails while running, the fleet continues from memory, what
is unwritten waits for the next try, and `problem` tells the operator.
"""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import TypeVar

import msgspec

from ollama_coordinator_common.types import AgentId

from .agents import PUT_AGENT, SELECT_AGENTS, AgentRow, from_columns, to_columns
from .database import DAMAGED, IN_USE, Database, DatabaseError, InUse, SharedDatabase

log = logging.getLogger(__name__)

T = TypeVar("T")

UNSURE = "it counts here, and is written as soon as that works again; ask once more to be sure"
"""What follows the reason why a change is not written."""

FLUSH_SECONDS = 1.0
"""How often it is written behind: so much may be lost in a crash."""


class Store:
    """The database of one coordinator; open between `async with` only.

    `lost` is set when another coordinator has it now; nothing is written then.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="database")
        self._agents: dict[AgentId, AgentRow | None] = {}
        self._seen: dict[AgentId, datetime] = {}
        self._documents: dict[str, bytes | Callable[[], bytes]] = {}
        self._flusher: asyncio.Task[None] | None = None
        self._flushing = asyncio.Lock()
        self.problem: str | None = None
        self.lost = asyncio.Event()
        self._is_yielded = False

    @property
    def name(self) -> str:
        """What operators call the database; never with a password."""
        return self._database.name

    async def __aenter__(self) -> "Store":
        """Open the database and bring its schema up to date.

        Raises:
            DatabaseError: it is locked, read-only, full, unreachable, or not a database, or another
                coordinator uses it.
        """
        try:
            await self._run(self._database.open)
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
        await self._run(self._database.close)
        self._thread.shutdown()

    async def yield_lead(self) -> None:
        """Let another coordinator lead at once: what is noted by now is written, and nothing later.

        The history of requests that still run is written.
        """
        await self.flush()
        self._is_yielded = True
        database = self._database
        if isinstance(database, SharedDatabase):
            await self._run(database.yield_lead)

    # ── agents ────────────────────────────────────────────────────────────────────────────────

    async def agents(self) -> list[AgentRow]:
        """Every agent in the database.

        Raises:
            DatabaseError: the database cannot be read.
        """
        return await self.run(_read_agents)

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

    def look(self, name: str) -> bytes | None:
        """A document of a database that is not open yet; `None` if there is none to be read.

        Opening the database says what is wrong with it.
        """
        return self._database.look(name)

    async def document(self, name: str) -> bytes | None:
        """A document, or `None` if it was never written.

        Raises:
            DatabaseError: the database cannot be read.
        """
        return await self.run(lambda db: _read_document(db, name))

    async def read(self, name: str, kind: type[T]) -> T | None:
        """What a document has, for what must not be begun anew where it is damaged.

        Raises:
            DatabaseError: it cannot be read.
        """

        def decoded(db: Database) -> T | None:
            body = _read_document(db, name)
            return None if body is None else msgspec.json.decode(body, type=kind)

        return await self.run(decoded)

    def note_document(self, name: str, body: bytes | Callable[[], bytes]) -> None:
        """Write a document behind; a function is called when it is written."""
        self._documents[name] = body

    async def run(self, work: Callable[[Database], T]) -> T:
        """Run `work` with the database in its thread, in a transaction of its own.

        Raises:
            DatabaseError: it failed; nothing of it was written.
        """

        def transaction() -> T:
            with self._database.atomic():
                return work(self._database)

        return await self._run(transaction)

    # ── writing behind ────────────────────────────────────────────────────────────────────────

    async def flush(self) -> DatabaseError | None:
        """Write everything that was noted; what cannot be written stays noted, and why is returned.

        One flush at a time: a caller must not return while another flush writes what it noted.
        """
        async with self._flushing:
            return await self._flush()

    async def commit(self) -> None:
        """As `flush`, for what must not be answered as done before it is written.

        Raises:
            DatabaseError: it is not written.
        """
        error = await self.flush()
        if error is not None:
            raise error

    async def _flush(self) -> DatabaseError | None:
        documents = {
            name: body if isinstance(body, bytes) else body()
            for name, body in self._documents.items()
        }
        agents, seen = self._agents, self._seen
        self._agents, self._seen, self._documents = {}, {}, {}
        try:
            is_ours = await self._run(lambda: self._write(agents, seen, documents))
        except (DatabaseError, asyncio.CancelledError) as exc:
            # A cancelled write may not have begun; what is written twice is the same twice.
            self._agents = agents | self._agents
            self._seen = seen | self._seen
            self._documents = {**documents, **self._documents}
            if not isinstance(exc, DatabaseError):
                raise
            self._report(str(exc))
            return exc.with_advice(UNSURE)
        self._report(None)
        if is_ours:
            return None
        return DatabaseError(self.name, "another coordinator leads by now; ask again", in_use=True)

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
        except InUse as exc:
            self.lost.set()
            raise DatabaseError(self._database.name, IN_USE, in_use=True) from exc
        except (ValueError, msgspec.DecodeError) as exc:
            raise DatabaseError(self._database.name, f"{exc} ({DAMAGED})") from exc
        except self._database.errors as exc:
            raise DatabaseError(self._database.name, self._database.advice(exc)) from exc

    # ── in the thread ─────────────────────────────────────────────────────────────────────────

    def _write(
        self,
        agents: dict[AgentId, AgentRow | None],
        seen: dict[AgentId, datetime],
        documents: dict[str, bytes],
    ) -> bool:
        """Whether the database is still this coordinator's to write."""
        db = self._database
        db.check()
        if self._is_yielded or self.lost.is_set():
            return False
        if not agents and not seen and not documents:
            return True
        with db.atomic():
            db.execute_many(PUT_AGENT, [to_columns(row) for row in agents.values() if row])
            removed = [[agent_id] for agent_id, row in agents.items() if row is None]
            db.execute_many("DELETE FROM agents WHERE id = ?", removed)
            heard = [[at.isoformat(), agent_id] for agent_id, at in seen.items()]
            db.execute_many("UPDATE agents SET last_seen = ? WHERE id = ?", heard)
            named = [[name, body.decode()] for name, body in documents.items()]
            db.execute_many(_PUT_DOCUMENT, named)
        return True


def _read_agents(db: Database) -> list[AgentRow]:
    return [from_columns(row) for row in db.query(SELECT_AGENTS)]


def _read_document(db: Database, name: str) -> bytes | None:
    rows = db.query("SELECT body FROM documents WHERE name = ?", [name])
    return str(rows[0]["body"]).encode() if rows else None


_PUT_DOCUMENT = """
    INSERT INTO documents (name, body) VALUES (?, ?)
    ON CONFLICT (name) DO UPDATE SET body = excluded.body
"""
