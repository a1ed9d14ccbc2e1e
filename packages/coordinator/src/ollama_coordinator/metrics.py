"""`GET /metrics`: the coordinator's numbers in Prometheus' text format, made family by family.

Names follow Prometheus' rules (base units, `_seconds`, `_bytes`, `_ratio`, `_total`); the bounds of
the histograms are OpenTelemetry's for generative AI where it has some. Counts begin at the start of
the process, as Prometheus expects.
"""

from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from importlib.metadata import version
from itertools import accumulate, islice
from typing import NamedTuple, TypeVar

from prometheus_client import ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from .aio import Slices
from .attention import OpenConcern
from .journal import Histogram
from .parts import Parts
from .registry import AgentState
from .scheduler import Lane

PREFIX = "ollama_coordinator_"
CONTENT_TYPE = CONTENT_TYPE_LATEST

SLICE_SAMPLES = 500
"""Samples written at a time: two milliseconds of the event loop."""

Row = tuple[Sequence[str], float]
Key = TypeVar("Key")


class Metrics:
    """The text of `GET /metrics`."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._counters = parts.observation.sampler.counters
        self._process = ProcessCollector(registry=None)

    async def text(self) -> AsyncIterator[bytes]:
        """The whole text in pieces; other tasks run in between."""
        slices = Slices()
        for family in self._families():
            for piece in _pieces(family):
                yield piece
                await slices.pause()

    def _families(self) -> Iterator[Metric]:
        yield from self._of_requests()
        yield from self._of_keys()
        yield from self._of_models()
        agents = _labelled(self._parts.registry)
        yield from self._of_attempts(agents)
        yield from self._of_agents(agents)
        yield from self._of_machines(agents)
        yield from self._of_the_coordinator()
        yield from self._process.collect()

    # ── what was counted ──────────────────────────────────────────────────────────────────────

    def _of_requests(self) -> Iterator[Metric]:
        counted = self._counters
        rows = (((k.model, k.dialect, k.outcome), n) for k, n in _stable(counted.requests))
        labels = ("model", "dialect", "outcome")
        yield _counter("requests", "Requests that ended.", labels, rows)
        tokens = _stable(counted.tokens)
        yield _counter("tokens", "Tokens read and written.", ("model", "type"), tokens)
        yield _histograms(
            "queue_time_seconds",
            "Time from a request's arrival to the slot that served it.",
            "lane",
            list(counted.queue.items()),
        )
        yield _histograms(
            "prediction_error_seconds",
            "Predicted less real time of a stream's first byte, for models in memory.",
            "",
            [("", counted.prediction_error)],
        )

    def _of_keys(self) -> Iterator[Metric]:
        counts = list(self._parts.access.usage.counts.items())
        for name, text, of_key in (
            ("key_requests", "Inference requests of a key that were let in.",
             [(name, one.requests) for name, one in counts]),
            ("key_tokens", "Tokens read and written for a key.",
             [(name, one.tokens) for name, one in counts]),
            ("key_refusals", "Requests that a key's limits, rights or models did not allow.",
             [(name, one.refusals) for name, one in counts]),
        ):  # fmt: skip
            yield _counter(name, text, ("key",), (((key,), n) for key, n in of_key))

    def _of_models(self) -> Iterator[Metric]:
        models = list(self._counters.models.items())
        for name, text, figures in (
            (
                "time_to_first_token_seconds",
                "Time from a request's arrival to its first token.",
                [(name, one.first_token) for name, one in models],
            ),
            (
                "request_duration_seconds",
                "Time from a request's arrival to its end.",
                [(name, one.duration) for name, one in models],
            ),
            (
                "time_per_output_token_seconds",
                "Mean time per token of an answer, once it had begun.",
                [(name, one.per_token) for name, one in models],
            ),
            (
                "model_load_seconds",
                "Time to load a model into memory, as Ollama reports it.",
                [(name, one.load) for name, one in models],
            ),
        ):
            yield _histograms(name, text, "model", figures)

    def _of_attempts(self, agents: Sequence["_Labelled"]) -> Iterator[Metric]:
        counted = self._counters
        known = [(label, counted.agents.get(agent.id)) for label, agent in agents]
        busy = [(label, counts) for label, counts in known if counts is not None]
        loads: Iterable[Row] = (((label,), counts.loads) for label, counts in busy)
        yield _counter("model_loads", "Answers for which a model was loaded.", ("agent",), loads)
        for name, text, of, counters in (
            (
                "attempts",
                "Attempts by their results.",
                "result",
                [(x, c.attempts) for x, c in busy],
            ),
            ("agent_tokens", "Tokens read and written.", "type", [(x, c.tokens) for x, c in busy]),
        ):
            rows = (((label, key), n) for label, counter in counters for key, n in _stable(counter))
            yield _counter(name, text, ("agent", of), rows)
        retries = (((reason,), n) for reason, n in _stable(counted.retries))
        yield _counter("retries", "Attempts after another one failed.", ("reason",), retries)
        text = "Requests served by a runner with a larger context than they asked for."
        yield _counter("reloads_avoided", text, (), [((), counted.reloads_avoided)])

    # ── what is now ───────────────────────────────────────────────────────────────────────────

    def _of_agents(self, agents: Sequence["_Labelled"]) -> Iterator[Metric]:
        parts, of_agent = self._parts, ("agent",)
        standing, now = parts.observation.sampler.standing, parts.clock.now()
        states = Counter(standing[one.agent.id].state for one in agents if one.agent.id in standing)
        rows: Iterable[Row] = (((state,), number) for state, number in states.items())
        yield _gauge("agents", "Registered agents by state.", ("state",), rows)
        is_up = parts.registry.is_routable
        rows = (((one.label,), float(is_up(one.agent, now))) for one in agents)
        yield _gauge("agent_up", "1 where the agent gets requests.", of_agent, rows)
        in_flight = parts.scheduler.in_flight
        rows = (((one.label,), in_flight(one.agent.id)) for one in agents)
        yield _gauge("agent_in_flight", "Requests that the agent serves.", of_agent, rows)
        rows = (((one.label,), parts.snapshots.slots(one.agent)) for one in agents)
        yield _gauge("agent_slots", "Requests that the agent serves at once.", of_agent, rows)
        rows = (
            ((one.label, one.agent.id, one.agent.registration.ollama_version or ""), 1)
            for one in agents
        )
        text = "The agent's id and the version of its Ollama."
        yield _gauge("agent_info", text, ("agent", "agent_id", "ollama_version"), rows)
        rows = (
            ((row.model.name, one.label), row.model.size)
            for one in agents
            for row in list(one.agent.inventory.loaded.values())
        )
        text = "Memory that a loaded model takes on an agent."
        yield _gauge("model_memory_bytes", text, ("model", "agent"), rows)
        rows = (
            ((row.model.name, one.label), estimate.decode_tokens_per_second)
            for one in agents
            for key, row in list(one.agent.inventory.loaded.items())
            if (estimate := parts.scheduler.estimate(one.agent.id, key)) is not None
            and estimate.samples[1] > 0
        )
        text = "The learned speed at which an agent writes with a loaded model."
        yield _gauge("model_tokens_per_second", text, ("model", "agent"), rows)

    def _of_machines(self, agents: Sequence["_Labelled"]) -> Iterator[Metric]:
        reports = [(one.label, one.agent.report) for one in agents if one.agent.report is not None]
        for name, text, of_report in (
            ("agent_cpu_ratio", "Use of the machine's CPU.",
             [(label, report.cpu_usage / 100) for label, report in reports]),
            ("agent_memory_used_ratio", "Use of the machine's memory.",
             [(label, report.memory_usage / 100) for label, report in reports]),
            ("agent_memory_total_bytes", "The machine's memory.",
             [(label, report.memory_total_bytes) for label, report in reports]),
            ("agent_disk_free_bytes", "Free space where Ollama keeps its models.",
             [(label, report.disk_free_bytes) for label, report in reports]),
        ):  # fmt: skip
            rows = (((label,), value) for label, value in of_report if value is not None)
            yield _gauge(name, text, ("agent",), rows)
        gpus = [((label, str(gpu.index)), gpu) for label, report in reports for gpu in report.gpus]
        for name, text, of_gpu in (
            ("gpu_memory_used_bytes", "Memory in use on a GPU.",
             [(labels, gpu.memory_used_bytes) for labels, gpu in gpus]),
            ("gpu_memory_total_bytes", "A GPU's memory.",
             [(labels, gpu.memory_total_bytes) for labels, gpu in gpus]),
            ("gpu_utilization_ratio", "Use of a GPU.",
             [(labels, _ratio(gpu.utilization_percent)) for labels, gpu in gpus]),
            ("gpu_temperature_celsius", "A GPU's temperature.",
             [(labels, gpu.temperature_celsius) for labels, gpu in gpus]),
        ):  # fmt: skip
            known = ((labels, value) for labels, value in of_gpu if value is not None)
            yield _gauge(name, text, ("agent", "gpu"), known)

    def _of_the_coordinator(self) -> Iterator[Metric]:
        parts = self._parts
        needs = Counter(map(_need, parts.attention.open()))
        text = "What needs a person, as the coordinator's own list has it."
        yield _gauge("attention", text, ("kind", "severity", "subject"), list(needs.items()))
        lanes = Counter(
            one.request.lane for one in parts.observation.journal.live.values() if one.is_waiting()
        )
        rows: Iterable[Row] = (((lane.value,), lanes[lane]) for lane in Lane)
        yield _gauge("waiting_requests", "Requests without a slot.", ("lane",), rows)
        text = "How late the event loop last was; more than some milliseconds delays every stream."
        yield _gauge("event_loop_lag_seconds", text, (), [((), parts.clock.lag)])
        served = parts.connections
        rows = [] if served is None else [((), served.open)]
        yield _gauge("open_connections", "Connections of clients and of agents' links.", (), rows)
        problem = float(parts.store.problem is not None)
        yield _gauge("database_problem", "1 while the database fails.", (), [((), problem)])
        labels = (version("ollama-coordinator"), parts.scheduler.policy)
        text = "The coordinator's version and policy."
        yield _gauge("build_info", text, ("version", "policy"), [(labels, 1)])


class _Labelled(NamedTuple):
    """An agent and its label: its name, with a part of its id where two have one name."""

    label: str
    agent: AgentState


def _need(one: OpenConcern) -> tuple[str, str, str]:
    """Its labels; the name of who wants to join is any stranger's choice, and no label."""
    concern = one.concern
    subject = "" if concern.kind == "join" else concern.subject
    return concern.kind, concern.severity.value, subject


