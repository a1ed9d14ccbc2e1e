"""The default scheduler: requests go where they are predicted to finish first, as late as can be.

An agent gets at most what it runs at once; all other requests wait here and are planned anew on
every event. `DESIGN.md` has the state, the order of events and the cost formula.
"""

from collections.abc import Iterable, Sequence
from operator import attrgetter, itemgetter

from ollama_coordinator.registry import Registry
from ollama_coordinator_common.types import AgentId

from . import observations
from .choose import Chooser
from .cost import first_byte_at, longest_output
from .eligibility import eligible, makes_room, unavailable
from .eviction import Drains, Evictions
from .explain import NO_TAG, Accounts, Decision, brief, explain
from .export import (
    Estimate,
    Learned,
    Prospect,
    estimate,
    estimates,
    export_learned,
    import_learned,
    prospect,
)
from .leases import Leases
from .prompt_cache import PromptCaches
from .protocol import Plan, Scheduler, Waiting
from .queue import Queue, QueueEntry, receiver_of
from .queues import Queues
from .rates import OutputLengths, Rates
from .serving import BOTH, HEAD, TAIL, Serving
from .slot_plan import SlotPlans, start_in
from .state import Machine, Place
from .sync import Machines
from .types import (
    NO_OPTIONS,
    Lease,
    LeaseId,
    Outcome,
    Request,
    RequestId,
    Result,
    RunnerOptions,
)

# How often all queues are looked at and drains predicted anew: a load takes 2 s or more.
TICK_SECONDS = 0.5
BRIEF_TOKENS = 50.0  # an answer is taken for late by this length until any was seen
QUEUES_LOOKED_AT_PER_SECOND = 40  # A tick looks at so many a second: each may cost 100 us


