"""Placement by demand: what the advice proposes is done, by copies from machine to machine.

Where a model has to leave for it, that is the copy on that machine that fewest requests used. It is
never one without another copy that can be reached, none in memory, none that more requests used
than the new one would get, and none that somebody brought by hand within a week.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from secrets import token_hex

import msgspec
from msgspec import Struct

from ollama_coordinator.aio import Slices
from ollama_coordinator.db import Change, Store
from ollama_coordinator.dispatch import Dispatch
from ollama_coordinator.journal import AdvicePiece, Observation
from ollama_coordinator.journal.advice import DISK_RESERVE_BYTES, MOST_REQUESTS
from ollama_coordinator.registry import AgentState, AvailableRow, modified_at
from ollama_coordinator_common.error import InvalidModelName, OllamaCoordinatorError
from ollama_coordinator_common.names import model_key
from ollama_coordinator_common.types import AgentId

from .runner import Operations
from .supply import FLEET
from .targets import Placement, Rule
from .types import AgentCommand, OperationState

log = logging.getLogger(__name__)

REBALANCE_SECONDS = 900.0
"""How often the advice is followed; at most one model is moved each time."""

HOURS = 24.0
"""How far back demand is looked at."""

BY_HAND_DAYS = 7
"""A copy that is younger and that no advice brought stays where it is."""

KEEP_ALIVE = "24h"
"""How long a model stays in memory that the advice says to keep there."""

MOVED_BY = "rebalance"
"""Who changed something, in the audit, where nobody asked for it."""

ACTION = "REBALANCE"

DOCUMENT = "moves"
"""The name under which the database keeps what advice has brought."""


class Brought(Struct, frozen=True):
    """A copy that advice brought to an agent."""

    agent_id: AgentId
    key: str
    at: datetime


class Moves(Struct):
    """The copies that advice has brought, as they are kept over a restart."""

    brought: list[Brought] = []


class MoveView(Struct, frozen=True):
    """What was done about one piece of advice, and why.

    `operation_id` is the one that brings or loads the model, empty where nothing is done; `deleted`
    are the models that left the agent for it.
    """

    text: str
    model: str
    agent: str
    operation_id: str = ""
    deleted: list[str] = []


class Rebalance:
    """Follows advice. `is_on`: by itself; `budget_bytes`: for one machine's models, 0: no limit."""

    def __init__(
        self,
        dispatch: Dispatch,
        observation: Observation,
        operations: Operations,
        store: Store,
        *,
        is_on: bool,
        budget_bytes: int,
    ) -> None:
        self._registry = dispatch.registry
        self._clock = dispatch.clock
        self._observation = observation
        self._operations = operations
        self._store = store
        self._brought: dict[tuple[AgentId, str], datetime] = {}
        self._turn = asyncio.Lock()
        self.is_on = is_on
        self.budget_bytes = budget_bytes

    def export_state(self) -> Moves:
        """The copies that advice has brought and that are still there, or on their way."""
        there = {agent.id: agent.inventory.available for agent in self._registry}
        self._brought = {
            (agent_id, key): at
            for (agent_id, key), at in self._brought.items()
            if key in there.get(agent_id, {}) or self._operations.brings(key, agent_id)
        }
        return Moves([Brought(agent_id, key, at) for (agent_id, key), at in self._brought.items()])

    def import_state(self, state: Moves) -> None:
        """Take over what an earlier process brought."""
        self._brought = {(one.agent_id, one.key): one.at for one in state.brought}

    async def run(self) -> None:
        """Follow the best piece of advice every now and then, while it is on; until cancelled."""
        while True:
            await asyncio.sleep(REBALANCE_SECONDS)
            if not self.is_on or self._operations.handed_over:
                continue
            with suppress(OllamaCoordinatorError):
                await self.apply(HOURS, most=1, copies_alone=True)

    async def apply(
        self, hours: float, *, most: int | None = None, copies_alone: bool = False
    ) -> list[MoveView]:
        """Do what the advice of the last hours proposes; `copies_alone`: load nothing.

        Raises:
            DatabaseError: the history cannot be read.
        """
        async with self._turn:
            advice = await self._observation.advisor.advice(hours)
            pieces = [one for one in advice.advice if not copies_alone or one.action == "pull"]
            if not pieces:
                return []
            wanted = await self._demand(hours)
            return [await self._move(piece, wanted) for piece in pieces[:most]]

    async def _demand(self, hours: float) -> Counter[tuple[AgentId, str]]:
        """How many requests used each copy."""
        since = self._clock.utc(self._clock.now()).timestamp() - hours * 3600
        found: Counter[tuple[AgentId, str]] = Counter()
        slices = Slices()
        for row in await self._observation.history.waits(since, MOST_REQUESTS):
            await slices.pause()
            with suppress(InvalidModelName):
                if row[1] is not None:
                    found[AgentId(row[1]), model_key(row[0])] += 1
        return found

    # ── one move ──────────────────────────────────────────────────────────────────────────────

    async def _move(self, piece: AdvicePiece, wanted: Counter[tuple[AgentId, str]]) -> MoveView:
        agent = self._registry.find(piece.agent_id)
        key = model_key(piece.model)
        if agent is None:
            return self._nothing(piece, "the machine is gone")
        if piece.action == "load":
            command = AgentCommand.load(
                piece.model, keep_alive=KEEP_ALIVE, embeds=_embeds(agent, key)
            )
            return self._done(piece, self._start(command, agent), [])
        if key in agent.inventory.available or self._operations.brings(key, agent.id):
            return self._nothing(piece, "it has the model by now, or gets it")
        victims = self.victims(agent, piece, wanted)
        if victims is None:
            return self._nothing(piece, "no room there, and no copy that may leave")
        for row in victims:
            operation = self._operations.get(
                self._start(AgentCommand.delete(row.model.name), agent)
            )
            await operation.feed.over()
            if operation.state is not OperationState.DONE:
                return self._nothing(piece, f"{row.model.name} could not be deleted there")
            self._audit(
                f"deleted {row.model.name} on {agent.name} for {piece.model}", row.key, piece
            )
        started = self._start(AgentCommand.pull(piece.model, origin=FLEET), agent)
        self._brought[agent.id, key] = datetime.now(UTC)
        # At once, as what is deferred of it: a leader that is lost leaves both or neither.
        self._store.note_document(DOCUMENT, lambda: msgspec.json.encode(self.export_state()))
        return self._done(piece, started, [row.model.name for row in victims])

    def victims(
        self, agent: AgentState, piece: AdvicePiece, wanted: Counter[tuple[AgentId, str]]
    ) -> Sequence[AvailableRow] | None:
        """The copies that leave an agent for a model, the least wanted first; `None`: no room."""
        lacking = self._lacking(agent, piece.bytes)
        if lacking <= 0:
            return []
        able = [
            row
            for row in agent.inventory.available.values()
            if wanted[agent.id, row.key] < piece.requests and self._may_leave(agent, row)
        ]
        able.sort(key=lambda row: (wanted[agent.id, row.key], -row.model.size, row.key))
        chosen: list[AvailableRow] = []
        for row in able:
            if lacking <= 0:
                break
            chosen.append(row)
            lacking -= row.model.size
        return chosen if lacking <= 0 else None

    def _lacking(self, agent: AgentState, size: int) -> int:
        """The bytes that have to leave an agent before a model of a size has room."""
        free = agent.report.disk_free_bytes if agent.report is not None else None
        lacking = 0 if free is None else size + DISK_RESERVE_BYTES - free
        if self.budget_bytes:
            used = sum(_sizes(agent.inventory.available.values()))
            lacking = max(lacking, used + size - self.budget_bytes)
        return lacking

    def _may_leave(self, agent: AgentState, row: AvailableRow) -> bool:
        if agent.inventory.is_loaded(row.key) or row.model.remote_host:
            return False
        shared = [name for name in agent.inventory.namesakes(row.key) if name != row.key]
        if shared:
            return False  # its files stay for another name of them
        now = self._clock.now()
        others = [
            one
            for one in self._registry.holders(row.key)
            if one is not agent and self._registry.is_reachable(one, now)
        ]
        if not any(one.inventory.available[row.key].identity == row.identity for one in others):
            return False
        if (agent.id, row.key) in self._brought:
            return True
        return datetime.now(UTC) - modified_at(row) >= timedelta(days=BY_HAND_DAYS)

    def _start(self, command: AgentCommand, agent: AgentState) -> str:
        placement = Placement(Rule.AGENTS, names=(agent.id,))
        return self._operations.start(command, [agent], placement=placement, detached=True).id

    # ── what is said of it ────────────────────────────────────────────────────────────────────

    def _nothing(self, piece: AdvicePiece, reason: str) -> MoveView:
        facts = {"model": piece.model, "agent": piece.agent, "reason": reason}
        log.info("advice is not followed", extra=facts)
        return MoveView(f"{piece.model} on {piece.agent}: {reason}", piece.model, piece.agent)

    def _done(self, piece: AdvicePiece, operation_id: str, deleted: list[str]) -> MoveView:
        left = f"; {', '.join(deleted)} left for it" if deleted else ""
        verb = "copied" if piece.action == "pull" else "loaded"
        text = f"{verb}: {piece.text}{left}"
        self._audit(text, model_key(piece.model), piece)
        return MoveView(text, piece.model, piece.agent, operation_id, deleted)

    def _audit(self, text: str, subject: str, piece: AdvicePiece) -> None:
        log.info("advice is followed", extra={"what": text})
        change = Change(
            id=token_hex(8),
            at=datetime.now(UTC),
            by=MOVED_BY,
            key="",
            address="",
            action=ACTION,
            subject=subject,
            details={"agent": piece.agent, "why": text, "saved_seconds": piece.saved_seconds},
            http_status=200,
        )
        self._observation.note_change(change)


def _embeds(agent: AgentState, key: str) -> bool:
    row = agent.inventory.available.get(key)
    return row is not None and row.embeds


def _sizes(rows: Iterable[AvailableRow]) -> list[int]:
    """The bytes of models; names of the same files count once."""
    return list({row.identity or row.key: row.model.size for row in rows}.values())
