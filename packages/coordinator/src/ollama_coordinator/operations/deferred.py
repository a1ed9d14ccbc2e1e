"""What agents owe: deeds for those that are away, kept until they return, also over a restart."""

import asyncio
import logging
from collections.abc import Callable, Iterable

import msgspec

from ollama_coordinator.aio import OwnedTasks
from ollama_coordinator.clock import Clock
from ollama_coordinator.db import Store
from ollama_coordinator.monitor import Monitor
from ollama_coordinator.registry import AgentState, Registry
from ollama_coordinator.upstream import AgentLost
from ollama_coordinator_common.types import AgentId

from .operation import Operation, Target
from .types import AgentCommand, DeferredCommand, OperationKind, OperationState

DOCUMENT = "pending-operations"

_pending = msgspec.json.Decoder(list[DeferredCommand])

MAKING = (OperationKind.PULL, OperationKind.CREATE, OperationKind.COPY)
"""Each puts a content of its own under the name, so that only the last of them counts."""

UNDONE_BY = {
    OperationKind.PULL: (*MAKING, OperationKind.DELETE),
    OperationKind.CREATE: (*MAKING, OperationKind.DELETE),
    OperationKind.COPY: (*MAKING, OperationKind.DELETE),
    OperationKind.DELETE: (*MAKING, OperationKind.DELETE, OperationKind.LOAD, OperationKind.UNLOAD),
    OperationKind.LOAD: (OperationKind.LOAD, OperationKind.UNLOAD),
    OperationKind.UNLOAD: (OperationKind.LOAD, OperationKind.UNLOAD),
    OperationKind.PUSH: (OperationKind.PUSH,),
}
"""Which older debts a newer deed on the same model makes void."""


class Deferred:
    """DeferredCommand deeds, oldest first; at most one of a kind for an agent and a model."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._owed: dict[tuple[AgentId, OperationKind, str], DeferredCommand] = {}

    async def restore(self) -> None:
        """Read what was owed when the last process ended.

        Raises:
            DatabaseError: the database cannot be read.
        """
        body = await self._store.document(DOCUMENT)
        for pending in _pending.decode(body) if body else ():
            self.add(pending)

    def all(self) -> list[DeferredCommand]:
        """Everything that is owed."""
        return list(self._owed.values())

    def of(self, agent_id: AgentId) -> list[DeferredCommand]:
        """What one agent owes."""
        return [pending for pending in self._owed.values() if pending.agent_id == agent_id]

    def add(self, pending: DeferredCommand) -> None:
        """An agent is to do something when it is back; what it owes already keeps its place."""
        self.void(pending.agent_id, pending.command)
        self._owed.setdefault(_key(pending.agent_id, pending.command), pending)
        self._changed()

    def void(self, agent_id: AgentId, command: AgentCommand) -> None:
        """A deed that is newer than what is owed makes some of that senseless, but not itself."""
        for kind in UNDONE_BY[command.kind]:
            known = self._owed.get((agent_id, kind, command.key))
            if known is not None and known.command != command:
                self._drop(known)

    def settle(self, agent_id: AgentId, command: AgentCommand) -> None:
        """It was done, or cannot be done; a newer one of its kind is owed still."""
        known = self._owed.get(_key(agent_id, command))
        if known is not None and known.command == command:
            self._drop(known)

    def forget(self, agent_id: AgentId) -> None:
        """The agent was removed."""
        for pending in self.of(agent_id):
            self._drop(pending)

    def _drop(self, pending: DeferredCommand) -> None:
        del self._owed[_key(pending.agent_id, pending.command)]
        self._changed()

    def _changed(self) -> None:
        # An operation on a thousand agents changes it a thousand times at once.
        self._store.note_document(DOCUMENT, lambda: msgspec.json.encode(self.all()))


def _key(agent_id: AgentId, command: AgentCommand) -> tuple[AgentId, OperationKind, str]:
    return agent_id, command.kind, command.key


log = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
"""How soon an agent that returned is noticed here."""

SILENCE_SECONDS = 10.0
"""A pull says something 16 times a second; a silent agent is asked whether it is still there."""

PROBE_SECONDS = 5.0


class Caretaker:
    """`run` is its loop; `resume` is called with a debt whose agent is back."""

    def __init__(
        self,
        registry: Registry,
        monitor: Monitor,
        deferred: Deferred,
        clock: Clock,
        tasks: OwnedTasks,
        *,
        running: Callable[[], Iterable[Operation]],
        resume: Callable[[DeferredCommand, AgentState], None],
    ) -> None:
        self._registry = registry
        self._monitor = monitor
        self._deferred = deferred
        self._clock = clock
        self._tasks = tasks
        self._running = running
        self._resume = resume

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            try:
                self._look(self._clock.now())
            except Exception:
                log.exception("looking after operations stumbled and goes on")
            await asyncio.sleep(LOOK_SECONDS)

    def _look(self, now: float) -> None:
        for operation in self._running():
            for target in operation.targets.values():
                if target.state is OperationState.RUNNING:
                    self._look_at(target, now)
        self._take_up(now)

    def _look_at(self, target: Target, now: float) -> None:
        if self._is_lost(target, now):
            reason = f"agent {target.agent_name} does not answer any more"
            if target.interrupt is not None:
                target.interrupt.fire(AgentLost(reason))
        elif now - max(target.heard_at, target.doubted_at) >= SILENCE_SECONDS:
            # Checking a large file is silent too: only a question that fails means anything.
            target.doubted_at = now
            agent = self._registry.find(target.agent_id)
            if agent is not None:
                self._tasks.start(self._monitor.look_at(agent, seconds=PROBE_SECONDS))

    def _is_lost(self, target: Target, now: float) -> bool:
        agent = self._registry.find(target.agent_id)
        if agent is None or not self._registry.is_online(agent, now):
            return True
        silent = now - target.heard_at >= SILENCE_SECONDS
        return silent and agent.out_of_rotation() is not None

    def _take_up(self, now: float) -> None:
        """Agents that are back do what they owe, one thing after the other."""
        busy = {
            agent_id
            for operation in self._running()
            for agent_id, target in operation.targets.items()
            if not target.state.is_over
        }
        for pending in self._deferred.all():
            agent = self._registry.find(pending.agent_id)
            if agent is None:
                self._deferred.forget(pending.agent_id)
            elif agent.id not in busy and self._registry.is_reachable(agent, now):
                busy.add(agent.id)
                self._resume(pending, agent)
