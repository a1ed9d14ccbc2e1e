"""How one operation gets done: a task for each agent, with patience for those that go away."""

import asyncio
import logging

from msgspec import Struct

from ollama_coordinator.aio import Interrupt
from ollama_coordinator.clock import Clock
from ollama_coordinator.dispatch import Dispatch
from ollama_coordinator.monitor import Monitor
from ollama_coordinator.registry import AgentState, Registry
from ollama_coordinator.upstream import UpstreamError

from .deferred import Deferred
from .operation import Operation, Target
from .progress import ProgressLine
from .remote import Remote
from .types import DeferredCommand, OperationKind, OperationState, Refused

log = logging.getLogger(__name__)

AT_ONCE = 32
"""Agents of one operation that work at the same time; they share one line to the registry."""

LOOK_AGAIN_SECONDS = 0.25
LISTED_SECONDS = 2.0
FAILURES = 8
"""Attempts on one agent that break off in a row without any progress; then it is given up."""

HOPELESS = ("does not exist", "invalid", "not authorized", "unauthorized")
"""Refusals that every other agent would answer too."""


class Patience(Struct):
    """How long an operation waits for agents that went away once no other agent is at work."""

    return_seconds: float = 15.0


class Worker:
    """Carries operations out."""

    def __init__(
        self,
        registry: Registry,
        dispatch: Dispatch,
        monitor: Monitor,
        remote: Remote,
        deferred: Deferred,
        clock: Clock,
        patience: Patience,
    ) -> None:
        self._registry = registry
        self._dispatch = dispatch
        self._monitor = monitor
        self._remote = remote
        self._deferred = deferred
        self._clock = clock
        self._patience = patience

    def owe(self, operation: Operation) -> None:
        """Note what every agent still has to do, so that a restart goes on with it."""
        for target in operation.targets.values():
            if not target.state.is_over:
                self._owe(target)

    def _owe(self, target: Target) -> None:
        since = self._clock.utc(self._clock.now())
        self._deferred.add(DeferredCommand(target.agent_id, target.command, since))

    async def carry_out(self, operation: Operation) -> None:
        """Run until every target is over; targets may join meanwhile."""
        places = asyncio.Semaphore(AT_ONCE)
        started: set[Target] = set()
        running: set[asyncio.Task[None]] = set()
        try:
            while True:
                for target in list(operation.targets.values()):
                    if target not in started:
                        started.add(target)
                        work = self._work(operation, target, places)
                        running.add(asyncio.create_task(work))
                if not running:
                    return
                done, running = await asyncio.wait(
                    running, timeout=LOOK_AGAIN_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    task.result()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _work(self, operation: Operation, target: Target, places: asyncio.Semaphore) -> None:
        while not target.state.is_over:
            agent = self._registry.find(target.agent_id)
            if agent is None:
                text = f"agent {target.agent_name} was removed"
                operation.gives_up(target, OperationState.FAILED, Refused(503, text))
                self._deferred.settle(target.agent_id, target.command)
            elif self._registry.is_reachable(agent, self._clock.now()):
                async with places:
                    await self._attempt(operation, target, agent)
            else:
                await self._wait(operation, target)
        if target.state in (OperationState.FAILED, OperationState.PENDING):
            self._stand_in(operation, target)

    async def _attempt(self, operation: Operation, target: Target, agent: AgentState) -> None:
        def hear(line: ProgressLine) -> None:
            target.heard_at, target.failures = self._clock.now(), 0
            operation.hears(target, line)

        operation.begins(target)
        target.heard_at = self._clock.now()
        target.interrupt = Interrupt()
        try:
            async with target.interrupt:
                await self._remote.do(agent, target.command, hear)
        except Refused as exc:
            log.warning("agent refused", extra=_facts(operation, target, exc))
            operation.gives_up(target, OperationState.FAILED, exc)
            self._deferred.settle(target.agent_id, target.command)
        except UpstreamError as exc:
            log.warning("agent lost in an operation", extra=_facts(operation, target, exc))
            self._broke_off(operation, target, agent, exc)
            await asyncio.sleep(LOOK_AGAIN_SECONDS)
        else:
            self._deferred.settle(target.agent_id, target.command)
            self._registry.answered(agent)
            await self._take_over(target, agent)
            operation.succeeds(target)

    def _broke_off(
        self, operation: Operation, target: Target, agent: AgentState, error: UpstreamError
    ) -> None:
        """The agent comes back into rotation as soon as a probe succeeds, and is asked again."""
        reason = Refused(503, f"agent {agent.name}: {error}")
        target.failures += 1
        if target.failures >= FAILURES:
            operation.gives_up(target, OperationState.FAILED, reason)
            self._deferred.settle(target.agent_id, target.command)
            return
        self._dispatch.take_out(agent, str(error))
        operation.is_away(target, reason, self._clock.now())

    async def _take_over(self, target: Target, agent: AgentState) -> None:
        """Know at once what is on the agent now: the next request asks for it."""
        key = target.command.key
        if target.command.kind is OperationKind.DELETE:
            self._registry.note_missing(agent, key)
        elif target.command.kind is OperationKind.UNLOAD:
            self._registry.note_unloaded(agent, key)
        if target.command.kind is not OperationKind.PUSH:
            await self._monitor.look_at(agent, seconds=LISTED_SECONDS)

    async def _wait(self, operation: Operation, target: Target) -> None:
        """For an agent that is away, as long as others are at work and then a little longer."""
        now = self._clock.now()
        if target.away_since is None:
            # It was away when the operation began: nobody has reason to wait for it.
            target.away_since = float("-inf")
        at_work = any(other.state is OperationState.RUNNING for other in operation.targets.values())
        patience = self._patience.return_seconds if operation.kind.streams else 0.0
        if at_work or now - target.away_since < patience:
            operation.is_away(target, None, now)
            await asyncio.sleep(LOOK_AGAIN_SECONDS)
            return
        away = Refused(503, f"agent {target.agent_name} is away; it goes on when it is back")
        operation.gives_up(target, OperationState.PENDING, target.error or away)
        if operation.kind is not OperationKind.PUSH:
            self._owe(target)

    def _stand_in(self, operation: Operation, target: Target) -> None:
        """Where a number of agents was asked for, another one takes the place of one that fails."""
        text = str(target.error)
        if operation.spare and not any(sign in text for sign in HOPELESS):
            operation.add([operation.spare.pop(0)])


def _facts(operation: Operation, target: Target, reason: Exception) -> dict[str, object]:
    return {
        "operation": operation.id,
        "kind": operation.kind.value,
        "model": operation.command.name,
        "agent_id": target.agent_id,
        "agent": target.agent_name,
        "reason": str(reason),
    }
