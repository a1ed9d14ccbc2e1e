"""The waiting requests, and which of them are sent where now."""

from heapq import heapify, heappop, heappush
from typing import NamedTuple

from ollama_coordinator.registry import Registry

from .choose import Chooser
from .cost import Stay, stay_seconds
from .eligibility import eligible, unavailable
from .error import QueueFull, SchedulerError
from .explain import NO_TAG
from .leases import Leases
from .queue import FadingRate, Queue, QueueEntry, receiver_of
from .queues import Queues
from .slot_plan import SlotPlans
from .state import Action, Choice, Machine, Running
from .types import Lease, LeaseId, Request, RequestId

# How many other queues an idle machine is offered to, and how often: it costs evictions:
OFFER_SECONDS = 0.1
QUEUES_OFFERED = 4
RATE_MEMORY_SECONDS = 20.0  # the rate of grants fades by this time constant, some answers long
# Bounds of `Retry-After`: its unit is 1 s, and after a minute everything may have changed:
SOONEST_SECONDS = 1.0
LATEST_SECONDS = 60.0
# Coming back pays when about this share of the queue has gone: sooner, and it is full again.
SHARE_AHEAD = 0.1
# The heap of deadlines is cleared of requests that have left when they are more than half of it.
SPARE_DEADLINES = 64
# So often a request is taken back: one that is late everywhere is strange itself.
MOST_TAKEN_BACK = 2

HEAD, TAIL = 1, 2
BOTH = HEAD | TAIL
"""What to look at in a queue: the next request, and whether one far back goes elsewhere."""


class Deadline(NamedTuple):
    """When a request must be served or refused; the number breaks ties."""

    at: float
    number: int
    request_id: RequestId


