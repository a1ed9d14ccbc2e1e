"""The whole picture: the coordinator itself, the fleet in numbers, its agents and requests."""

from collections import Counter
from importlib.metadata import version
from typing import Any

from ollama_coordinator.clock import Clock
from ollama_coordinator.db import Store
from ollama_coordinator.dispatch import Dispatch
from ollama_coordinator.journal import Observation
from ollama_coordinator.operations import Operations
from ollama_coordinator.own_address import own_address
from ollama_coordinator_common.settings import CoordinatorConfig

from .feed import Snapshot
from .rows import Row, Rows


class Snapshots:
    """Draws what the dashboard shows."""

    def __init__(
        self,
        rows: Rows,
        dispatch: Dispatch,
        observation: Observation,
        store: Store,
        clock: Clock,
        *,
        config: CoordinatorConfig,
        operations: Operations,
    ) -> None:
        self._rows = rows
        self._dispatch = dispatch
        self._observation = observation
        self._store = store
        self._clock = clock
        self._config = config
        self._operations = operations
        self._version = version("ollama-coordinator")
        self._started_at = clock.utc(clock.now())

    def take(self) -> Snapshot:
        """The picture of this moment."""
        now = self._clock.now()
        agents, requests = self._rows.agents(now), self._rows.requests(now)
        state: dict[str, Any] = {
            "coordinator": self._coordinator(),
            "fleet": self._fleet(agents),
            "agents": agents,
            "requests": requests,
            "finished": self._rows.finished(),
            "operations": self._rows.operations(self._operations),
        }
        return Snapshot(self._clock.utc(now), state, self._rows.sparks)

    def _coordinator(self) -> Row:
        row: Row = {
            "version": self._version,
            "started_at": self._started_at.isoformat(),
            "policy": self._config.policy,
        }
        if (address := own_address(self._config.host)) is not None:
            row["address"] = address
        if self._store.problem:
            row["problem"] = self._store.problem
        return row

    def _fleet(self, agents: dict[str, Row]) -> Row:
        states = Counter(agent["state"] for agent in agents.values())
        in_flight = sum(1 for _ in self._dispatch.scheduler.leases())
        sparklines = self._observation.sampler.sparklines
        return {
            "agents": len(agents),
            "states": dict(states),
            "in_flight": in_flight,
            "waiting": self._observation.journal.waiting(),
            "changes": self._rows.changes(),
            "slots": sum(agent["slots"] for agent in agents.values() if agent["state"] == "online"),
            "pulse": [sparklines.number, sparklines.fleet[-1] if sparklines.fleet else 0],
        }
