"""The operations under way and the last that ended: started, joined, resumed, cancelled."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from secrets import token_hex

from ollama_coordinator.aio import OwnedTasks
from ollama_coordinator.dispatch import Dispatch
from ollama_coordinator.monitor import Monitor
from ollama_coordinator.registry import AgentState
from ollama_coordinator_common.protocol import AgentOperation
from ollama_coordinator_common.types import AgentId

from .deferred import Deferred, is_void
from .operation import Operation
from .remote import Remote
from .supply import Supply
from .targets import Placement, Rule
from .transfers import Transfers
from .types import (
    AgentCommand,
    DeferredCommand,
    OperationKind,
    OperationState,
    OperationView,
    Refused,
    Replaced,
    UnknownOperation,
)
from .worker import LOOK_SECONDS, Worker

log = logging.getLogger(__name__)

REMEMBERED = 100
"""Ended operations that `GET /api/operations` still shows; each has a row for every agent."""

SWEEP_SECONDS = 5.0
"""How often what interrupted transfers left is looked for: nobody sees it meanwhile."""

EXPIRE_SECONDS = 60.0
"""How often old uploads are looked for; they are kept for a day."""


class Operations:
    """Runs operations; open between `async with` only.

    `handed_over`: another coordinator leads, or will; what is deferred is its concern.
    """

    def __init__(
        self,
        dispatch: Dispatch,
        monitor: Monitor,
        remote: Remote,
        deferred: Deferred,
        transfers: Transfers,
        *,
        return_seconds: float,
    ) -> None:
        self._registry = dispatch.registry
        self._clock = dispatch.clock
        self._uploads = remote.uploads
        self._deferred = deferred
        self._supply = Supply(dispatch, transfers, remote)
        self.worker = Worker(dispatch, monitor, self._supply, deferred, return_seconds)
        self._tasks = OwnedTasks()
        self.handed_over = False
        self._running: dict[str, Operation] = {}
        self._ended: deque[Operation] = deque(maxlen=REMEMBERED)

    async def __aenter__(self) -> "Operations":
        await self._deferred.restore()
        for deferred in self._deferred.all():
            agent = self._registry.find(deferred.agent_id)
            if agent is not None and deferred.command.kind is OperationKind.DELETE:
                self._registry.note_missing(agent, deferred.command.key)
        await self._tasks.__aenter__()
        self._tasks.start(self._resume_for_ever())
        self._tasks.start(self._expire_for_ever())
        self._tasks.start(self._sweep_for_ever())
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self._tasks.__aexit__(*raised)

    # ── what there is ─────────────────────────────────────────────────────────────────────────

    def views(self, agent_id: str | None = None) -> list[OperationView]:
        """The operations that are known, newest first; of one agent if given."""
        known = [*self._running.values(), *self._ended]
        known.sort(key=lambda operation: operation.started_at, reverse=True)
        return [o.view() for o in known if agent_id is None or AgentId(agent_id) in o.targets]

    def of_agent(self, agent_id: AgentId) -> list[AgentOperation]:
        """An agent's part in the operations that are known, and its deferred commands."""
        known = [
            operation.view_for(operation.targets[agent_id])
            for operation in (*self._running.values(), *reversed(self._ended))
            if agent_id in operation.targets
        ]
        deferred = [one.command for one in self._deferred.of(agent_id)]
        state = OperationState.PENDING.value
        return [*known, *(AgentOperation("", one.kind.value, one.name, state) for one in deferred)]

    def get(self, operation_id: str) -> Operation:
        """One operation.

        Raises:
            UnknownOperation: there is none, or it ended long ago.
        """
        for operation in (*self._running.values(), *self._ended):
            if operation.id == operation_id:
                return operation
        raise UnknownOperation(operation_id)

    def makes_later(self, key: str) -> bool:
        """Whether an agent that is away will make a model of this routing key."""
        return self._deferred.makes(key)

    def brings(self, key: str, agent_id: AgentId) -> bool:
        """Whether an agent is getting a model of this routing key, or will."""
        for operation in self._running.values():
            target = operation.targets.get(agent_id)
            is_pull = operation.kind is OperationKind.PULL and operation.command.key == key
            if is_pull and target is not None and not target.state.is_over:
                return True
        return self._deferred.makes(key, agent_id)

    def pending(self) -> list[DeferredCommand]:
        """The commands of agents that are away."""
        return self._deferred.all()

    # ── starting and following ────────────────────────────────────────────────────────────────

    def start(
        self,
        command: AgentCommand,
        agents: Sequence[AgentState],
        *,
        placement: Placement | None = None,
        spare: Iterable[AgentState] = (),
        left_out: Iterable[tuple[AgentState, str]] = (),
        detached: bool = False,
        resumed: bool = False,
    ) -> Operation:
        """Start a command on these agents; a pull joins one like it that is under way.

        It makes older commands for the model void (`is_void`). `spare` agents replace those that
        fail, and those `left_out` have no room. A `detached` operation continues when no client
        follows it, and after a restart. A `resumed` one is older than all others.
        """
        placement = placement if placement is not None else Placement()
        operation = None if resumed else self._pull_under_way(command, placement)
        if operation is None:
            now = self._clock.utc(self._clock.now())
            operation = Operation(token_hex(8), command, placement, now)
            if not resumed:
                self._replace_older(command, {agent.id for agent in agents})
            self._running[operation.id] = operation
            self._add(operation, agents)
            operation.spare = list(spare)
            operation.leave_out(left_out)
            operation.task = self._tasks.start(self._run(operation))
            log.info("operation started", extra=_facts(operation))
        elif placement.rule is not Rule.COUNT:
            self._add(operation, agents)
        operation.detached = operation.detached or detached
        if operation.detached:
            self.worker.defer(operation)
        return operation

    def _pull_under_way(self, command: AgentCommand, placement: Placement) -> Operation | None:
        """The running pull of the same model in the same way onto the same agents.

        Several clients share it. Onto others it is another one: its end is not that of this one.
        """
        if command.kind is not OperationKind.PULL:
            return None
        for operation in self._running.values():
            known, is_like = operation.command, operation.placement == placement
            if is_like and known.is_like(command) and not operation.cancelled:
                return operation
        return None

    def _replace_older(self, command: AgentCommand, agents: set[AgentId]) -> None:
        """End what the command makes void of operations under way and of deferred commands."""
        self._deferred.void(command)
        for operation in self._running.values():
            for target in operation.targets.values():
                same = target.agent_id in agents
                if not target.state.is_over and is_void(
                    operation.command, command, same_agent=same
                ):
                    target.replace(Replaced(command.kind))

    def _add(self, operation: Operation, agents: Iterable[AgentState]) -> None:
        for target in operation.add(agents):
            self._deferred.supersede(target.agent_id, operation.command)

    @asynccontextmanager
    async def followed(self, operation: Operation) -> AsyncIterator[None]:
        """Count a follower during the block; without any, an attached operation is cancelled."""
        operation.followers += 1
        try:
            yield
        finally:
            operation.followers -= 1
            if not operation.followers and not operation.detached:
                self.cancel(operation)

    def cancel(self, operation: Operation) -> None:
        """End an operation; what the agents have downloaded stays, and a repetition resumes it."""
        if operation.is_over or operation.task is None:
            return
        operation.cancelled = True
        self._drop_deferred(operation)
        operation.task.cancel()
        log.info("operation cancelled", extra=_facts(operation))

    def close(self, reason: str) -> None:
        """End every operation with an error; deferred commands stay for the next process."""
        for operation in list(self._running.values()):
            self._end(operation, reason)

    def hand_over(self) -> None:
        """Leave to the next leader what it resumes; what clients follow here goes on here."""
        self.handed_over = True
        for operation in list(self._running.values()):
            if operation.detached:
                self._end(operation, "another coordinator goes on with it")

    def _end(self, operation: Operation, reason: str) -> None:
        operation.error = Refused(503, reason)
        if operation.task is not None:
            operation.task.cancel()

    async def _run(self, operation: Operation) -> None:
        try:
            await self.worker.carry_out(operation)
        finally:
            for target in operation.targets.values():
                if not target.state.is_over:
                    target.state = OperationState.CANCELLED
            operation.end(self._clock.utc(self._clock.now()))
            del self._running[operation.id]
            self._ended.append(operation)
            if operation.is_refused:
                # Agents that are away would be refused too.
                self._drop_deferred(operation)
            if operation.state is OperationState.DONE:
                self._drop_uploads(operation)
            operation.forget_body()
        log.info("operation ended", extra=_facts(operation))

    def _drop_deferred(self, operation: Operation) -> None:
        """Drop what this operation has deferred; another like it may have deferred the same."""
        for target in operation.targets.values():
            if operation.detached or target.state is OperationState.PENDING:
                self._deferred.finish(target.agent_id, operation.command)

    def _drop_uploads(self, operation: Operation) -> None:
        """Drop the files of a created model: the agents have them now."""
        for digest in set(operation.command.blobs) - self._needed_files():
            self._uploads.drop(digest)

    def _needed_files(self) -> set[str]:
        """The uploaded files that a running or a deferred command needs."""
        commands = [deferred.command for deferred in self._deferred.all()]
        commands += [operation.command for operation in self._running.values()]
        return {digest for command in commands for digest in command.blobs}

    async def _expire_for_ever(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self._uploads.expire, self._needed_files())
            except OSError as exc:
                log.warning("old uploads cannot be dropped", extra={"reason": str(exc)})
            await asyncio.sleep(EXPIRE_SECONDS)

    async def _sweep_for_ever(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            if self.handed_over:
                continue
            try:
                await self._supply.sweep()
            except Exception:
                log.exception("what transfers left is swept up later")

    # ── deferred commands ─────────────────────────────────────────────────────────────────────

    async def _resume_for_ever(self) -> None:
        while not self.handed_over:
            try:
                self._resume(self._clock.now())
            except Exception:
                log.exception("resuming operations failed and is tried again")
            await asyncio.sleep(LOOK_SECONDS)

    def _resume(self, now: float) -> None:
        """Start deferred commands of agents that are back, one at a time on each agent.

        Those that do the same are one operation, as before a restart: a model comes once from the
        internet. After that, pulls wait until it is known which agents give models away.
        """
        running = list(self._running.values())
        busy = {t.agent_id for o in running for t in o.targets.values() if not t.state.is_over}
        unheard = any(a.is_unheard and self._registry.is_online(a, now) for a in self._registry)
        back: dict[AgentCommand, list[AgentState]] = {}
        for deferred in self._deferred.all():
            agent, command = self._registry.find(deferred.agent_id), deferred.command
            if agent is None:
                self._deferred.forget(deferred.agent_id)
            elif agent.id not in busy and self._registry.is_reachable(agent, now):
                busy.add(agent.id)
                # The operation that deferred it may still run on other agents: not beside it.
                is_beside = command in [o.command for o in running if agent.id in o.targets]
                if not is_beside and not (unheard and command.kind is OperationKind.PULL):
                    back.setdefault(command, []).append(agent)
        for command, agents in back.items():
            self.start(command, agents, detached=True, resumed=True)


def _facts(operation: Operation) -> dict[str, object]:
    return {
        "operation": operation.id,
        "kind": operation.kind.value,
        "model": operation.command.name,
        "state": operation.state.value,
        "agents": len(operation.targets),
        "reason": None if operation.error is None else str(operation.error),
    }