class PredictedScheduler(Scheduler):
    """The scheduler that predicts; its methods are those of `Scheduler`.

    `lengths` predict how long answers get.
    """

    policy = "predicted"

    def __init__(
        self,
        registry: Registry,
        *,
        max_queue: int,
        lengths: OutputLengths | None = None,
    ) -> None:
        self._registry = registry
        self.max_queue = max_queue
        self._rates, self._caches = Rates(), PromptCaches()
        self._lengths = lengths or OutputLengths()
        self._machines = Machines(registry, self._rates, self._caches)
        self._queues = Queues(registry, self._machines, self._lengths)
        evictions = Evictions(
            self._queues.demands, self._machines.replicas, self._queues.backlog, self._caches
        )
        self._plans = SlotPlans(self._caches)
        self._chooser = Chooser(self._plans, evictions)
        self._accounts = Accounts(self._chooser)
        self._leases = Leases(self._machines, self._queues)
        self._observer = observations.Observer(self._rates, self._lengths, self._caches)
        self._drains = Drains()
        self._serving = Serving(registry, self._queues, self._plans, self._chooser, self._leases)
        self._dirty: dict[Queue, int] = {}
        self._idle: dict[Machine, None] = {}
        self._tick_at = 0.0
        self._granted_at: float | None = None

    # ── events ──────────────────────────────────────────────────────────────────────────────────

    def submit(self, request: Request, now: float) -> None:
        self._sync(now)
        queue = self._queues.of_request(request, now)
        if request.excluded or not (queue.hot or queue.cold or queue.loading):
            found = eligible(self._registry, request, now)
            if not found.agents and not found.patience:
                raise unavailable(self._registry, request, found, now)
        is_full = len(self._serving.entries) >= self.max_queue
        if is_full and not (request.admitted or _can_start(queue)):
            self._make_room(request, now)
        queue.demand.count(now)
        self._serving.add(self._queues.entry(request, queue))
        self._look(queue, TAIL)

    def _make_room(self, request: Request, now: float) -> None:
        waiting = [entry.request for entry in self._serving.entries.values()]
        last = makes_room(waiting, request.client)
        if last is None:
            raise self._serving.full(now)
        entry = self._serving.entries[last.id]
        self._serving.refuse(entry, self._serving.full(now))
        self._look(entry.queue, BOTH)

    def _look(self, queue: Queue, part: int) -> None:
        self._dirty[queue] = self._dirty.get(queue, 0) | part

    def withdraw(self, request_id: RequestId, now: float) -> None:
        entry = self._serving.entries.get(request_id)
        if entry is not None:
            self._serving.give_up(entry)
            self._look(entry.queue, BOTH)

    def began(self, lease_id: LeaseId, now: float) -> None:
        known = self._leases.running.get(lease_id)
        if known is None:  # it ended in the same moment
            return
        self._repredict()
        run, queue = known
        place, slots = run.place, run.place.slots.limit
        observations.began(run, now)
        loaded = run.loads and place.loading_until is not None
        self._leases.answered(place)
        if loaded:
            self._leases.loaded(place, now)
            self._idle[place.machine] = None
        # A first byte by itself changes nothing for the requests that wait.
        if queue.size and (loaded or place.slots.limit != slots):
            self._look(queue, BOTH)

    def end(self, lease_id: LeaseId, outcome: Outcome, now: float) -> None:
        self._repredict()
        run, queue = self._leases.finish(lease_id, now)
        place, machine = run.place, run.place.machine
        served = outcome.result in (Result.SERVED, Result.ERRORED)
        if served or outcome.result in (Result.BUSY, Result.MODEL_FAILED):
            place.judged(now, failed=not served)
        observations.ended(run, outcome.result, outcome.timings, now)
        if served:
            self._leases.answered(place)
        if run.loads and place.loading_until is not None:
            if served:
                self._leases.loaded(place, now)
            else:
                self._leases.load_failed(place)
        if served:
            machine.succeeded(now)
            self._observer.served(run, outcome.timings, now)
            service = now - run.lease.granted_at - (place.load if run.loads else 0.0)
            place.served_for(max(service, 0.0))
        elif outcome.result in (Result.UNREACHABLE, Result.CUT):
            machine.failed(now)
        elif outcome.result in (Result.CANCELLED, Result.TAKEN_BACK):
            observations.abandoned(run, now)
        if self._serving.entries:
            self._freed(place, queue if served else None)
        else:
            self._leases.repredict(now)

    def reported(self, agent_id: AgentId, now: float) -> None:
        machine = self._machines.by_agent.get(agent_id)
        if machine is None:
            return
        residents = [place for place in machine.residents if place.resident]
        requests = machine.not_ours(now)
        for place in residents:
            place.owner.reported(requests, 1 / len(residents), now)

    def _freed(self, place: Place, queue: Queue | None) -> None:
        """A slot is free there; `queue` is that of a request that was served."""
        for freed in self._queues.of(place.names):
            if freed.size:
                self._look(freed, HEAD if freed is queue else BOTH)
        if not place.running:
            self._idle[place.machine] = None

    def adopt(self, lease: Lease, now: float) -> bool:
        self._sync(now)
        request = lease.request
        machine = self._machines.by_agent.get(lease.agent_id)
        place = machine.places.get(request.model) if machine is not None else None
        if place is None:
            return False
        queue = self._queues.of_lease(request, now)
        self._leases.adopt(queue, place, lease, self._queues.expected_output(request), now)
        return True

    # ── decisions ───────────────────────────────────────────────────────────────────────────────

    def plan(self, now: float) -> Plan:
        self._repredict()
        self._sync(now)
        self._advance(now)
        serving = self._serving
        if not serving.entries:
            self._dirty.clear()
            self._idle.clear()
            self._leases.repredict(now)
            return Plan()
        if now >= self._tick_at:
            self._tick(now)
        dirty, self._dirty = self._dirty, {}
        for queue in sorted(dirty, key=attrgetter("due")) if len(dirty) > 1 else dirty:
            serving.serve(queue, now, dirty[queue])
        while self._idle:
            serving.offer(self._idle.popitem()[0], now)
        if serving.deadlines:  # last: a request without time to wait may take what is free
            serving.expire(now)
        plan = Plan(tuple(serving.granted), tuple(serving.refused))
        serving.granted.clear()
        serving.refused.clear()
        if plan.granted:
            self._granted_at = now
        else:
            self._leases.repredict(now)
        return plan

    def _repredict(self) -> None:
        """Predict ends anew after grants, once these were accounted for."""
        if self._granted_at is not None:
            self._leases.repredict(self._granted_at)
            self._granted_at = None

    def take_back(self, now: float) -> Sequence[tuple[LeaseId, str]]:
        self._repredict()
        self._sync(now)
        self._advance(now)
        return self._serving.take_back(now)

    def _sync(self, now: float) -> None:
        concerned = self._machines.sync(now)
        if concerned is None:
            return
        for queue in self._queues.of(concerned):
            queue.stale()
            self._look(queue, BOTH)
        for machine in self._machines.by_agent.values():
            if machine.down_since == now:
                self._leases.lost(machine)

    def _advance(self, now: float) -> None:
        """Assume the end of loads that should be over, except for those found to be blocked."""
        leases = self._leases
        if not (leases.loads or leases.unconfirmed):
            return
        over = leases.assume_loaded(now)
        for place in over:
            self._idle[place.machine] = None
        for place in (*over, *leases.blocked_loads(now)):
            for queue in self._queues.of(place.names):
                self._look(queue, BOTH)

    def _tick(self, now: float) -> None:
        """Look again at queues that nothing happened to, and at models that starve."""
        self._tick_at = now + TICK_SECONDS
        for drain in self._drains.settle(now):
            self._idle[drain.place.machine] = None
        queues = self._queues.waiting()
        look_again = max(len(queues) / QUEUES_LOOKED_AT_PER_SECOND, TICK_SECONDS)
        for queue in queues:
            stranded = queue.retried or not (queue.hot or queue.cold or queue.loading)
            if stranded or now - queue.looked_at >= look_again:
                self._look(queue, BOTH)
            if (drained := self._drains.consider(queue, now)) is not None:
                self._queues.drained(drained.machine)

    # ── counts and reasons ──────────────────────────────────────────────────────────────────────

    def wake_at(self, now: float) -> float | None:
        if not self._serving.entries:
            return None
        wake_at = self._tick_at
        if self._leases.loads:
            wake_at = min(wake_at, self._leases.loads[0].loading_until or now)
        if self._serving.deadlines:
            wake_at = min(wake_at, self._serving.deadlines[0].at)
        return max(wake_at, now)

    def leases(self) -> Iterable[Lease]:
        return [run.lease for run, _ in self._leases.running.values()]

    def in_flight(self, agent_id: AgentId) -> int:
        return self._leases.by_agent.get(agent_id, 0)

    def waiting(self, now: float) -> list[Waiting]:
        self._repredict()
        in_order: list[tuple[float, Waiting]] = []
        for queue in self._queues.waiting():
            self._queues.refresh(queue, now)
            due = float("-inf")
            for position, entry in enumerate(queue.entries()):
                start = start_in(self._plans, queue, position, now)
                due = max(due, entry.due)  # after all that go before it in its own queue
                in_order.append((due, Waiting(entry.request, position + 1, start)))
        in_order.sort(key=itemgetter(0))
        return [waiting for _, waiting in in_order]

    def waiting_count(self) -> int:
        return len(self._serving.entries)

    def first_byte_at(self, lease_id: LeaseId, *, longest: bool = False) -> float | None:
        known = self._leases.running.get(lease_id)
        if known is None:
            return None
        run, _ = known
        request = run.lease.request
        if longest:
            most = longest_output(run)
            return None if most is None else first_byte_at(run, most)
        is_known = (request.model, request.form) in self._lengths.models
        return first_byte_at(run, run.output if is_known else min(run.output, BRIEF_TOKENS))

    def token_seconds(self, agent_id: AgentId, model: str) -> float | None:
        place = self._place(agent_id, model)
        return None if place is None else place.decode

    def is_full(self, agent_id: AgentId, model: str) -> bool:
        place = self._place(agent_id, model)
        return place is not None and len(place.running) >= place.slots.limit

    def runner_options(self, agent_id: AgentId, model: str) -> RunnerOptions:
        place = self._place(agent_id, model)
        return (place.options if place is not None else None) or NO_OPTIONS

    def _place(self, agent_id: AgentId, model: str) -> Place | None:
        machine = self._machines.by_agent.get(agent_id)
        return None if machine is None else machine.places.get(model)

    def decision(self, lease_id: LeaseId) -> Decision | None:
        known = self._leases.running.get(lease_id)
        if known is None:
            return None
        run, _ = known
        return None if run.adopted else brief(run)

    def account(self, lease_id: LeaseId) -> Decision | None:
        known = self._leases.running.get(lease_id)
        if known is None:
            return None
        run, queue = known
        return None if run.adopted else self._accounts.of(run, queue)

    def explain(self, request: Request, now: float) -> Decision:
        self._repredict()
        self._sync(now)
        queue = self._queues.of_request(request, now)
        receiver = receiver_of(request, self._queues.expected_output(request))
        entry = QueueEntry(request, NO_TAG, queue, receiver, 0.0)
        return explain(self._registry, self._chooser, entry, now)

    def estimates(self) -> list[Estimate]:
        return estimates(self._machines, self._rates)

    def estimate(self, agent_id: AgentId, model: str) -> Estimate | None:
        return estimate(self._machines, self._rates, agent_id, model)

    def prospect(
        self, agent_id: AgentId, model: str, size: int, beside: Iterable[str]
    ) -> Prospect | None:
        return prospect(self._machines, self._rates, agent_id, model, size, beside)

    def export_state(self) -> Learned:
        return export_learned(self._machines, self._rates, self._lengths)

    def import_state(self, learned: Learned) -> None:
        import_learned(learned, self._machines, self._rates, self._lengths)


def _can_start(queue: Queue) -> bool:
    """Whether a request of this queue would not have to wait, but perhaps for a load."""
    if queue.size:
        return False
    idle = (p.machine for p in queue.cold if p.machine.loading is None and not p.machine.running)
    return bool(queue.with_free_slot()) or any(idle)
