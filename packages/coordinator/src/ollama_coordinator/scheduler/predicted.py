"""The default scheduler: requests go where they are predicted to finish first, as late as can be.

An agent gets at most what it runs at once; everybody else waits here and is planned anew on every
event. See `choice` for the estimate, `room` for evictions, `drains` for models that starve.
"""

from collections.abc import Iterable, Mapping

from ollama_coordinator.registry import Registry
from ollama_coordinator_common.types import AgentId

from . import lessons
from .affinity import PromptCaches
from .arrivals import Arrivals
from .choice import Chooser
from .drains import Drains
from .eligibility import eligible, unavailable
from .explain import Decision, brief
from .explaining import Accounts, explain
from .fleet import Machine
from .learning import Lengths, Rates
from .ledger import Ledger
from .line import Entry, Line
from .lines import Lines
from .mirror import Mirror
from .options import normal
from .protocol import Plan, Waiting
from .room import Rooms
from .serving import BOTH, HEAD, TAIL, Serving
from .state import Estimate, Learned, estimate, estimates, export_learned, import_learned
from .types import Lease, LeaseId, Outcome, Request, RequestId, Result
from .waits import start_in

TICK_SECONDS = 0.5
LINES_LOOKED_AT_PER_SECOND = 40
"""Lines that nothing happened to are looked at again only so often."""


