"""What is counted since the start, for `GET /metrics`: requests, attempts, tokens, durations.

A request costs half a microsecond for each of its figures here; the text is made when it is asked
for. Histograms are by model alone: by model and agent they would be thousands of series.
"""

from bisect import bisect_left
from collections import Counter

from msgspec import Struct

from ollama_coordinator.db import Finished
from ollama_coordinator.scheduler import Result
from ollama_coordinator_common.types import AgentId

from .entry import JournalEntry

OTHER = "other"
"""The one series of all models that no agent has served: clients make up names at will."""

MOST_MODELS = 1000
"""Models with series of their own; further ones count as `OTHER`."""

SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    15.0, 30.0, 60.0, 120.0, 300.0,
)  # fmt: skip
"""Bounds of OpenTelemetry's `gen_ai.server.time_to_first_token`, and longer ones for loads."""

TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
"""Bounds of OpenTelemetry's `gen_ai.server.time_per_output_token`."""

ERROR_SECONDS = (-60.0, -10.0, -5.0, -2.0, -1.0, -0.5, -0.1, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 60.0)
"""Bounds of what a prediction was wrong by; below zero the token came later than predicted."""


class Histogram:
    """How many values are within each bound, in ascending order, and beyond the last; their sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class ModelFigures:
    """The histograms of one model, in seconds."""

    __slots__ = ("duration", "first_token", "load", "per_token")

    def __init__(self) -> None:
        self.first_token = Histogram(SECONDS)
        self.duration = Histogram(SECONDS)
        self.per_token = Histogram(TOKEN_SECONDS)
        self.load = Histogram(SECONDS)


class AgentCounts:
    """One agent's attempts by their results, tokens by type, and loads of models."""

    __slots__ = ("attempts", "loads", "tokens")

    def __init__(self) -> None:
        self.attempts: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self.loads = 0


class RequestLabels(Struct, frozen=True):
    """What requests are counted by; `outcome` is the status in the history."""

    model: str
    dialect: str
    outcome: str


class Counters:
    """All counts since the start; `agents` are by id, `tokens` by model and type."""

    def __init__(self) -> None:
        self.models: dict[str, ModelFigures] = {}
        self.requests: Counter[RequestLabels] = Counter()
        self.queue: dict[str, Histogram] = {}
        self.agents: dict[AgentId, AgentCounts] = {}
        self.retries: Counter[str] = Counter()
        self.tokens: Counter[tuple[str, str]] = Counter()
        self.prediction_error = Histogram(ERROR_SECONDS)
        self.reloads_avoided = 0

    def count(self, entry: JournalEntry, request: Finished) -> None:
        """A request ended."""
        model = self._name(entry, request.model)
        outcome = request.status.value
        self.requests[RequestLabels(model, dialect_of(request.path), outcome)] += 1
        self._attempts(entry)
        lane = entry.request.lane.value
        if lane not in self.queue:
            self.queue[lane] = Histogram(SECONDS)
        self.queue[lane].observe(request.waited_seconds)
        figures = self.models.get(model)
        if figures is None:
            return
        figures.duration.observe(request.total_seconds)
        if request.first_token_seconds is not None:
            figures.first_token.observe(request.first_token_seconds)
        if request.tokens_per_second:
            figures.per_token.observe(1 / request.tokens_per_second)
        self._tokens(model, request)
        self._last(entry, request, figures)

    def _agent(self, agent_id: AgentId) -> AgentCounts:
        found = self.agents.get(agent_id)
        if found is None:
            found = self.agents[agent_id] = AgentCounts()
        return found

    def _name(self, entry: JournalEntry, name: str) -> str:
        """The model's label: its name once an agent was asked for it."""
        if name not in self.models:
            if not entry.attempts or len(self.models) >= MOST_MODELS:
                return OTHER
            self.models[name] = ModelFigures()
        return name

    def _attempts(self, entry: JournalEntry) -> None:
        reason = None
        for attempt in entry.attempts:
            held = attempt.held
            result = held.outcome.result.value.replace(" ", "_")
            agent = self._agent(held.agent.id)
            agent.attempts[result] += 1
            if reason not in (None, Result.SERVED.value):
                self.retries[reason] += 1
            if attempt.loads and held.outcome.result is Result.SERVED:
                agent.loads += 1
            reason = result

    def _tokens(self, model: str, request: Finished) -> None:
        for kind, tokens in (("input", request.prompt_tokens), ("output", request.output_tokens)):
            if tokens:
                self.tokens[model, kind] += tokens
                if request.agent_id is not None:
                    self._agent(request.agent_id).tokens[kind] += tokens

    def _last(self, entry: JournalEntry, request: Finished, figures: ModelFigures) -> None:
        """What the last attempt shows, which gave the answer."""
        attempt = entry.attempts[-1] if entry.attempts else None
        if attempt is None or attempt.held.outcome.result is not Result.SERVED:
            return
        held = attempt.held
        if attempt.loads and request.load_seconds is not None:
            figures.load.observe(request.load_seconds)
        if attempt.first_byte_at is not None and held.records and held.began_at is not None:
            self.prediction_error.observe(attempt.first_byte_at - held.began_at)
        self.reloads_avoided += bool(held.note)


def dialect_of(path: str) -> str:
    """Whose shapes an inference route uses."""
    if not path.startswith("/v1/"):
        return "ollama"
    return "anthropic" if path == "/v1/messages" else "openai"