def _labelled(agents: Iterable[AgentState]) -> list[_Labelled]:
    agents = list(agents)
    names = Counter(agent.called for agent in agents)
    return [
        _Labelled(one.called if names[one.called] == 1 else f"{one.called} ({one.id[:8]})", one)
        for one in agents
    ]


def _ratio(percent: float | None) -> float | None:
    return None if percent is None else percent / 100


def _stable(counter: Counter[Key]) -> list[tuple[Key, int]]:
    """The counts of this moment: requests go on while a family is written."""
    return list(counter.items())


# ── families ──────────────────────────────────────────────────────────────────────────────────


def _counter(name: str, text: str, labels: Sequence[str], rows: Iterable[Row]) -> Metric:
    family = CounterMetricFamily(PREFIX + name, text, labels=labels)
    for values, number in rows:
        family.add_metric(values, number)
    return family


def _gauge(name: str, text: str, labels: Sequence[str], rows: Iterable[Row]) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, text, labels=labels)
    for values, number in rows:
        family.add_metric(values, number)
    return family


def _histograms(
    name: str, text: str, label: str, histograms: Sequence[tuple[str, Histogram]]
) -> Metric:
    family = HistogramMetricFamily(PREFIX + name, text, labels=[label] if label else [])
    for value, one in histograms:
        bounds = [*map(repr, one.bounds), "+Inf"]
        within = list(zip(bounds, accumulate(one.counts), strict=True))
        family.add_metric([value] if label else [], within, one.sum)
    return family


class _One(Collector):
    """A part of a family, as `generate_latest` takes it."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterable[Metric]:
        """That part."""
        yield self._family


def _pieces(family: Metric) -> Iterator[bytes]:
    """The lines of a family, `SLICE_SAMPLES` at a time; those about it come first and once."""
    samples = iter(family.samples)
    is_first = True
    while (part := list(islice(samples, SLICE_SAMPLES))) or is_first:
        one = Metric(family.name, family.documentation, family.type)
        one.samples = part
        lines = generate_latest(_One(one))
        if not is_first:
            lines = b"".join(x for x in lines.splitlines(keepends=True) if not x.startswith(b"# "))
        yield lines
        is_first = False
