"""Policies that count and do not predict, and the scheduler that asks them.

A policy picks an agent as soon as one of the eligible has a slot. A request waits only while every
eligible agent has as many leases of its model as it reported to run at once.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from math import exp, log

from ollama_coordinator.registry import AgentState, Registry
from ollama_coordinator_common.types import AgentId

from .eligibility import RECOVERY_SECONDS, eligible, makes_room, unavailable
from .error import QueueFull, SchedulerError
from .export import Learned
from .protocol import Plan, Scheduler, Waiting
from .rates import Mean
from .types import Form, Lease, LeaseId, Outcome, Request, RequestId

RETRY_AFTER_SECONDS = 1.0  # without a prediction: the least that `Retry-After` can say

SHORT_PROMPT_TOKENS = 200  # reading fewer takes as long as the overhead around it

InFlight = Callable[[AgentId], int]
Choose = Callable[[Sequence[AgentState], Request, InFlight], AgentState]
"""A policy: from the candidates (never empty, least recently chosen first), the request, and the
leases of an agent, it returns one of the candidates."""


def round_robin(agents: Sequence[AgentState], request: Request, in_flight: InFlight) -> AgentState:
    """Each agent in turn."""
    return agents[0]


class Random:
    """Any agent; the seed makes a run repeatable."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def __call__(
        self, agents: Sequence[AgentState], request: Request, in_flight: InFlight
    ) -> AgentState:
        """One of the candidates."""
        return self._random.choice(agents)


def least_connections(
    agents: Sequence[AgentState], request: Request, in_flight: InFlight
) -> AgentState:
    """The agent with the fewest leases, whatever it has in memory; equal agents take turns."""
    return min(agents, key=lambda agent: in_flight(agent.id))


def loaded_first(agents: Sequence[AgentState], request: Request, in_flight: InFlight) -> AgentState:
    """Agents that have the model in memory first, then as `least_connections`."""
    return min(
        agents,
        key=lambda agent: (not agent.inventory.is_loaded(request.model), in_flight(agent.id)),
    )


def cpu(agents: Sequence[AgentState], request: Request, in_flight: InFlight) -> AgentState:
    """The agent whose CPU and memory are used least; one without a report counts as idle."""
    return min(agents, key=_used_percent)


def _used_percent(agent: AgentState) -> float:
    report = agent.report
    return 0.0 if report is None else report.cpu_usage + report.memory_usage


RULES = {
    "loaded-first": "an agent with the model in memory, then the one with the fewest requests",
    "least-connections": "the agent with the fewest requests",
    "round-robin": "each agent in turn",
    "random": "any agent",
    "cpu": "the agent whose CPU and memory are used least",
}
"""What each policy decides by, among the agents that have a slot."""

FirstByteKey = tuple[AgentId, str, Form]

SHORTEST_FIRST_BYTE = 0.01
"""Seconds; a clock that did not move between two reads has no logarithm."""


def _kind(lease: Lease) -> FirstByteKey:
    """What has first bytes alike: an answer in one piece has its first byte at its end."""
    return lease.agent_id, lease.request.model, lease.request.form


def _work(lease: Lease) -> float:
    """First bytes of longer prompts come later; those of short ones take as long as any."""
    return max(lease.request.prompt_tokens, SHORT_PROMPT_TOKENS)


