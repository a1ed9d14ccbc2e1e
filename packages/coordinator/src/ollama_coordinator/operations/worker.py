"""Carries one operation out: a task for each agent, which waits for an agent that goes away."""

import asyncio
import logging

from ollama_coordinator.aio import Interrupt, OwnedTasks
from ollama_coordinator.dispatch import Dispatch
from ollama_coordinator.monitor import Monitor
from ollama_coordinator.registry import AgentState
from ollama_coordinator.upstream import AgentLost, UpstreamError
from ollama_coordinator_common.error import OllamaCoordinatorError

from .deferred import Deferred
from .operation import Operation, Target
from .progress import ProgressLine
from .supply import SAME_EVERYWHERE, Supply, WriterLost
from .types import AgentCommand, DeferredCommand, OperationKind, OperationState, Refused

log = logging.getLogger(__name__)

PARALLEL_AGENTS = 32
"""Agents of one operation that work at the same time; they share one link to the registry."""

LOOK_SECONDS = 0.25
"""How often agents that are away or silent are looked at; nobody notices a pull start so late."""

LISTED_SECONDS = 2.0
"""How long an operation waits for the agent's new list of models; a heartbeat brings it later."""

SILENCE_SECONDS = 10.0
"""Ollama reports progress 16 times a second; a silent agent is probed."""

PROBE_SECONDS = 5.0
"""A probe's time limit: long, since the agent's disk is busy with a large file."""

MOST_FAILURES = 8
"""Attempts in a row on one agent that break off without any progress; then its part has failed."""