class Serving:
    """Serves queues. What was granted and refused is collected until it is taken."""

    def __init__(
        self,
        registry: Registry,
        queues: Queues,
        plans: SlotPlans,
        chooser: Chooser,
        leases: Leases,
    ) -> None:
        self._registry = registry
        self._queues = queues
        self._plans = plans
        self._chooser = chooser
        self._leases = leases
        self._rate = FadingRate(RATE_MEMORY_SECONDS)
        self.entries: dict[RequestId, QueueEntry] = {}
        self.deadlines: list[Deadline] = []
        self.granted: list[Lease] = []
        self.refused: list[tuple[RequestId, SchedulerError]] = []

    # ── what waits ────────────────────────────────────────────────────────────────────────────

    def add(self, entry: QueueEntry) -> None:
        """A request begins to wait."""
        request, queue = entry.request, entry.queue
        queue.add(entry)
        self.entries[request.id] = entry
        if request.deadline is not None:
            heappush(self.deadlines, Deadline(request.deadline, entry.tag.number, request.id))
            if len(self.deadlines) > 2 * len(self.entries) + SPARE_DEADLINES:
                self.deadlines = [one for one in self.deadlines if one.request_id in self.entries]
                heapify(self.deadlines)

    def give_up(self, entry: QueueEntry) -> None:
        """A request leaves without having been served; its client's turn is given back."""
        self._leave(entry)
        entry.queue.share_waiting()
        entry.queue.clock.give_back(entry.request.client, entry.work)

    def _leave(self, entry: QueueEntry) -> None:
        queue = entry.queue
        queue.remove(entry)
        del self.entries[entry.request.id]

    def full(self, now: float) -> QueueFull:
        """The error for a request that there is no room for, with the time when there will be."""
        rate = self._rate.per_second(now)
        if rate <= 0:
            return QueueFull(LATEST_SECONDS if self.entries else SOONEST_SECONDS)
        ahead = max(len(self.entries) * SHARE_AHEAD, 1.0)
        return QueueFull(min(max(ahead / rate, SOONEST_SECONDS), LATEST_SECONDS))

    def expire(self, now: float) -> None:
        """Refuse the requests whose deadline has come."""
        while self.deadlines and self.deadlines[0].at <= now:
            entry = self.entries.get(heappop(self.deadlines).request_id)
            if entry is not None and (entry.request.deadline or now) <= now:
                self.refuse(entry, self._too_late(entry.request, now))

    def _too_late(self, request: Request, now: float) -> SchedulerError:
        found = eligible(self._registry, request, now)
        return self.full(now) if found.agents else unavailable(self._registry, request, found, now)

    def refuse(self, entry: QueueEntry, error: SchedulerError) -> None:
        """A request leaves with this error, which the next plan brings."""
        self.give_up(entry)
        self.refused.append((entry.request.id, error))

    # ── one queue ─────────────────────────────────────────────────────────────────────────────

    def serve(self, queue: Queue, now: float, part: int = BOTH) -> None:
        """Send what can go now: from the head; then what is far enough back; then trials."""
        if not queue.size:
            return
        self._queues.refresh(queue, now)
        if not (queue.hot or queue.cold or queue.loading) or queue.retried:
            self._strand(queue, now)
            part = BOTH
        if part & HEAD or queue.size == 1:
            self._serve_head(queue, now)
        if part & TAIL:
            queue.looked(now)
            self._serve_tail(queue, now)
        if not queue.size:  # the last one took its share with it
            return
        if queue.guesses:
            self._try_more(queue, now)
        queue.share_waiting()

    def _serve_head(self, queue: Queue, now: float) -> None:
        """Send the first requests until one would rather wait.

        Once all slots are taken only a load could serve the next one; a load pays off for the last
        request of a lane before it pays off for this one, and `_serve_tail` looks there.
        """
        while queue.size and self._send(queue, 0, now):
            if queue.size > 1 and not queue.with_free_slot():
                return

    def _serve_tail(self, queue: Queue, now: float) -> None:
        while queue.size > 1:
            position = self._chooser.first_to_go(queue, now)
            if position is None or not self._send(queue, position, now):
                return

    def _send(self, queue: Queue, position: int, now: float) -> bool:
        """Grant what is best for the request at this position, unless that is waiting."""
        self._queues.refresh(queue, now)
        entry = queue.at(position)
        choice = self._chooser.choose(queue, entry, position, now)
        if choice.action is Action.WAIT or choice.place is None:
            return False
        if position:
            self._chooser.keep_slots(choice, queue, now)
        self._grant(entry, choice, now)
        return True

    def _grant(self, entry: QueueEntry, choice: Choice, now: float, *, tries: bool = False) -> None:
        self._leave(entry)
        queue = entry.queue
        queue.clock.serve(entry.tag.start)
        self.granted.append(self._leases.grant(queue, entry, choice, now, tries=tries))
        if choice.place is not None and choice.place.machine.agent.model_cooldowns:
            queue.stale()  # where the model failed before, one request tries at a time
        self._rate.count(now)

    def _try_more(self, queue: Queue, now: float) -> None:
        """All slots that are known to be free are taken, and requests wait: try one more."""
        while queue.size:
            entry = queue.at(0)
            choice = self._chooser.beyond(queue, entry, now)
            if choice is None:
                return
            self._grant(entry, choice, now, tries=True)

    def _strand(self, queue: Queue, now: float) -> None:
        """Requests that no agent may serve wait for a moment if one may come back, else go."""
        candidates = {place.machine.id for place in (*queue.hot, *queue.loading, *queue.cold)}
        for entry in list(queue.entries()):
            if candidates - entry.request.excluded:
                entry.may_be_served()
                continue
            found = eligible(self._registry, entry.request, now)
            if queue.avoided and self._try_avoided(queue, entry, now):
                continue
            hopeless = entry.stranded(now) >= found.patience
            if hopeless and not found.agents:
                self.refuse(entry, unavailable(self._registry, entry.request, found, now))

    def _try_avoided(self, queue: Queue, entry: QueueEntry, now: float) -> bool:
        """Send a request that failed on all others to a place where the model failed before."""
        places = queue.last_resort(entry.request.excluded, now)
        choice = self._chooser.choose(places, entry, 0, now)
        if choice.action is Action.WAIT or choice.place is None:
            return False
        self._grant(entry, choice, now)
        return True

    # ── what runs ─────────────────────────────────────────────────────────────────────────────

    def take_back(self, now: float) -> list[tuple[LeaseId, str]]:
        """The leases whose requests are served sooner elsewhere, and why.

        One of each queue: the next look sees where it went. The newest first: of those that wait
        for one load, the lease that began it is the oldest.
        """
        found: dict[Queue, tuple[LeaseId, str]] = {}
        for lease_id, (run, queue) in reversed(self._leases.running.items()):
            if (
                queue not in found
                and run.began_at is None
                and run.lease.request.taken_back < MOST_TAKEN_BACK
                and (stay := stay_seconds(run, now)) is not None
                and (reason := self._sooner_elsewhere(run, queue, stay, now))
            ):
                found[queue] = lease_id, reason
        return list(found.values())

    def _sooner_elsewhere(self, run: Running, queue: Queue, stay: Stay, now: float) -> str:
        """By how much another agent that can begin at once serves it sooner; empty: it does not."""
        self._queues.refresh(queue, now)
        request, machine = run.lease.request.taken_from(run.lease.agent_id), run.place.machine
        entry = QueueEntry(request, NO_TAG, queue, receiver_of(request, run.output), 0.0)
        choice = self._chooser.choose(queue, entry, 0, now)
        sooner = stay.felt / machine.preference + machine.backup - choice.cost
        if choice.action is Action.WAIT or choice.place is None or sooner <= stay.lost:
            return ""
        name, age = choice.place.machine.agent.name, now - run.lease.granted_at
        return f"no byte after {age:.1f} s; {name} serves it {sooner:.1f} s sooner"

    # ── one machine ───────────────────────────────────────────────────────────────────────────

    def offer(self, machine: Machine, now: float) -> None:
        """A machine with something idle is offered to the queues of others, most urgent first."""
        if not machine.routable or now - machine.offered_at < OFFER_SECONDS:
            return
        machine.offered(now)
        for queue in self._queues.wanting(machine, QUEUES_OFFERED):
            if machine.loading is None and self._wanted(queue, machine, now):
                queue.search_again()
                self.serve(queue, now)

    def _wanted(self, queue: Queue, machine: Machine, now: float) -> bool:
        """Whether the last request of a lane would rather have the model loaded there."""
        self._queues.refresh(queue, now)
        place = machine.places[queue.model]
        if place not in queue.could_load:
            return False
        for last in queue.lasts():
            entry = queue.at(last)
            cost = self._plans.wait(queue, entry, last, now).cost
            if self._chooser.load_at(place, entry, cost, now) is not None:
                return True
        return False