class PredictedScheduler:
    """A `Scheduler` that predicts.

    `weights`: a client's share of a contended model where it is not 1. `lengths`: an own idea of
    how long answers get.
    """

    policy = "predicted"

    def __init__(
        self,
        registry: Registry,
        *,
        max_queue: int,
        weights: Mapping[str, float] | None = None,
        lengths: Lengths | None = None,
    ) -> None:
        self._registry = registry
        self.max_queue = max_queue
        self._rates, self._caches = Rates(), PromptCaches()
        self._lengths = lengths or Lengths()
        self._mirror = Mirror(registry, self._rates, self._caches)
        self._lines = Lines(self._mirror)
        self._arrivals = Arrivals(registry, self._lines, self._lengths, weights or {})
        rooms = Rooms(self._lines.demands, self._mirror.replicas, self._lines.backlog)
        self._chooser = Chooser(self._caches, rooms)
        self._accounts = Accounts(self._chooser)
        self._ledger = Ledger(self._mirror, self._lines)
        self._lessons = lessons.Lessons(self._rates, self._lengths, self._caches)
        self._drains = Drains()
        self._serving = Serving(registry, self._lines, self._chooser, self._ledger)
        self._dirty: dict[Line, int] = {}
        self._idle: dict[Machine, None] = {}
        self._tick_at = 0.0

    # ── what happens ──────────────────────────────────────────────────────────────────────────

    def submit(self, request: Request, now: float) -> None:
        """See `Scheduler.submit`."""
        self._sync(now)
        line = self._arrivals.line(request, now)
        if request.excluded or not (line.hot or line.cold or line.loading):
            found = eligible(self._registry, request, now)
            if not found.agents and not found.recovering:
                raise unavailable(self._registry, request, found, now)
        if len(self._serving.entries) >= self.max_queue and not _has_place(line):
            raise self._serving.full(now)
        line.demand.arrived(now)
        self._serving.add(self._arrivals.entry(request, line))
        self._look(line, TAIL)

    def _look(self, line: Line, part: int) -> None:
        self._dirty[line] = self._dirty.get(line, 0) | part

    def withdraw(self, request_id: RequestId, now: float) -> None:
        """See `Scheduler.withdraw`."""
        entry = self._serving.entries.get(request_id)
        if entry is not None:
            self._serving.give_up(entry)
            self._look(entry.line, BOTH)

    def began(self, lease_id: LeaseId, now: float) -> None:
        """See `Scheduler.began`."""
        known = self._ledger.running.get(lease_id)
        if known is None:  # it ended in the same moment
            return
        run, line = known
        place, slots = run.place, run.place.slots.limit
        lessons.began(run, now)
        loaded = run.loads and place.loading_until is not None
        self._ledger.heard(place)
        if loaded:
            self._ledger.loaded(place, now)
            self._idle[place.machine] = None
        # A first byte by itself changes nothing for those who wait.
        if line.size and (loaded or place.slots.limit != slots):
            self._look(line, BOTH)

    def end(self, lease_id: LeaseId, outcome: Outcome, now: float) -> None:
        """See `Scheduler.end`."""
        run, line = self._ledger.finish(lease_id, now)
        place, machine = run.place, run.place.machine
        served = outcome.result in (Result.SERVED, Result.ERRORED)
        lessons.ended(run, outcome.result, outcome.timings, now)
        if served:
            self._ledger.heard(place)
        if run.loads and place.loading_until is not None:
            if served:
                self._ledger.loaded(place, now)
            else:
                self._ledger.load_failed(place)
        if served:
            machine.served(now)
            self._lessons.served(run, outcome.timings, now)
            held = now - run.lease.granted_at - (place.load if run.loads else 0.0)
            line.held(max(held, 0.0))
            place.held(max(held, 0.0))
        elif outcome.result is not Result.CANCELLED:
            machine.failed(now)
        if not self._serving.entries:
            return
        for freed in self._lines.of(place.names):
            if freed.size:
                self._look(freed, HEAD if freed is line and served else BOTH)
        if not place.running:
            self._idle[machine] = None

    def adopt(self, lease: Lease, now: float) -> bool:
        """See `Scheduler.adopt`."""
        self._sync(now)
        request = lease.request
        machine = self._mirror.machines.get(lease.agent_id)
        place = machine.places.get(request.model) if machine is not None else None
        if place is None:
            return False
        line = self._lines.get(request, normal(request.options), now)
        self._ledger.adopt(line, place, lease, self._arrivals.expected_output(request), now)
        return True

    # ── what follows ──────────────────────────────────────────────────────────────────────────

    def plan(self, now: float) -> Plan:
        """See `Scheduler.plan`."""
        self._sync(now)
        self._advance(now)
        serving = self._serving
        if not serving.entries:
            self._dirty.clear()
            self._idle.clear()
            self._ledger.repredict(now)
            return Plan()
        if now >= self._tick_at:
            self._tick(now)
        dirty, self._dirty = self._dirty, {}
        for line in sorted(dirty, key=_urgency) if len(dirty) > 1 else dirty:
            serving.serve(line, now, dirty[line])
        while self._idle:
            serving.offer(self._idle.popitem()[0], now)
        serving.expire(now)  # last: who waits for nothing is served by what is free
        self._ledger.repredict(now)
        plan = Plan(tuple(serving.granted), tuple(serving.refused))
        serving.granted.clear()
        serving.refused.clear()
        return plan

    def _sync(self, now: float) -> None:
        concerned = self._mirror.sync(now)
        if concerned is None:
            return
        for line in self._lines.of(concerned):
            line.fresh_until = float("-inf")
            self._look(line, BOTH)
        for machine in self._mirror.machines.values():
            if machine.down_since == now:
                self._ledger.lost(machine)

    def _advance(self, now: float) -> None:
        """Loads that should be over are, save for those that are found to wait there."""
        over = self._ledger.over_loads(now)
        for place in over:
            self._idle[place.machine] = None
        for place in (*over, *self._ledger.blocked_loads(now)):
            for line in self._lines.of(place.names):
                self._look(line, BOTH)

    def _tick(self, now: float) -> None:
        """Look again at lines that nothing happened to, and at models that starve."""
        self._tick_at = now + TICK_SECONDS
        for drain in self._drains.settle(now):
            self._idle[drain.place.machine] = None
        lines = self._lines.waiting()
        look_again = max(len(lines) / LINES_LOOKED_AT_PER_SECOND, TICK_SECONDS)
        for line in lines:
            stranded = line.retried or not (line.hot or line.cold or line.loading)
            if stranded or now - line.looked_at >= look_again:
                self._look(line, BOTH)
            if (drained := self._drains.consider(line, now)) is not None:
                self._lines.drained(drained.machine)

    # ── what is known ─────────────────────────────────────────────────────────────────────────

    def wake_at(self, now: float) -> float | None:
        """See `Scheduler.wake_at`."""
        if not self._serving.entries:
            return None
        wake_at = self._tick_at
        for place in self._ledger.loads:
            wake_at = min(wake_at, place.loading_until or now)
        if self._serving.deadlines:
            wake_at = min(wake_at, self._serving.deadlines[0][0])
        return max(wake_at, now)

    def leases(self) -> Iterable[Lease]:
        """See `Scheduler.leases`."""
        return [run.lease for run, _ in self._ledger.running.values()]

    def in_flight(self, agent_id: AgentId) -> int:
        """See `Scheduler.in_flight`."""
        return self._ledger.by_agent.get(agent_id, 0)

    def waiting(self, now: float) -> list[Waiting]:
        """See `Scheduler.waiting`."""
        line_up: list[tuple[float, Waiting]] = []
        for line in self._lines.waiting():
            self._lines.refresh(line, now)
            due = float("-inf")
            for position, entry in enumerate(line.entries()):
                start = start_in(line, entry, position, now)
                due = max(due, entry.due)  # nobody is listed before those who go before it
                line_up.append((due, Waiting(entry.request, position + 1, start)))
        line_up.sort(key=_due)
        return [waiting for _, waiting in line_up]

    def waiting_count(self) -> int:
        """See `Scheduler.waiting_count`."""
        return len(self._serving.entries)

    def decision(self, lease_id: LeaseId) -> Decision | None:
        """See `Scheduler.decision`."""
        known = self._ledger.running.get(lease_id)
        if known is None or known[0].adopted:
            return None
        run = known[0]
        return brief(run.lease.request, run.choice, run.output)

    def account(self, lease_id: LeaseId) -> Decision | None:
        """See `Scheduler.account`."""
        known = self._ledger.running.get(lease_id)
        return None if known is None or known[0].adopted else self._accounts.of(*known)

    def explain(self, request: Request, now: float) -> Decision:
        """See `Scheduler.explain`."""
        self._sync(now)
        line = self._arrivals.line(request, now)
        output = self._arrivals.expected_output(request)
        entry = Entry(request, (0.0, 0.0, 0), line, output, 0.0)
        return explain(self._registry, self._mirror, self._chooser, entry, now)

    def estimates(self) -> list[Estimate]:
        """See `Scheduler.estimates`."""
        return estimates(self._mirror, self._rates)

    def estimate(self, agent_id: AgentId, model: str) -> Estimate | None:
        """See `Scheduler.estimate`."""
        return estimate(self._mirror, self._rates, agent_id, model)

    def export_state(self) -> Learned:
        """See `Scheduler.export_state`."""
        return export_learned(self._mirror, self._rates, self._lengths)

    def import_state(self, learned: Learned) -> None:
        """See `Scheduler.import_state`."""
        import_learned(learned, self._mirror, self._rates, self._lengths)


def _has_place(line: Line) -> bool:
    """Whether a request of this line would not have to wait."""
    return not line.size and bool(line.with_free_slot())


def _urgency(line: Line) -> float:
    return line.due


def _due(pair: tuple[float, Waiting]) -> float:
    return pair[0]
