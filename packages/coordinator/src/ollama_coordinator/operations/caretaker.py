"""Looks after operations: silent agents are asked, and agents that are back do what they owe."""

import asyncio
import logging
from collections.abc import Callable, Iterable

from ollama_coordinator.aio import OwnedTasks
from ollama_coordinator.clock import Clock
from ollama_coordinator.monitor import Monitor
from ollama_coordinator.registry import AgentState, Registry
from ollama_coordinator.upstream import AgentLost

from .operation import Operation, Target
from .pending import Debts
from .types import Pending, State

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
        debts: Debts,
        clock: Clock,
        tasks: OwnedTasks,
        *,
        running: Callable[[], Iterable[Operation]],
        resume: Callable[[Pending, AgentState], None],
    ) -> None:
        self._registry = registry
        self._monitor = monitor
        self._debts = debts
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
                if target.state is State.RUNNING:
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
        for pending in self._debts.all():
            agent = self._registry.find(pending.agent_id)
            if agent is None:
                self._debts.forget(pending.agent_id)
            elif agent.id not in busy and self._registry.is_reachable(agent, now):
                busy.add(agent.id)
                self._resume(pending, agent)
