"""Agents and requests as rows of the dashboard: the API's own views, and what people like to see.

A row has no nulls and nothing that changes by itself as time goes by: the page counts seconds.
"""

from datetime import datetime, timedelta
from typing import Any

import msgspec

from ollama_coordinator.clock import Clock
from ollama_coordinator.db import Finished
from ollama_coordinator.dispatch import Dispatch
from ollama_coordinator.journal import Observation, RequestView
from ollama_coordinator.operations import Operations
from ollama_coordinator.registry import AgentState, Registry
from ollama_coordinator.scheduler import Estimate
from ollama_coordinator_common.types import AgentId

Row = dict[str, Any]

ESTIMATES_SECONDS = 5.0
FINISHED_SHOWN = 40
LIVE_SHOWN = 500
OPERATIONS_SHOWN = 12


class Rows:
    """Builds rows."""

    def __init__(
        self,
        registry: Registry,
        observation: Observation,
        clock: Clock,
        dispatch: Dispatch,
    ) -> None:
        self._registry = registry
        self._observation = observation
        self._clock = clock
        self._dispatch = dispatch
        self._estimates: dict[tuple[str, str], Estimate] = {}
        self._estimated_at = float("-inf")
        self._finished: dict[str, Row] = {}
        self._agents: dict[str, tuple[object, Row]] = {}

    # ── agents ────────────────────────────────────────────────────────────────────────────────

    def agents(self, now: float) -> dict[str, Row]:
        """Every agent by its id."""
        self._estimate(now)
        known, self._agents = self._agents, {}
        for agent in self._registry:
            facts = self._facts(agent)
            before = known.get(agent.id)
            same = before is not None and before[0] == facts
            row = before[1] if same and before is not None else self.agent(agent)
            self._agents[agent.id] = (facts, row)
        return {agent_id: row for agent_id, (_, row) in self._agents.items()}

    def _facts(self, agent: AgentState) -> object:
        """All that a row is made of: while this is equal, so is the row."""
        sampler = self._observation.sampler
        return (
            agent.heard_at, agent.registration, agent.report, agent.settings, agent.left,
            agent.cooldown, agent.resting, agent.inventory.tags, agent.inventory.ps,
            tuple(agent.inventory.loaded), len(agent.inventory.available),
            self._dispatch.in_flight(agent.id), sampler.standing.get(agent.id),
            sampler.sparklines.number, self._estimated_at,
        )  # fmt: skip

    def agent(self, agent: AgentState) -> Row:
        """One agent: its view without the list of what is on its disk, and what it does."""
        clock, in_flight = self._clock, self._dispatch.in_flight(agent.id)
        last_seen = clock.utc(agent.heard_at)
        row = _plain(
            self._registry.view(agent, clock.now(), last_seen=last_seen, in_flight=in_flight)
        )
        row.pop("operations", None)
        standing = self._observation.sampler.standing.get(agent.id)
        row["models"] = len(agent.inventory.available)
        row["name"] = agent.name
        row["state"] = standing.state if standing else row["status"]
        row["since"] = _iso(self._clock.utc(standing.since)) if standing else row["registered_at"]
        row["relay"] = agent.registration.relay_port is not None
        row["preference"] = agent.settings.preference
        row["loaded_models"] = self._loaded(agent)
        row["slots"] = self._slots(agent)
        sparklines = self._observation.sampler.sparklines
        points = sparklines.agents.get(agent.id)
        row["pulse"] = [sparklines.number, points[-1] if points else 0]
        return row

    def _loaded(self, agent: AgentState) -> list[Row]:
        """What is in memory, the largest first, with its learned speeds."""
        loaded = []
        for key, resident in agent.inventory.loaded.items():
            row = _plain(resident.model)
            row.pop("digest", None)
            estimate = self._estimates.get((agent.id, key))
            if estimate is not None:
                row["prefill"] = round(estimate.prefill_tokens_per_second, 1)
                row["decode"] = round(estimate.decode_tokens_per_second, 1)
                row["slots"] = estimate.slots
                row["samples"] = estimate.samples[1]
            loaded.append(row)
        loaded.sort(key=lambda row: (-row.get("size", 0), row["name"]))
        return loaded

    def _slots(self, agent: AgentState) -> int:
        """How many requests it runs at once with what is in its memory; at least what it does."""
        runner = agent.report.runner if agent.report else None
        told = (runner.num_parallel if runner else None) or 1
        learned = [self._estimates.get((agent.id, key)) for key in agent.inventory.loaded]
        return sum(estimate.slots if estimate else told for estimate in learned) or told

    def _estimate(self, now: float) -> None:
        """Of what is in memory only: there may be a hundred thousand models on disks."""
        scheduler = self._dispatch.scheduler
        if now - self._estimated_at >= ESTIMATES_SECONDS:
            self._estimated_at = now
            self._estimates = {
                (agent.id, key): found
                for agent in self._registry
                for key in agent.inventory.loaded
                if (found := scheduler.estimate(agent.id, key)) is not None
            }

    def estimate(self, agent_id: AgentId, key: str) -> Estimate | None:
        """What is predicted of a model on an agent."""
        return self._dispatch.scheduler.estimate(agent_id, key)

    def sparks(self) -> dict[str, Any]:
        """The sparklines so far: tokens per second, the newest last."""
        sparklines = self._observation.sampler.sparklines
        return {
            "sparks": {
                "fleet": list(sparklines.fleet),
                "agents": {key: list(points) for key, points in sparklines.agents.items()},
            }
        }

    # ── requests ──────────────────────────────────────────────────────────────────────────────

    def requests(self, now: float) -> dict[str, Row]:
        """The living requests, the oldest ones when they are too many to show."""
        views = self._observation.journal.views(now, most=LIVE_SHOWN)
        return {view.id: self._living(view, now) for view in views}

    def _living(self, view: RequestView, now: float) -> Row:
        row = _plain(view)
        for moving in ("elapsed_seconds", "tokens_per_second", "start_in_seconds"):
            row.pop(moving, None)
        if view.start_in_seconds is not None:
            starts_at = self._clock.utc(now + view.start_in_seconds)
            row["starts_at"] = _iso(_to_the_second(starts_at))
        return row

    def finished(self) -> dict[str, Row]:
        """The last requests that ended."""
        recent = self._observation.journal.recent
        last = [recent[-1 - back].request for back in range(min(len(recent), FINISHED_SHOWN))]
        self._finished = {one.id: self._finished.get(one.id) or _over(one) for one in last}
        return self._finished

    # ── models ────────────────────────────────────────────────────────────────────────────────

    def changes(self) -> int:
        """Grows with everything that may change what is told of models."""
        return self._registry.changes

    def operations(self, operations: Operations) -> dict[str, Row]:
        """What is done to models now, and the last that was."""
        shown = operations.views()[:OPERATIONS_SHOWN]
        return {view.id: _plain(view) for view in shown}


def _over(request: Finished) -> Row:
    return _plain(request)


def _plain(value: Any) -> Row:
    row = msgspec.to_builtins(value)
    return {key: part for key, part in row.items() if part is not None}


def _iso(at: datetime) -> str:
    return at.isoformat().replace("+00:00", "Z")


def _to_the_second(at: datetime) -> datetime:
    """Predictions wobble by milliseconds; that is no news."""
    return (at + timedelta(milliseconds=500)).replace(microsecond=0)
