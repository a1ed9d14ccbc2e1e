"""Samples the fleet once a second: tokens, queues, readings of machines, states of agents.

It also writes finished requests and statistics to the database, so that no request waits for that.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Container, Iterable, Mapping

from msgspec import Struct
from msgspec.json import encode

from ollama_coordinator.db import Finished, History, StoredBucket, Used
from ollama_coordinator.dispatch import Dispatch
from ollama_coordinator.registry import AgentState
from ollama_coordinator_common.settings import USAGE_CHOICES
from ollama_coordinator_common.types import AgentId, AgentStatus

from .counters import Counters
from .entry import Ended, JournalEntry
from .speeds import Speeds
from .statistics import FLEET, Bucket, Series

log = logging.getLogger(__name__)

PEOPLE, _, OFF = USAGE_CHOICES

SAMPLE_SECONDS = 1.0
"""Every stretch of statistics (10 s at least) has some samples."""

AGENTS_WRITTEN_SECONDS = 60.0
"""How often agents' statistics are written: a thousand agents have thousands of rows."""


class Standing(Struct, frozen=True):
    """An agent's state and since when (monotonic seconds)."""

    state: str
    since: float


class Sampler:
    """`run` is its loop; `standing` and `sparklines` are shown on the dashboard.

    `counters` are what `GET /metrics` shows of the requests that ended, `speeds` how fast models
    write now. `usage` is the value of `COORDINATOR_USAGE`.
    """

    def __init__(self, dispatch: Dispatch, history: History) -> None:
        self._dispatch = dispatch
        self._registry = dispatch.registry
        self._clock = dispatch.clock
        self._history = history
        self._tokens: dict[str, int] = {}
        self._agents_written_at = float("-inf")
        self.usage = OFF
        self.series = Series()
        self.standing: dict[AgentId, Standing] = {}
        self.sparklines = Sparklines()
        self.counters = Counters()
        self.speeds = Speeds()

    async def run(self, live: Mapping[str, JournalEntry]) -> None:
        """Sample until cancelled; `live` are the requests in progress."""
        while True:
            try:
                self.sample(live)
                await self.write()
            except Exception:
                log.exception("the sampler failed and goes on")
            await asyncio.sleep(SAMPLE_SECONDS)

    # ── counting ──────────────────────────────────────────────────────────────────────────────

    def finished(self, entry: JournalEntry, ended: Ended) -> None:
        """A request ended."""
        request = ended.request
        left = (request.output_tokens or 0) - entry.passed_on - entry.counted
        used = self._used(entry, request)
        self._history.note(request, ended.attempts, used, stepped_by=self._clock.stepped_by)
        self.counters.count(entry, request)
        self.speeds.ended(entry, self._clock.now())
        for name in (FLEET, request.agent_id) if request.agent_id else (FLEET,):
            self._wrote(name, left).count(request)

    def _used(self, entry: JournalEntry, request: Finished) -> Used | None:
        """What a request used; `None`: nothing, or nothing is to be kept of it."""
        if self.usage == OFF or not request.attempts:
            return None
        return Used(
            day=request.finished_at.date().isoformat(),
            person=request.client if self.usage == PEOPLE else "",
            key=entry.request.key,
            model=request.model,
            requests=1,
            prompt_tokens=request.prompt_tokens or 0,
            output_tokens=request.output_tokens or 0,
            gpu_seconds=entry.gpu_seconds,
        )

    def sample(self, live: Mapping[str, JournalEntry]) -> None:
        """Take one sample; `live` are the requests in progress."""
        now = self._clock.now()
        for entry in live.values():
            self.count(entry)
        self.speeds.sample(live.values(), now)
        in_flight = len(list(self._dispatch.held()))
        waiting = sum(entry.is_waiting() for entry in live.values())
        self.series.fresh(FLEET).sample(waiting, in_flight)
        for agent in self._registry:
            self._look(agent, now)
        self._forget()
        if self.sparklines.is_due(self._at()):
            self._take_point()

    def count(self, entry: JournalEntry) -> None:
        """Count what the attempt in progress has written since the last time."""
        held = entry.held
        if held is None or held.passed_on:
            return
        if held.records > entry.counted:
            for name in (FLEET, held.agent.id):
                self._wrote(name, held.records - entry.counted)
            entry.counted = held.records

    def _wrote(self, name: str, tokens: int) -> Bucket:
        self._tokens[name] = self._tokens.get(name, 0) + tokens
        bucket = self.series.fresh(name)
        bucket.output_tokens += tokens
        return bucket

    def _take_point(self) -> None:
        """The next point of the sparklines, and the agents' readings."""
        tokens, self._tokens = self._tokens, {}
        known = [agent.id for agent in self._registry]
        self.sparklines.take(self._at(), tokens.pop(FLEET, 0), tokens, known)
        for agent in self._registry:
            if self._registry.is_online(agent, self._clock.now()):
                bucket = self.series.fresh(agent.id)
                bucket.sample(0, self._dispatch.scheduler.in_flight(agent.id))
                _read(bucket, agent)
                _read(self.series.fresh(FLEET), agent)

    def _look(self, agent: AgentState, now: float) -> None:
        state = state_of(agent, now, self._registry.agent_timeout)
        known = self.standing.get(agent.id)
        if known is None or known.state != state:
            was_away = state == AgentStatus.OFFLINE.value
            self.standing[agent.id] = Standing(state, agent.heard_at if was_away else now)

    def _forget(self) -> None:
        known = {*self.standing, *self.counters.agents}
        for agent_id in [one for one in known if self._registry.find(one) is None]:
            self.standing.pop(agent_id, None)
            self.counters.agents.pop(agent_id, None)
            self.sparklines.forget(agent_id)
            self._tokens.pop(agent_id, None)
            self.speeds.forget(agent_id)
            self.series.forget(agent_id)

    # ── over a restart ────────────────────────────────────────────────────────────────────────

    def export_state(self) -> "SavedSparklines":
        """The sparklines."""
        return self.sparklines.export()

    def import_state(self, saved: "SavedSparklines") -> None:
        """Continue the sparklines of an earlier process, of the agents that are still known."""
        self.sparklines.restore(saved, self._at(), {agent.id for agent in self._registry})

    # ── writing behind ────────────────────────────────────────────────────────────────────────

    async def write(self, *, everything: bool = False) -> None:
        """Write what is new to the database; what cannot be written is tried again next time."""
        now = self._clock.now()
        due = everything or now - self._agents_written_at >= AGENTS_WRITTEN_SECONDS
        if due:
            self._agents_written_at = now
        self.series.fold(self._at())
        rows = self.series.take_changed(fleet_only=not due)
        stored = [StoredBucket(r.tier, r.start, r.name, encode(r.bucket)) for r in rows]
        written = False
        try:
            written = await self._history.write(stored)
        finally:
            if not written:
                self.series.put_back(rows)

    def _at(self) -> float:
        return self._clock.utc(self._clock.now()).timestamp()


