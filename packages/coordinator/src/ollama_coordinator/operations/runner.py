"""The operations under way: started, joined, taken up again, and ended."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from secrets import token_hex

from ollama_coordinator.aio import OwnedTasks
from ollama_coordinator.clock import Clock
from ollama_coordinator.dispatch import Dispatch
from ollama_coordinator.monitor import Monitor
from ollama_coordinator.registry import AgentState, Registry
from ollama_coordinator_common.protocol import AgentOperation
from ollama_coordinator_common.types import AgentId

from .deferred import Caretaker, Deferred
from .operation import Operation
from .remote import Remote
from .targets import Placement
from .types import (
    AgentCommand,
    DeferredCommand,
    OperationKind,
    OperationState,
    OperationView,
    Refused,
    UnknownOperation,
)
from .uploads import Uploads
from .worker import Patience, Worker

log = logging.getLogger(__name__)

REMEMBERED = 100
"""Ended operations that `GET /api/operations` still shows."""


class Operations:
    """Runs operations; open between `async with` only."""

    def __init__(
        self,
        registry: Registry,
        dispatch: Dispatch,
        monitor: Monitor,
        remote: Remote,
        uploads: Uploads,
        deferred: Deferred,
        clock: Clock,
        patience: Patience,
    ) -> None:
        self._registry = registry
        self._clock = clock
        self._uploads = uploads
        self._deferred = deferred
        self._worker = Worker(registry, dispatch, monitor, remote, deferred, clock, patience)
        self._tasks = OwnedTasks()
        self._caretaker = Caretaker(
            registry,
            monitor,
            deferred,
            clock,
            self._tasks,
            running=lambda: list(self._running.values()),
            resume=self._resume,
        )
        self._running: dict[str, Operation] = {}
        self._tasks_of: dict[str, asyncio.Task[None]] = {}
        self._ended: deque[Operation] = deque(maxlen=REMEMBERED)

    async def __aenter__(self) -> "Operations":
        await self._deferred.restore()
        for pending in self._deferred.all():
            agent = self._registry.find(pending.agent_id)
            if agent is not None and pending.command.kind is OperationKind.DELETE:
                self._registry.note_missing(agent, pending.command.key)
        await self._tasks.__aenter__()
        self._tasks.start(self._caretaker.run())
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self._tasks.__aexit__(*raised)

    # ── what there is ─────────────────────────────────────────────────────────────────────────

    def views(self, agent_id: str | None = None) -> list[OperationView]:
        """Every operation that is known, newest first; of one agent if asked."""
        known = [*self._running.values(), *self._ended]
        known.sort(key=lambda operation: operation.started_at, reverse=True)
        return [o.view() for o in known if agent_id is None or AgentId(agent_id) in o.targets]

    def of_agent(self, agent_id: AgentId) -> list[AgentOperation]:
        """An agent's part in every operation that is known, and what it owes."""
        done = [
            operation.view_for(operation.targets[agent_id])
            for operation in (*self._running.values(), *reversed(self._ended))
            if agent_id in operation.targets
        ]
        owed = [
            AgentOperation(
                "", pending.command.kind.value, pending.command.name, OperationState.PENDING.value
            )
            for pending in self._deferred.of(agent_id)
        ]
        return [*done, *owed]

    def get(self, operation_id: str) -> Operation:
        """One operation.

        Raises:
            UnknownOperation: there is none, or it ended long ago.
        """
        for operation in (*self._running.values(), *self._ended):
            if operation.id == operation_id:
                return operation
        raise UnknownOperation(operation_id)

    def pending(self) -> list[DeferredCommand]:
        """What agents that are away owe."""
        return self._deferred.all()

    # ── starting and following ────────────────────────────────────────────────────────────────

    def start(
        self,
        command: AgentCommand,
        agents: Sequence[AgentState],
        *,
        placement: Placement | None = None,
        spare: Iterable[AgentState] = (),
        detached: bool = False,
    ) -> Operation:
        """Begin a deed on these agents, or join the same one that is under way already."""
        operation = self._same(command)
        if operation is None:
            operation = Operation(
                token_hex(8),
                command,
                placement if placement is not None else Placement(),
                self._clock.utc(self._clock.now()),
                detached=detached,
            )
            self._running[operation.id] = operation
            self._take_in(operation, agents)
            operation.spare = list(spare)
            self._tasks_of[operation.id] = self._tasks.start(self._run(operation))
            log.info("operation started", extra=_facts(operation))
        else:
            self._take_in(operation, agents)
        if detached and not operation.detached:
            operation.detached = True
        if operation.detached:
            self._worker.owe(operation)
        return operation

    def _same(self, command: AgentCommand) -> Operation | None:
        """The operation that does this already; several clients that pull one model share it."""
        if command.kind is not OperationKind.PULL:
            return None
        for operation in self._running.values():
            same = (operation.kind, operation.command.key) == (command.kind, command.key)
            if same and not operation.cancelled and not operation.is_over:
                return operation
        return None

    def _take_in(self, operation: Operation, agents: Iterable[AgentState]) -> None:
        for target in operation.add(agents):
            self._deferred.void(target.agent_id, operation.command)

    @asynccontextmanager
    async def followed(self, operation: Operation) -> AsyncIterator[None]:
        """Wait for an operation; when the last who waits leaves, an attached one is given up."""
        operation.followers += 1
        try:
            yield
        finally:
            operation.followers -= 1
            if not operation.followers and not operation.detached:
                self.cancel(operation)

    def cancel(self, operation: Operation) -> None:
        """End an operation; what the agents have got so far stays, and a repetition resumes it."""
        task = self._tasks_of.get(operation.id)
        if task is None or operation.is_over:
            return
        operation.cancelled = True
        for target in operation.targets.values():
            self._deferred.settle(target.agent_id, target.command)
        task.cancel()
        log.info("operation cancelled", extra=_facts(operation))

    def close(self, reason: str) -> None:
        """Tell everyone who waits that nothing more will come; debts stay for the next process."""
        for operation in list(self._running.values()):
            operation.error = Refused(503, reason)
            self._tasks_of[operation.id].cancel()

    async def _run(self, operation: Operation) -> None:
        try:
            await self._worker.carry_out(operation)
        finally:
            for target in operation.targets.values():
                if not target.state.is_over:
                    target.state = OperationState.CANCELLED
            operation.end(self._clock.utc(self._clock.now()))
            del self._running[operation.id], self._tasks_of[operation.id]
            self._ended.append(operation)
            self._write_off(operation)
            self._clear_uploads(operation)
            operation.forget_bodies()
        log.info("operation ended", extra=_facts(operation))

    def _write_off(self, operation: Operation) -> None:
        """What Ollama refused where it was asked, agents that are away need not try either."""
        if operation.cancelled:
            return  # nothing of it is owed any more, and the same may have begun anew
        targets = operation.targets.values()
        failed = any(target.state is OperationState.FAILED for target in targets)
        if failed and not any(target.state is OperationState.DONE for target in targets):
            for target in targets:
                self._deferred.settle(target.agent_id, target.command)

    def _clear_uploads(self, operation: Operation) -> None:
        """Files that a model was created from are on the agents now."""
        if operation.state is not OperationState.DONE:
            return
        wanted_by = [pending.command for pending in self._deferred.all()]
        wanted_by += [other.command for other in self._running.values()]
        wanted = {digest for command in wanted_by for digest in command.blobs}
        for digest in set(operation.command.blobs) - wanted:
            self._uploads.drop(digest)

    def _resume(self, pending: DeferredCommand, agent: AgentState) -> None:
        """A debt is paid by an operation of its own, unless the one it came from still lasts."""
        for operation in self._running.values():
            target = operation.targets.get(agent.id)
            if target is not None and target.command == pending.command:
                return
        self.start(pending.command, [agent], detached=True)


def _facts(operation: Operation) -> dict[str, object]:
    return {
        "operation": operation.id,
        "kind": operation.kind.value,
        "model": operation.command.name,
        "state": operation.state.value,
        "agents": len(operation.targets),
        "reason": None if operation.error is None else str(operation.error),
    }
