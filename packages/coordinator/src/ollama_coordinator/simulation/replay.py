"""A trace played through a scheduler's own code on a simulated fleet."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from heapq import heappop, heappush
from itertools import count

import msgspec

from ollama_coordinator.registry import AgentState, Registry
from ollama_coordinator.scheduler import (
    Lease,
    LeaseId,
    Outcome,
    Request,
    RequestId,
    Result,
    Scheduler,
    SchedulerError,
    Timings,
)
from ollama_coordinator.scheduler.types import normal
from ollama_coordinator_common.protocol import RegisterRequest
from ollama_coordinator_common.types import AgentId

from .machine import Fleet, MachineSpec
from .node import Job, Node, health_report
from .summary import CLIENT_TIMEOUT_SECONDS, Record, Replay
from .trace import TraceRequest

AGENT_TIMEOUT_SECONDS = 60.0  # the setting's default

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
# A replay ends so long after its last arrival at the latest: what runs then never ends.
AFTERWARDS_SECONDS = 600.0

LOOK_SECONDS = 0.5  # how often requests are looked at that may be taken back, as by the monitor

NOWHERE = "invalid"  # RFC 2606: a domain of nothing


Event = Callable[[float], object]


class Simulation:
    """The events of a replay: arrivals, node events, reports, outages, the scheduler's wake-ups."""

    def __init__(self, fleet: Fleet, create: Callable[[Registry], Scheduler]) -> None:
        self.fleet = fleet
        self.registry = Registry(AGENT_TIMEOUT_SECONDS)
        self.nodes = {AgentId(spec.name): Node(spec) for spec in fleet.machines}
        self.down: set[AgentId] = set()
        self.scheduler = create(self.registry)
        self.records: dict[RequestId, Record] = {}
        self.now = 0.0
        self.most_in_flight = 0
        self._events: list[tuple[float, int, Event]] = []
        self._numbers = count()
        self._node_at: dict[AgentId, float] = {}
        self._wake: float | None = None
        self._looks = False
        self._leases: dict[LeaseId, tuple[Lease, Job, Record]] = {}
        self._jobs: dict[int, LeaseId] = {}
        self._requests: dict[RequestId, Request] = {}
        self._stop_at = 0.0
        for index, spec in enumerate(fleet.machines):
            self._register(spec, fleet.report_seconds * index / len(fleet.machines))
        for outage in fleet.outages:
            self.at(outage.at, partial(self.crash, outage.machine))
            self.at(outage.at + outage.seconds, partial(self.come_back, outage.machine))

    # ── the clock ─────────────────────────────────────────────────────────────────────────────

    def at(self, time: float, event: Event) -> None:
        """Something will happen."""
        heappush(self._events, (max(time, self.now), next(self._numbers), event))

    def run(self, trace: Sequence[TraceRequest]) -> Replay:
        """Play the whole trace, and on until everything has ended."""
        last = trace[-1].at if trace else 0.0
        for number, request in enumerate(trace):
            self.at(request.at, partial(self.arrive, number, request))
        self.run_until(last)
        while self.records_open() and self.now < last + AFTERWARDS_SECONDS:
            self.run_until(self.now + 5.0)
        return self.result(last)

    def records_open(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self._requests or self._leases)

    def result(self, seconds: float) -> Replay:
        """What was seen so far."""
        return Replay(
            records=sorted(self.records.values(), key=lambda record: record.number),
            loads=sum(node.loads for node in self.nodes.values()),
            seconds=max(seconds, 1e-9),
            busy_seconds=sum(node.busy_seconds for node in self.nodes.values()),
            most_in_flight=self.most_in_flight,
        )

    def run_until(self, end: float) -> None:
        """Let everything happen until this time."""
        self._stop_at = end
        while self._events and self._events[0][0] <= end:
            self.now, _, event = heappop(self._events)
            event(self.now)
        self.now = end

    def _watch(self, agent_id: AgentId) -> None:
        """Be there when the node's next event is due."""
        due = self.nodes[agent_id].next_event()
        if due == float("inf") or self._node_at.get(agent_id) == due:
            return
        self._node_at[agent_id] = due
        self.at(due, lambda now: self._node_event(agent_id, due, now))

    def _node_event(self, agent_id: AgentId, due: float, now: float) -> None:
        if self._node_at.get(agent_id) != due:
            return
        del self._node_at[agent_id]
        self.nodes[agent_id].advance(now)
        if self._collect(agent_id, now):
            self._plan(now)
        self._watch(agent_id)

    # ── requests ──────────────────────────────────────────────────────────────────────────────

    def arrive(self, number: int, traced: TraceRequest, now: float) -> Record:
        """A client sends a request."""
        request_id = RequestId(str(number))
        record = self.records[request_id] = Record(request=traced, number=number)
        request = msgspec.structs.replace(traced.arrive(request_id), arrived_at=now)
        self._submit(request, now)
        self.at(now + CLIENT_TIMEOUT_SECONDS, lambda late: self.leave(request_id, late))
        self._plan(now)
        return record

    def _submit(self, request: Request, now: float) -> None:
        try:
            self.scheduler.submit(request, now)
        except SchedulerError as error:
            self.records[request.id].error = str(error)
            self._requests.pop(request.id, None)
        else:
            self._requests[request.id] = request

    def leave(self, request_id: RequestId, now: float) -> None:
        """The client has had enough, unless it has its first token."""
        record = self.records[request_id]
        if record.first_token_at is not None or record.error is not None:
            return
        record.left = True
        if self._requests.pop(request_id, None) is not None:
            self.scheduler.withdraw(request_id, now)
        for lease, job, owner in list(self._leases.values()):
            if owner is record:
                self.nodes[lease.agent_id].cancel(job, now)
                self._end(lease.id, Outcome(Result.CANCELLED), now)
                self._watch(lease.agent_id)
        self._plan(now)

    def _plan(self, now: float) -> None:
        plan = self.scheduler.plan(now)
        for request_id, error in plan.refused:
            self.records[request_id].error = str(error)
            self._requests.pop(request_id, None)
        for lease in plan.granted:
            self._send(lease, now)
        self.most_in_flight = max(self.most_in_flight, len(self._leases))
        if self._leases and not self._looks:
            self._looks = True
            self.at(now + LOOK_SECONDS, self._look)
        wake = self.scheduler.wake_at(now)
        if wake is not None and (self._wake is None or wake < self._wake or self._wake <= now):
            self._wake = max(wake, now + 1e-6)
            self.at(self._wake, self._woken)

    def _woken(self, now: float) -> None:
        if self._wake is not None and now >= self._wake:
            self._wake = None
            self._plan(now)

    def _look(self, now: float) -> None:
        """Requests without a token are taken back from where others serve them sooner."""
        self._looks = False
        for lease_id, _ in self.scheduler.take_back(now):
            lease, job, _ = self._leases[lease_id]
            self.nodes[lease.agent_id].cancel(job, now)
            self._end(lease_id, Outcome(Result.TAKEN_BACK), now)
            self._watch(lease.agent_id)
            request = lease.request.taken_from(lease.agent_id)
            self._submit(msgspec.structs.replace(request, admitted=True), now)
        if self._leases or self._requests:
            self._plan(now)

    def _send(self, lease: Lease, now: float) -> None:
        record = self.records[lease.request.id]
        self._requests.pop(lease.request.id, None)
        record.agent, record.granted_at = lease.agent_id, now
        record.attempts += 1
        job = Job(next(self._numbers), record.request, now, normal(lease.request.options))
        self._leases[lease.id] = (lease, job, record)
        self._jobs[job.number] = lease.id
        if lease.agent_id in self.down:
            self.at(now + 0.01, lambda later: self._unreachable(lease.id, later))
            return
        node = self.nodes[lease.agent_id]
        agent = self.registry.get(lease.agent_id)
        for key in lease.unload:
            node.unload(key, now)
            self.registry.note_unloaded(agent, key)
        node.send(lease.request.model, job, now)
        self._collect(lease.agent_id, now)
        self._watch(lease.agent_id)

    def _collect(self, agent_id: AgentId, now: float) -> bool:
        """Report first tokens and ends to the scheduler; whether there were any."""
        jobs = self.nodes[agent_id].happened()
        for job in jobs:
            lease_id = self._jobs.get(job.number)
            if lease_id is None:
                continue
            lease, _, record = self._leases[lease_id]
            if record.first_token_at is None and job.first_token_at is not None:
                record.first_token_at = job.first_token_at
                self.scheduler.began(lease_id, now)
            if job.ended_at is not None:
                record.ended_at, record.lag = job.ended_at, job.lag
                self.registry.succeeded(self.registry.get(agent_id), lease.request.model)
                self._end(lease_id, Outcome(Result.SERVED, timings=self._timings(lease, job)), now)
        return bool(jobs)

    def _end(self, lease_id: LeaseId, outcome: Outcome, now: float) -> None:
        _, job, _ = self._leases.pop(lease_id)
        del self._jobs[job.number]
        self.scheduler.end(lease_id, outcome, now)

    def _timings(self, lease: Lease, job: Job) -> Timings:
        """What the node reports, falsified where that is to be tried."""
        factor = self.fleet.timing_factors.get(f"{lease.agent_id} {lease.request.model}", 1.0)
        sent, ready = job.sent_at, job.ready_at or job.sent_at
        started, ended = job.started_at or ready, job.ended_at or ready
        first = job.first_token_at or started
        return Timings(
            prompt_tokens=job.request.prompt_tokens,
            output_tokens=job.request.output_tokens,
            total_seconds=(ended - sent) * factor,
            load_seconds=(ready - sent) * factor,
            prompt_seconds=(first - started) * factor,
            output_seconds=(ended - first) * factor,
        )

    # ── agents ────────────────────────────────────────────────────────────────────────────────

    def _register(self, spec: MachineSpec, first_report: float) -> None:
        request = RegisterRequest(spec.name, f"m{len(self.registry)}.{NOWHERE}", "0.12.0", 11434)
        self.registry.register(request, AgentId(spec.name), EPOCH, self.now)
        self._report(AgentId(spec.name), self.now)
        self.at(self.now + first_report, lambda now: self._heartbeat(AgentId(spec.name), now))

    def _heartbeat(self, agent_id: AgentId, now: float) -> None:
        if agent_id not in self.down:
            self._report(agent_id, now)
            self._plan(now)
        self.at(now + self.fleet.report_seconds, lambda later: self._heartbeat(agent_id, later))

    def _report(self, agent_id: AgentId, now: float) -> None:
        node = self.nodes[agent_id]
        node.advance(now)
        self.registry.heartbeat(health_report(node), now)
        self.scheduler.reported(agent_id, now)

    def crash(self, name: str, now: float) -> None:
        """The machine is gone: what ran there fails, before or after its first token."""
        agent_id = AgentId(name)
        self.down.add(agent_id)
        self.nodes[agent_id].crash(now)
        self._node_at.pop(agent_id, None)
        for lease, _, _ in list(self._leases.values()):
            if lease.agent_id == agent_id:
                self._unreachable(lease.id, now)
        self._plan(now)

    def _unreachable(self, lease_id: LeaseId, now: float) -> None:
        if lease_id not in self._leases:
            return
        lease, _, record = self._leases[lease_id]
        agent = self.registry.get(lease.agent_id)
        self.registry.fail(agent, "connection refused", now)
        self._end(lease_id, Outcome(Result.UNREACHABLE), now)
        if record.first_token_at is not None:
            record.error = "cut"
        elif not record.left:
            self._submit(lease.request.without([lease.agent_id]), now)
        self._plan(now)

    def come_back(self, name: str, now: float) -> None:
        """The machine is up again; the next probe finds it."""
        agent_id = AgentId(name)
        self.down.discard(agent_id)
        self.at(now + self.fleet.probe_seconds, lambda later: self._probe(agent_id, later))

    def _probe(self, agent_id: AgentId, now: float) -> None:
        agent: AgentState = self.registry.get(agent_id)
        self.registry.probed(agent)
        self._report(agent_id, now)
        self._plan(now)
