"""What the dashboard shows: the fleet in numbers, its agents, its requests, its operations.

A row is the API's own view and what the page shows beside it. It has no nulls and nothing that
changes as time goes by: the page counts seconds itself.
"""

import re
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from typing import Any

import msgspec
from msgspec import Struct

from ollama_coordinator.attention import Attention, OpenConcern
from ollama_coordinator.cluster import Cluster
from ollama_coordinator.dispatch import Dispatch
from ollama_coordinator.journal import Observation, RequestView, state_of
from ollama_coordinator.operations import Operations
from ollama_coordinator.registry import AgentState
from ollama_coordinator.scheduler import Estimate
from ollama_coordinator_common.network import public_address
from ollama_coordinator_common.settings import CoordinatorConfig

Row = dict[str, Any]

ESTIMATES_SECONDS = 5.0
"""How often learned speeds are read: they move slowly, and each one changes its agent's row."""

FINISHED_SHOWN = 40
"""Finished requests on the overview; the history page has all."""

LIVE_SHOWN = 500
"""Requests in progress that are sent to the page, oldest first; the counts are of all."""

OPERATIONS_SHOWN = 12
"""Operations that fit on the page of models."""


def utc(milliseconds: int) -> str:
    """Unix time in milliseconds as the page reads it."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat()


class Snapshot(Struct, frozen=True):
    """The fleet at the UTC time `now`.

    `state` is compared with the snapshot before, `extra` is for viewers that have just come.
    """

    now: datetime
    state: Row
    extra: Callable[[], Row]


class Snapshots:
    """Takes snapshots; an agent's row is made anew only when something in it changed."""

    def __init__(
        self,
        dispatch: Dispatch,
        observation: Observation,
        operations: Operations,
        attention: Attention,
        config: CoordinatorConfig,
        cluster: Cluster,
        pin: str = "",
    ) -> None:
        self._dispatch = dispatch
        self._registry = dispatch.registry
        self._clock = dispatch.clock
        self._journal = observation.journal
        self._sampler = observation.sampler
        self._store = observation.store
        self._operations = operations
        self._attention = attention
        self._config = config
        self._cluster = cluster
        self._pin = pin
        self._version = version("ollama-coordinator")
        self._started_at = self._clock.now()
        self._estimates: dict[tuple[str, str], Estimate] = {}
        self._estimated_at = float("-inf")
        self._finished: dict[str, Row] = {}
        self._agents: dict[str, tuple[object, Row]] = {}

    def take(self) -> Snapshot:
        """The fleet as it is now."""
        now = self._clock.now()
        agents = self._agent_rows(now)
        state = {
            "coordinator": self._coordinator(),
            "fleet": self._fleet(agents),
            "agents": agents,
            "attention": {one.concern.id: _concern_row(one) for one in self._attention.open()},
            "requests": self._request_rows(now),
            "finished": self._finished_rows(),
            "operations": {o.id: _row(o) for o in self._operations.views()[:OPERATIONS_SHOWN]},
        }
        return Snapshot(self._clock.utc(now), state, self._sparklines)

    def _coordinator(self) -> Row:
        row: Row = {
            "version": self._version,
            "started_at": self._clock.utc(self._started_at).isoformat(),
            "policy": self._config.policy,
        }
        if (address := public_address(self._config.host)) is not None:
            row["address"] = address
        if self._pin:
            row["pin"] = self._pin
        if self._store.problem:
            row["problem"] = self._store.problem
        if self._cluster.coordinators:
            row["coordinators"] = self._coordinators()
        return row

    def _coordinators(self) -> list[Row]:
        """Those that share the database, and since when the one that leads does."""
        rows = []
        for one in self._cluster.coordinators:
            row: Row = {"url": one.url, "version": one.version, "since": utc(one.started_ms)}
            leads = one is self._cluster.leader and one.leads_since_ms is not None
            if leads:
                row["leads_since"] = utc(one.leads_since_ms or 0)
            rows.append(row)
        return rows

    def _fleet(self, agents: dict[str, Row]) -> Row:
        sparklines = self._sampler.sparklines
        return {
            "agents": len(agents),
            "states": dict(Counter(agent["state"] for agent in agents.values())),
            "in_flight": sum(1 for _ in self._dispatch.scheduler.leases()),
            "waiting": self._journal.waiting(),
            "changes": self._registry.changes,
            "slots": sum(agent["slots"] for agent in agents.values() if agent["state"] == "online"),
            "sparkline": [sparklines.number, sparklines.fleet[-1] if sparklines.fleet else 0],
        }

    def _sparklines(self) -> Row:
        sparklines = self._sampler.sparklines
        agents = {key: list(points) for key, points in sparklines.agents.items()}
        return {"sparks": {"fleet": list(sparklines.fleet), "agents": agents}}

    # ── agents ────────────────────────────────────────────────────────────────────────────────

    def _agent_rows(self, now: float) -> dict[str, Row]:
        self._estimate(now)
        known, self._agents = self._agents, {}
        for agent in self._registry:
            facts = self._facts(agent)
            before = known.get(agent.id)
            row = before[1] if before is not None and before[0] == facts else self.agent(agent)
            self._agents[agent.id] = (facts, row)
        return {agent_id: row for agent_id, (_, row) in self._agents.items()}

    def _facts(self, agent: AgentState) -> object:
        """Everything a row is made of: while this is equal, so is the row."""
        return (
            agent.heard_at, agent.registration, agent.report, agent.settings, agent.left,
            agent.linked, agent.unlinked_at, agent.asleep, agent.woken_at, agent.mark,
            agent.cooldown, agent.resting, agent.foreign_bytes,
            agent.inventory.tags, agent.inventory.ps,
            tuple(agent.model_cooldowns.items()),
            tuple(agent.inventory.loaded), len(agent.inventory.available),
            self._dispatch.scheduler.in_flight(agent.id), self._sampler.standing.get(agent.id),
            self._sampler.sparklines.number, self._estimated_at,
        )  # fmt: skip

    def agent(self, agent: AgentState) -> Row:
        """One agent's row: its view, with the number of its models in place of their list."""
        in_flight, last_seen = (
            self._dispatch.scheduler.in_flight(agent.id),
            self._clock.utc(agent.heard_at),
        )
        now = self._clock.now()
        row = _row(self._registry.view(agent, now, last_seen=last_seen, in_flight=in_flight))
        row.pop("operations", None)
        standing = self._sampler.standing.get(agent.id)
        row["models"] = len(agent.inventory.available)
        # As it is now: an agent that was drained a moment ago has not been sampled yet.
        row["state"] = state = state_of(agent, now, self._registry.agent_timeout)
        since = standing.since if standing and standing.state == state else now
        row["since"] = _iso(self._clock.utc(since))
        row["relay"] = agent.registration.relay_port is not None
        row["by_url"] = agent.registration.url is not None
        row["outdated"] = _is_older(agent.registration.agent_version or "", self._version)
        row["preference"] = agent.settings.preference
        row["backup_seconds"] = agent.settings.backup_seconds
        row["loaded_models"] = self._loaded(agent)
        row["slots"] = self.slots(agent)
        sparklines = self._sampler.sparklines
        points = sparklines.agents.get(agent.id)
        row["sparkline"] = [sparklines.number, points[-1] if points else 0]
        return row

    def _loaded(self, agent: AgentState) -> list[Row]:
        """The models in memory with their learned speeds in tokens per second, largest first."""
        loaded = []
        for key, resident in agent.inventory.loaded.items():
            row = _row(resident.model)
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

    def slots(self, agent: AgentState) -> int:
        """How many requests it runs at once: learned for each loaded model, else as reported."""
        runner = agent.runner
        reported = (runner.num_parallel if runner else None) or 1
        learned = [self._estimates.get((agent.id, key)) for key in agent.inventory.loaded]
        return sum(estimate.slots if estimate else reported for estimate in learned) or reported

    def _estimate(self, now: float) -> None:
        """Read the estimates of loaded models only: there may be 100,000 models on disks."""
        if now - self._estimated_at < ESTIMATES_SECONDS:
            return
        self._estimated_at = now
        self._estimates = {
            (agent.id, key): found
            for agent in self._registry
            for key in agent.inventory.loaded
            if (found := self._dispatch.scheduler.estimate(agent.id, key)) is not None
        }

    # ── requests ──────────────────────────────────────────────────────────────────────────────

    def _request_rows(self, now: float) -> dict[str, Row]:
        views = self._journal.views(now, most=LIVE_SHOWN)
        return {view.id: self._request_row(view, now) for view in views}

    def _request_row(self, view: RequestView, now: float) -> Row:
        row = _row(view)
        for moving in ("elapsed_seconds", "tokens_per_second", "start_in_seconds"):
            row.pop(moving, None)
        if view.start_in_seconds is not None:
            # To the second: predictions move by milliseconds all the time.
            starts_at = self._clock.utc(now + view.start_in_seconds) + timedelta(milliseconds=500)
            row["starts_at"] = _iso(starts_at.replace(microsecond=0))
        return row

    def _finished_rows(self) -> dict[str, Row]:
        recent = self._journal.recent
        last = [recent[-1 - back].request for back in range(min(len(recent), FINISHED_SHOWN))]
        self._finished = {one.id: self._finished.get(one.id) or _row(one) for one in last}
        return self._finished


def _is_older(version: str, than: str) -> bool:
    """Whether a release is older, by its numbers; one that has none is not."""
    mine, other = ([*map(int, re.findall(r"\d+", text)), 0, 0][:3] for text in (version, than))
    return bool(re.match(r"\d", version)) and mine < other


def _row(value: Any) -> Row:
    return {key: part for key, part in msgspec.to_builtins(value).items() if part is not None}


def _concern_row(one: OpenConcern) -> Row:
    return {**_row(one.concern), "since": _iso(one.since)}


def _iso(at: datetime) -> str:
    return at.isoformat().replace("+00:00", "Z")