class Worker:
    """Carries operations out.

    `return_seconds` is how long an operation with progress waits for agents that went away, once no
    other agent is at work; it may change while operations run.
    """

    def __init__(
        self,
        dispatch: Dispatch,
        monitor: Monitor,
        supply: Supply,
        deferred: Deferred,
        return_seconds: float,
    ) -> None:
        self._dispatch = dispatch
        self._registry = dispatch.registry
        self._clock = dispatch.clock
        self._monitor = monitor
        self._supply = supply
        self._deferred = deferred
        self.return_seconds = return_seconds

    def defer(self, operation: Operation) -> None:
        """Keep what every agent still has to do, so that a restart continues it."""
        for target in operation.targets.values():
            if not target.state.is_over:
                self._defer(operation, target)

    def _defer(self, operation: Operation, target: Target) -> None:
        since = self._clock.utc(self._clock.now())
        self._deferred.add(DeferredCommand(target.agent_id, operation.command, since))

    async def carry_out(self, operation: Operation) -> None:
        """Run until every target is over; targets may be added meanwhile."""
        self._supply.plan(operation)
        slots = asyncio.Semaphore(PARALLEL_AGENTS)
        started: set[Target] = set()
        running: set[asyncio.Task[None]] = set()
        async with OwnedTasks() as probes:
            try:
                while True:
                    for target in [t for t in operation.targets.values() if t not in started]:
                        started.add(target)
                        work = self._work(operation, target, slots)
                        running.add(asyncio.create_task(work))
                    if not running:
                        return
                    done, running = await asyncio.wait(
                        running, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED
                    )
                    for task in done:
                        task.result()
                    for target in operation.targets.values():
                        self._look_at(target, probes)
            finally:
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)

    async def _work(self, operation: Operation, target: Target, slots: asyncio.Semaphore) -> None:
        while not target.state.is_over:
            agent = self._registry.find(target.agent_id)
            if target.replaced is not None:
                self._fail(operation, target, target.replaced)
            elif agent is None:
                text = f"agent {target.agent_name} was removed"
                self._fail(operation, target, Refused(503, text))
            elif self._registry.is_reachable(agent, self._clock.now()):
                try:
                    await self._supply.turn(operation, target)
                except Refused as exc:
                    self._fail(operation, target, exc)
                    continue
                if not self._supply.is_ready(operation, target, agent):
                    operation.is_away(target, None, self._clock.now())
                    await self._wait(operation, target)
                    continue
                async with slots:
                    await self._attempt(operation, target, agent)
            else:
                await self._wait(operation, target)
        is_missing = target.state in (OperationState.FAILED, OperationState.PENDING)
        if is_missing and target.replaced is None:
            _replace(operation, target)

    async def _attempt(self, operation: Operation, target: Target, agent: AgentState) -> None:
        def report(line: ProgressLine) -> None:
            target.heard_at, target.failures = self._clock.now(), 0
            operation.reports(target, line)

        operation.begins(target)
        target.heard_at = self._clock.now()
        target.interrupt = Interrupt()
        has_it = operation.command.key in agent.inventory.available
        try:
            async with target.interrupt:
                if operation.kind is OperationKind.PULL and has_it:
                    # It may have been deleted there since, and the list be a minute old.
                    await self._monitor.look_at(agent, seconds=PROBE_SECONDS)
                await self._supply.carry_out(operation, target, agent, report)
        except Refused as exc:
            log.warning("agent refused", extra=_facts(operation, target, exc))
            self._fail(operation, target, exc)
        except UpstreamError as exc:
            log.warning("agent lost in an operation", extra=_facts(operation, target, exc))
            self._broke_off(operation, target, agent, exc)
            await asyncio.sleep(LOOK_SECONDS)
        else:
            self._deferred.finish(target.agent_id, operation.command)
            self._registry.answered(agent)
            await self._update_models(operation.command, agent)
            self._supply.succeeded(operation, agent)
            operation.succeeds(target)

    def _fail(self, operation: Operation, target: Target, reason: OllamaCoordinatorError) -> None:
        operation.gives_up(target, OperationState.FAILED, reason)
        self._deferred.finish(target.agent_id, operation.command)

    def _broke_off(
        self, operation: Operation, target: Target, agent: AgentState, error: UpstreamError
    ) -> None:
        """Try again once a probe of the agent succeeds, unless it failed too often."""
        reason = Refused(503, f"agent {agent.name}: {error}")
        target.failures += 1
        if target.failures >= MOST_FAILURES:
            self._fail(operation, target, reason)
            return
        if isinstance(error, WriterLost):
            target.lost_at = self._clock.now()
        else:
            self._dispatch.take_out(agent, str(error))
        operation.is_away(target, reason, self._clock.now())

    async def _update_models(self, command: AgentCommand, agent: AgentState) -> None:
        """Learn at once which models the agent has now: the next request may ask for this one."""
        if command.kind is OperationKind.DELETE:
            self._registry.note_missing(agent, command.key)
        elif command.kind is OperationKind.UNLOAD:
            self._registry.note_unloaded(agent, command.key)
        if command.kind is not OperationKind.PUSH:
            await self._monitor.look_at(agent, seconds=LISTED_SECONDS)

    # ── agents that are silent or away ────────────────────────────────────────────────────────

    def _look_at(self, target: Target, probes: OwnedTasks) -> None:
        """End the attempt on an agent that is lost; probe one that is silent."""
        if target.state is not OperationState.RUNNING or target.interrupt is None:
            return
        now = self._clock.now()
        agent = self._registry.find(target.agent_id)
        silent = now - target.heard_at >= SILENCE_SECONDS
        online = agent is not None and self._registry.is_online(agent, now)
        if agent is None or not online or (silent and agent.out_of_rotation() is not None):
            reason = f"agent {target.agent_name} does not answer any more"
            target.interrupt.fire(AgentLost(reason))
        elif silent and now - target.probed_at >= SILENCE_SECONDS:
            # Ollama is silent too while it checks a large file: only a failed probe counts.
            target.probed_at = now
            probes.start(self._monitor.look_at(agent, seconds=PROBE_SECONDS))

    async def _wait(self, operation: Operation, target: Target) -> None:
        """Wait for an agent that is away while others are at work, then `return_seconds` more."""
        now = self._clock.now()
        if target.away_since is None:
            # It was away when the operation began: there is no reason to expect it back soon.
            target.away_since = float("-inf")
        at_work = any(other.state is OperationState.RUNNING for other in operation.targets.values())
        wait_seconds = self.return_seconds if operation.kind.streams else 0.0
        if at_work or now - target.away_since < wait_seconds:
            operation.is_away(target, None, now)
            await asyncio.sleep(LOOK_SECONDS)
            return
        away = Refused(503, f"agent {target.agent_name} is away; it goes on when it is back")
        operation.gives_up(target, OperationState.PENDING, target.error or away)
        if operation.kind is not OperationKind.PUSH:
            self._defer(operation, target)


def _replace(operation: Operation, target: Target) -> None:
    """Let a spare agent do the part of one that failed, where a number of agents was asked for."""
    text = str(target.error)
    if operation.spare and not any(words in text for words in SAME_EVERYWHERE):
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
