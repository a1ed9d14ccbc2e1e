"""Each fact of the fleet that needs a person, with what to do, derived from what is known now.

A concern's id stays the same as long as its fact does. `GRACE_SECONDS` is how long a fact must last
before it is one: machines restart and queues form every day.
"""

from collections.abc import Iterable, Iterator, Mapping
from enum import Enum

from msgspec import Struct

from ollama_coordinator.access import Access
from ollama_coordinator.aliases import Aliases
from ollama_coordinator.dispatch import Dispatch
from ollama_coordinator.journal import Observation, short_name
from ollama_coordinator.registry import AgentState
from ollama_coordinator_common.names import model_key
from ollama_coordinator_common.protocol import HEARTBEAT_SECONDS
from ollama_coordinator_common.types import AgentId

GIGABYTE = 1_000_000_000

LOW_DISK_BYTES = 10 * GIGABYTE
"""Less than most models people pull: the next pull may fail there."""

LONG_QUEUE = 50
"""Interactive requests that wait: more than a fleet of some machines serves within a minute."""

SLOW_RATIO = 3.0
"""A model that writes so much slower than its best has lost its GPU or its cooling, not a bit."""

MEASURED = 20
"""Answers before a learned speed counts as known: the first few vary by more than `SLOW_RATIO`."""


class Severity(Enum):
    """Critical: requests are not served. Warning: they may soon not be, or are slower."""

    CRITICAL = "critical"
    WARNING = "warning"
    NOTE = "note"


class Concern(Struct, frozen=True, omit_defaults=True):
    """One thing that needs a person: what is wrong and what to do, in `text`.

    `model` is the shortest name of the model that it is about.
    """

    id: str
    kind: str
    severity: Severity
    subject: str
    text: str
    agent_id: AgentId | None = None
    model: str | None = None


GRACE_SECONDS = {
    "fleet": 10.0, "out": 30.0, "model": 30.0, "queue": 60.0, "conflict": 60.0, "contents": 60.0,
    "stuck": 30.0,
}  # fmt: skip
"""By kind of concern; the other kinds are told at once. A speed is one of some time already."""

SILENT_SECONDS = 2.5 * HEARTBEAT_SECONDS
"""An agent that was not heard for so long has missed two heartbeats: its machine may be off."""