class CountingScheduler(Scheduler):
    """The scheduler of the policies that count; its methods are those of `Scheduler`."""

    def __init__(self, policy: str, registry: Registry, choose: Choose, *, max_queue: int) -> None:
        self.policy = policy
        self.rule = f"{policy}: {RULES[policy]}"
        self._registry = registry
        self._choose = choose
        self.max_queue = max_queue
        self._waiting: dict[RequestId, Request] = {}
        self._refused: list[tuple[RequestId, SchedulerError]] = []
        self._leases: dict[LeaseId, Lease] = {}
        self._by_agent: defaultdict[AgentId, set[LeaseId]] = defaultdict(set)
        self._last_id = 0
        self._warm: set[LeaseId] = set()
        self._began: dict[LeaseId, float] = {}
        self._first_bytes: dict[FirstByteKey, Mean] = {}
        self._token_seconds: dict[tuple[AgentId, str], Mean] = {}
        self._learned = Learned()
        self._last_chosen: dict[AgentId, int] = {}

    def submit(self, request: Request, now: float) -> None:
        found = eligible(self._registry, request, now, runs=self._runs)
        if not found.agents and not found.patience:
            raise unavailable(self._registry, request, found, now)
        can_start = any(self._has_slot(agent, request.model) for agent in found.agents)
        if len(self._waiting) >= self.max_queue and not (request.admitted or can_start):
            last = makes_room(list(self._waiting.values()), request.client)
            if last is None:
                raise QueueFull(RETRY_AFTER_SECONDS)
            del self._waiting[last.id]
            self._refused.append((last.id, QueueFull(RETRY_AFTER_SECONDS)))
        self._waiting[request.id] = request

    def withdraw(self, request_id: RequestId, now: float) -> None:
        self._waiting.pop(request_id, None)

    def began(self, lease_id: LeaseId, now: float) -> None:
        lease = self._leases.get(lease_id)
        if lease is not None:
            self._began[lease_id] = now
        if lease is not None and lease_id in self._warm:
            seen = self._first_bytes.setdefault(_kind(lease), Mean())
            seen.learn(log(max(now - lease.granted_at, SHORTEST_FIRST_BYTE) / _work(lease)))

    def end(self, lease_id: LeaseId, outcome: Outcome, now: float) -> None:
        lease = self._leases.pop(lease_id)
        self._warm.discard(lease_id)
        self._by_agent[lease.agent_id].discard(lease_id)
        began, timings = self._began.pop(lease_id, None), outcome.timings
        if timings is not None and timings.output_tokens > 1:
            written = timings.output_seconds
            if written is None and began is not None and lease.request.form is Form.STREAM:
                written = now - began
            if written:
                place = lease.agent_id, lease.request.model
                seen = self._token_seconds.setdefault(place, Mean())
                seen.learn(log(written / timings.output_tokens))

    def plan(self, now: float) -> Plan:
        granted: list[Lease] = []
        refused, self._refused = self._refused, []
        none_free: set[str] = set()  # models without a free slot, now and so in this plan
        for request in list(self._waiting.values()):
            usual = not (request.excluded or request.deadline)
            if usual and request.model in none_free:
                continue
            decided = self._decide(request, now)
            if usual and decided is None:
                none_free.add(request.model)
            if isinstance(decided, Lease):
                granted.append(decided)
            elif decided is not None:
                refused.append((request.id, decided))
            if decided is not None:
                del self._waiting[request.id]
        return Plan(granted, refused)

    def _decide(self, request: Request, now: float) -> Lease | SchedulerError | None:
        found = eligible(self._registry, request, now, runs=self._runs)
        free = [agent for agent in found.agents if self._has_slot(agent, request.model)]
        if free:
            free.sort(key=lambda agent: self._last_chosen.get(agent.id, 0))
            return self._grant(request, self._choose(free, request, self.in_flight), now)
        late = request.deadline is not None and now >= request.deadline
        waited = now - request.arrived_at
        hopeless = waited >= found.patience
        if late and found.agents:
            return QueueFull(RETRY_AFTER_SECONDS)
        if late or (not found.agents and hopeless):
            return unavailable(self._registry, request, found, now)
        return None

    def _has_slot(self, agent: AgentState, model: str) -> bool:
        runner = agent.runner
        if runner is None or runner.num_parallel is None:
            return True
        return self._running(agent.id, model) < runner.num_parallel

    def _running(self, agent_id: AgentId, model: str) -> int:
        leases = self._by_agent.get(agent_id, ())
        return sum(self._leases[lease].request.model == model for lease in leases)

    def _runs(self, agent_id: AgentId, model: str) -> bool:
        return self._running(agent_id, model) > 0

    def _grant(self, request: Request, agent: AgentState, now: float) -> Lease:
        lease_id = LeaseId(self._last_id + 1)
        lease = Lease(id=lease_id, request=request, agent_id=agent.id, granted_at=now)
        self._count(lease)
        if agent.inventory.is_loaded(request.model):
            self._warm.add(lease_id)
        return lease

    def adopt(self, lease: Lease, now: float) -> bool:
        if self._registry.find(lease.agent_id) is None:
            return False
        self._count(lease)
        return True

    def _count(self, lease: Lease) -> None:
        self._last_id = max(self._last_id, lease.id)
        self._leases[lease.id] = lease
        self._by_agent[lease.agent_id].add(lease.id)
        self._last_chosen[lease.agent_id] = lease.id

    def wake_at(self, now: float) -> float | None:
        times = [
            min(request.arrived_at + RECOVERY_SECONDS, request.deadline or float("inf"))
            for request in self._waiting.values()
        ]
        if self._registry.wake_seconds:
            waits = self._registry.wake_seconds
            times += [request.arrived_at + waits for request in self._waiting.values()]
        later = [time for time in times if time > now]
        return min(later, default=None)

    def first_byte_at(self, lease_id: LeaseId, *, longest: bool = False) -> float | None:
        lease = self._leases.get(lease_id)
        seen = self._first_bytes.get(_kind(lease)) if lease is not None else None
        if lease is None or seen is None:
            return None
        if longest and lease.request.form is not Form.STREAM:
            return None  # answers in one piece were seen whole: how long others get is not known
        return lease.granted_at + exp(seen.value) * _work(lease)

    def token_seconds(self, agent_id: AgentId, model: str) -> float | None:
        seen = self._token_seconds.get((agent_id, model))
        return None if seen is None else exp(seen.value)

    def is_full(self, agent_id: AgentId, model: str) -> bool:
        agent = self._registry.find(agent_id)
        return agent is not None and not self._has_slot(agent, model)

    def leases(self) -> Iterable[Lease]:
        return self._leases.values()

    def in_flight(self, agent_id: AgentId) -> int:
        return len(self._by_agent.get(agent_id, ()))

    def waiting(self, now: float) -> list[Waiting]:
        position: Counter[str] = Counter()
        waiting = []
        for request in self._waiting.values():
            position[request.model] += 1
            waiting.append(Waiting(request, position[request.model], None))
        return waiting

    def waiting_count(self) -> int:
        return len(self._waiting)

    def export_state(self) -> Learned:
        return self._learned

    def import_state(self, learned: Learned) -> None:
        self._learned = learned