def state_of(agent: AgentState, now: float, timeout: float) -> str:
    """Its status, `resting` where it is online but out of rotation, `paused` where it drains by
    itself, `asleep` where it is offline as machines that sleep are.
    """
    status = agent.status(now, timeout)
    if status is AgentStatus.DRAINING and not agent.settings.draining:
        return "paused"
    if status is AgentStatus.OFFLINE and agent.asleep:
        return "asleep"
    if status is AgentStatus.ONLINE and agent.out_of_rotation() is not None:
        return "resting"
    return str(status.value)


def _read(bucket: Bucket, agent: AgentState) -> None:
    """Add the readings of the agent's last heartbeat."""
    report = agent.report
    if report is None:
        return
    bucket.readings += 1
    bucket.cpu_sum += report.cpu_usage
    bucket.memory_sum += report.memory_usage
    for gpu in report.gpus:
        bucket.hottest = max(bucket.hottest, gpu.temperature_celsius or 0.0)
        if gpu.memory_total_bytes:
            bucket.gpu_readings += 1
            bucket.gpu_sum += gpu.utilization_percent or 0.0
            bucket.vram_sum += 100 * (gpu.memory_used_bytes or 0) / gpu.memory_total_bytes


POINT_SECONDS = 5
"""The length of one point: shorter ones would show single records, longer ones come late."""

POINTS = 60
"""Five minutes, as many as a small chart has pixels for."""


class SavedSparklines(Struct, frozen=True):
    """Sparklines across a restart; `number` is that of the newest point.

    Agents that wrote nothing are left out.
    """

    number: int = 0
    fleet: list[float] = []
    agents: dict[AgentId, list[float]] = {}


class Sparklines:
    """Tokens per second in the last minutes, of the fleet and each agent; the newest point last.

    `number` counts points since the Unix epoch.
    """

    def __init__(self) -> None:
        self.number = 0
        self.fleet: deque[float] = deque(maxlen=POINTS)
        self.agents: dict[AgentId, deque[float]] = {}

    def is_due(self, at: float) -> bool:
        """Whether a point ends at this moment (Unix seconds)."""
        return _number(at) != self.number

    def take(
        self, at: float, tokens: int, of_agents: Mapping[str, int], known: Iterable[AgentId]
    ) -> None:
        """Add a point from the tokens since the last one; `known` agents without any get zero."""
        self.number = _number(at)
        # A fifth of a count has one decimal at most: no rounding is needed.
        self.fleet.append(max(tokens, 0) / POINT_SECONDS)
        for agent_id in known:
            points = self.agents.setdefault(agent_id, deque(maxlen=POINTS))
            points.append(max(of_agents.get(agent_id, 0), 0) / POINT_SECONDS)

    def forget(self, agent_id: AgentId) -> None:
        """The agent was removed."""
        self.agents.pop(agent_id, None)

    def export(self) -> SavedSparklines:
        """What to keep over a restart."""
        agents = {key: list(points) for key, points in self.agents.items() if any(points)}
        return SavedSparklines(self.number, list(self.fleet), agents)

    def restore(self, kept: SavedSparklines, at: float, known: Container[AgentId]) -> None:
        """Continue an earlier process's points; between, nothing was written.

        Agents that are not known any more are left out.
        """
        self.number = _number(at)
        missed = self.number - kept.number
        if not 0 <= missed < POINTS:
            return
        gap = [0.0] * missed
        self.fleet.extend([*kept.fleet, *gap])
        for agent_id, points in kept.agents.items():
            if agent_id in known:
                self.agents[agent_id] = deque([*points, *gap], POINTS)


def _number(at: float) -> int:
    return int(at // POINT_SECONDS)