class Concerns:
    """Looks for concerns; remembers of each agent what it had at its best."""

    def __init__(
        self, dispatch: Dispatch, observation: Observation, access: Access, aliases: Aliases
    ) -> None:
        self._aliases = aliases
        self._access = access
        self._dispatch = dispatch
        self._registry = dispatch.registry
        self._journal = observation.journal
        self._counters = observation.sampler.counters
        self._speeds = observation.sampler.speeds
        self._store = observation.store
        self._gpus: dict[AgentId, int] = {}
        self._best: dict[tuple[AgentId, str], float] = {}

    def now(self, now: float, flapping: Mapping[AgentId, str]) -> Iterator[Concern]:
        """All facts of this moment (monotonic seconds); `flapping` says which agents come and go,
        and how.
        """
        agents = list(self._registry)
        if self._store.problem:
            text = f"{self._store.problem}. What is new is kept in memory until it works again."
            yield Concern("database", "database", Severity.CRITICAL, "Database", text)
        if self._access.notice:
            severity = Severity.WARNING if self._access.mode == "open" else Severity.NOTE
            yield Concern("access", "access", severity, "Access", self._access.notice)
        for asked in self._access.machines.requests():
            text = f"It wants to join, from {asked.address}, with the fingerprint"
            text += f" {asked.fingerprint}. Admit or refuse it on the Fleet page."
            name, severity = f"join:{asked.id}", Severity.NOTE
            yield Concern(name, "join", severity, asked.machine_name, text)
        if agents and not any(self._serves(agent, now) for agent in agents):
            text = "No machine gets requests. Start one, or see below why each is out."
            yield Concern("fleet", "fleet", Severity.CRITICAL, "Fleet", text)
        yield from self._of_the_queue()
        newest = max((_numbers(agent.registration.ollama_version) for agent in agents), default=())
        for agent in agents:
            yield from self._of_rotation(agent, now, flapping.get(agent.id))
            if self._registry.is_online(agent, now):
                yield from self._of_its_machine(agent, now)
                yield from self._of_its_models(agent, newest, now)
                if agent.id not in flapping and agent.out_of_rotation() is None:
                    yield from self._of_stuck_models(agent)
        yield from self._of_models(now)
        for alias in self._aliases:
            holders = self._registry.holders(model_key(alias.name))
            if holders:
                text = f"This alias is not in use: {_names(holders)} has a model of its name."
                text += " Delete one of the two."
                yield Concern(f"alias:{alias.name}", "alias", Severity.WARNING, alias.name, text)
        self._forget()

    def _serves(self, agent: AgentState, now: float) -> bool:
        """Whether it gets requests, or is woken for them."""
        wakes = self._registry.wake_seconds > 0 and agent.can_wake(now)
        return wakes or self._registry.is_routable(agent, now)

    def _of_the_queue(self) -> Iterator[Concern]:
        waiting = self._journal.waiting()
        if waiting >= LONG_QUEUE:
            text = f"{waiting} requests wait. Add a machine, or another copy of what they wait for."
            yield Concern("queue", "queue", Severity.WARNING, "Queue", text)

    def _of_rotation(
        self, agent: AgentState, now: float, flapping: str | None
    ) -> Iterator[Concern]:
        silent = now - agent.heard_at
        if flapping is not None:
            text = f"{flapping} Look at its events, its network and its power."
            yield _of(agent, "flapping", text)
        elif agent.left or agent.settings.draining or agent.paused or agent.asleep:
            return  # on purpose
        elif not self._registry.is_online(agent, now):
            text = f"Nothing was heard of it for {span(silent)}. Is it on, and its agent running?"
            yield _of(agent, "out", text)
        elif (reason := agent.out_of_rotation()) is not None:
            text = f"It gets no requests: {sentence(reason)}"
            if agent.report is not None and silent > SILENT_SECONDS:
                text += f" Nothing was heard of its agent either for {span(silent)}: is it on?"
            yield _of(agent, "out", text)

    def _of_its_machine(self, agent: AgentState, now: float) -> Iterator[Concern]:
        conflict = self._registry.conflict(agent, now)
        if conflict is not None:
            yield _of(agent, "conflict", conflict)
        report = agent.report
        if report is None:
            return
        if report.left_behind is not None:
            yield _of(agent, "left", f"{report.left_behind}.")
        free = report.disk_free_bytes
        if free is not None and free < LOW_DISK_BYTES:
            text = f"Its disk has {free / GIGABYTE:.1f} GB left. Remove a model, or make room."
            yield _of(agent, "disk", text)
        most = self._gpus[agent.id] = max(self._gpus.get(agent.id, 0), len(report.gpus))
        if len(report.gpus) < most:
            text = f"{most - len(report.gpus)} of its {most} GPUs cannot be seen any more."
            yield _of(agent, "gpu", f"{text} Look at its driver; a restart often helps.")

    def _of_its_models(
        self, agent: AgentState, newest: tuple[int, ...], now: float
    ) -> Iterator[Concern]:
        for name, fault in agent.inventory.broken.items():
            yield _of(agent, "broken", f"{name} cannot run there: {fault}. Pull it again.", name)
        version = _numbers(agent.registration.ollama_version)
        if version and version[:2] < newest[:2]:
            text = f"Its Ollama is {agent.registration.ollama_version}, others have"
            yield _of(
                agent, "version", f"{text} {'.'.join(map(str, newest))}.", severity=Severity.NOTE
            )
        for key in list(agent.inventory.loaded):
            yield from self._of_speed(agent, key, now)

    def _of_stuck_models(self, agent: AgentState) -> Iterator[Concern]:
        """Where the whole machine is out, that is the cause and not a model."""
        for key in agent.model_cooldowns:
            if agent.is_stuck(key):
                reason = sentence(agent.model_cooldowns[key].reason)
                name = short_name(key)
                yield _of(agent, "stuck", f"{name} hangs there: {reason}", name)

    def _of_speed(self, agent: AgentState, key: str, now: float) -> Iterator[Concern]:
        """What it wrote last is compared with the best that it ever was known to write.

        That is what was learned: a mean of many answers. It follows a change after several ones,
        and a machine that became slow is given few.
        """
        if (late := self._speeds.lateness(agent.id, key, now)) is not None:
            name = short_name(key)
            text = f"{late.requests} requests in a row for {name} got no answer there in time,"
            text += f" within {span(late.seconds)}, and went elsewhere."
            text += " Does it still run on the GPU, and does nothing else use it?"
            yield _of(agent, "slow", text, name)
            return
        recent = self._speeds.recent(agent.id, key, now)
        estimate = self._dispatch.scheduler.estimate(agent.id, key)
        is_known = estimate is not None and estimate.samples[1] >= MEASURED
        known = estimate.decode_tokens_per_second if estimate is not None and is_known else recent
        speed = known if recent is None else recent
        if known is None or speed is None:
            return
        best = self._best[agent.id, key] = max(self._best.get((agent.id, key), 0.0), known)
        if speed * SLOW_RATIO < best:
            name = short_name(key)
            text = f"{name} writes {speed:.0f} tokens/s there, once it was {best:.0f}."
            text += " Does it still run on the GPU, and is that cool?"
            yield _of(agent, "slow", text, name)

    def _of_models(self, now: float) -> Iterator[Concern]:
        """Models that were asked for: all holders out, or other contents under the name."""
        served = {model_key(name) for name in self._counters.models}
        for key in sorted(served | self._dispatch.wanted()):
            holders, name = self._registry.holders(key), short_name(key)
            if holders and not any(self._serves(agent, now) for agent in holders):
                names = _names(holders)
                text = f"No machine can serve it: {names} cannot be reached, is out or drains."
                yield _model("model", Severity.CRITICAL, key, text)
            strangers = [self._registry.get(one) for one in self._registry.models.strangers(key)]
            if strangers:
                text = f"{_names(strangers)} has another content under the name {name}, and gets"
                text += " no requests for it. Pull it again, or give it another name there."
                yield _model("contents", Severity.WARNING, key, text)

    def _forget(self) -> None:
        for agent_id in [one for one in self._gpus if self._registry.find(one) is None]:
            del self._gpus[agent_id]
        for pair in [pair for pair in self._best if self._registry.find(pair[0]) is None]:
            del self._best[pair]


def _of(
    agent: AgentState,
    kind: str,
    text: str,
    model: str | None = None,
    severity: Severity = Severity.WARNING,
) -> Concern:
    name = f"{kind}:{agent.id}" + (f":{model}" if model else "")
    return Concern(name, kind, severity, agent.name, text, agent.id, model)


def _model(kind: str, severity: Severity, key: str, text: str) -> Concern:
    name = short_name(key)
    return Concern(f"{kind}:{key}", kind, severity, name, text, model=name)


def _names(agents: Iterable[AgentState]) -> str:
    """Their names; the first five of more."""
    names = sorted(agent.name for agent in agents)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _numbers(version: str | None) -> tuple[int, ...]:
    """A version in numbers; of a pre-release those before its first letter."""
    found = []
    for part in (version or "").split("."):
        if not part.isdigit():
            break
        found.append(int(part))
    return tuple(found)


def span(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds // 60:.0f} minutes" if seconds < 7200 else f"{seconds // 3600:.0f} hours"


def sentence(reason: str) -> str:
    """A reason with a full stop, where it does not end as a sentence already."""
    return reason if reason.endswith((".", "?", "!")) else f"{reason}."
