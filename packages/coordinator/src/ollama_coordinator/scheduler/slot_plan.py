"""The slots of a queue to come, and which of them each waiting request will take.

Requests take slots in their order, each the one that is cheapest for it then; the slot is free
again after the request's service time. Which requests wait for the fast agent and
which for the slow one follows from the same costs as every other choice.
"""

from bisect import insort
from collections.abc import Iterable, Iterator
from heapq import heappop, heappush
from operator import itemgetter
from typing import NamedTuple

from .cost import NO_PLACE, LaterRates, later_rates, service_seconds
from .prompt_cache import CacheHits, PromptCaches
from .queue import Queue, QueueEntry
from .state import Action, Choice, Place

PLANNED_ANEW = 8
SECONDS_PER_ENTRY = 0.1
"""A plan costs some 3 us for each request, and holds for 0.1 s for each: a request that comes is
added to it. That of up to 8 requests is made anew sooner, when one of them or of those before them
begins or ends."""

MOST_PLANS = 64  # beyond, the plans of queues in which nothing waits any more are dropped


Slot = tuple[float, int, Place]
"""When a slot gets free; a number, which breaks ties; where it is."""


class Planned(NamedTuple):
    """The slot that a request is expected to take: when, where, and its cost once it is there."""

    at: float
    place: Place
    run: float
    cached: int
    slot: int
    """That of the slot among those that were compared."""


class SlotPlan:
    """One queue's plan: what each request takes, and the slots that are left after all of them."""

    def __init__(self, version: int, made_at: float, slots: list[Slot]) -> None:
        self.version = version
        self.made_at = made_at
        self.slots = slots
        self.rates: dict[Place, LaterRates] = {}
        self.planned: dict[QueueEntry, Planned | None] = {}


class SlotPlans:
    """The plans of the queues in which more than one request waits."""

    def __init__(self, caches: PromptCaches) -> None:
        self._caches = caches
        self._plans: dict[Queue, SlotPlan] = {}

    def hits(self, entry: QueueEntry) -> CacheHits:
        """The prompt tokens that each place is expected to have in its cache."""
        prefix = entry.request.prefix
        return (self._caches.expected(prefix) or None) if prefix else None

    def wait(self, queue: Queue, entry: QueueEntry, ahead: int, now: float) -> Choice:
        """The slot that a waiting request is expected to take, by a plan that may be a bit old."""
        if not ahead:
            return next_slot(queue, entry, self.hits(entry), now)
        plan = self._current(queue, now)
        if entry not in plan.planned:
            plan.planned[entry] = self._squeeze_in(plan, queue, entry, ahead, now)
        return _choice(plan.planned[entry], now)

    def _squeeze_in(
        self, plan: SlotPlan, queue: Queue, entry: QueueEntry, ahead: int, now: float
    ) -> Planned | None:
        """A request that came since: last in its order, or in the place of the one after it."""
        after = plan.planned.get(queue.at(ahead + 1)) if ahead + 1 < queue.size else None
        if after is None:
            return self._take(plan, queue, entry, now)
        slot = [(after.at, 0, after.place)]
        return _cheapest(slot, plan.rates, queue, entry, self.hits(entry), now)

    def _current(self, queue: Queue, now: float) -> SlotPlan:
        plan = self._plans.get(queue)
        if plan is not None:
            holds = plan.version == queue.version or queue.size > PLANNED_ANEW
            if holds and now - plan.made_at < queue.size * SECONDS_PER_ENTRY:
                return plan
        elif len(self._plans) > MOST_PLANS:
            self._plans = {one: kept for one, kept in self._plans.items() if one.size > 1}
        plan = self._plans[queue] = self._make(queue, now)
        return plan

    def _make(self, queue: Queue, now: float) -> SlotPlan:
        plan = SlotPlan(queue.version, now, slots_to_come(queue, now))
        for entry in queue.entries():
            plan.planned[entry] = self._take(plan, queue, entry, now)
        return plan

    def _take(self, plan: SlotPlan, queue: Queue, entry: QueueEntry, now: float) -> Planned | None:
        slots = plan.slots
        planned = _cheapest(slots, plan.rates, queue, entry, self.hits(entry), now)
        if planned is None:
            return None
        place, index = planned.place, planned.slot
        new = max(entry.request.prompt_tokens - planned.cached, 0)
        service = service_seconds(place, new, entry.receiver.output) + _owner_wait(place, now)
        later = (planned.at + service, slots.pop(index)[1], place)
        insort(slots, later, lo=index, key=_at)
        return planned

    def slots_left(self, queue: Queue, now: float) -> list[Slot]:
        """The slots that are left by all waiting requests, soonest first, planned anew."""
        return self._make(queue, now).slots

    def known_slots_left(self, queue: Queue, now: float) -> tuple[Slot, ...]:
        """The same by the plan that `wait` follows."""
        return tuple(self._current(queue, now).slots)


def slots_to_come(queue: Queue, now: float) -> list[Slot]:
    """Every slot that is taken now, or comes with a load under way, soonest first.

    What gets free on an agent out of rotation, or where the model drains or failed, is not for this
    queue.
    """
    slots = [
        (_loaded_at(place, now), -1 - number, place)
        for place in queue.loading
        for number in range(place.slots.limit - len(place.running))
    ]
    slots += _taken(queue, now)
    slots.sort(key=_at)
    return slots


def soonest_slots(slots: Iterable[Slot], places: Iterable[Place]) -> dict[Place, Slot]:
    """The first slot at each of these places that will get free, of slots in the order of time."""
    missing = {place for place in places if place.running or place.loading_until is not None}
    found: dict[Place, Slot] = {}
    for slot in slots:
        if not missing:
            break
        if (place := slot[2]) in missing:
            missing.remove(place)
            found[place] = slot
    return found


def _taken(queue: Queue, now: float) -> Iterator[Slot]:
    """The slots that are taken now, soonest first: what is late comes after others, by its age."""
    away = queue.away
    late: list[Slot] = []
    for ends_at, number, run in queue.ends:
        place = run.place
        if (
            away
            and place in away
            and (place.draining_until > now or not place.machine.routable or place in queue.avoided)
        ):
            continue
        left, least = ends_at - now, (now - run.lease.granted_at) / 4  # `Running.remaining`
        if left <= least:
            heappush(late, (now + least, number, place))
            continue
        at = now + left
        while late and late[0][0] <= at:
            yield heappop(late)
        yield at, number, place
    while late:
        yield heappop(late)


def next_slot(queue: Queue, entry: QueueEntry, hits: CacheHits, now: float) -> Choice:
    """The slot to come in which the next request costs least."""
    choice = cheapest_slot(_taken(queue, now), queue, entry, hits, now)
    if not queue.loading:
        return choice
    latest = choice.cost * queue.most_preferred
    loads = [
        (at, -1, place)
        for place in queue.loading
        if (at := _loaded_at(place, now)) - now < latest and len(place.running) < place.slots.limit
    ]
    if not loads:
        return choice
    loads.sort(key=_at)
    load = cheapest_slot(loads, queue, entry, hits, now)
    return load if load.cost < choice.cost else choice


def _loaded_at(place: Place, now: float) -> float:
    return max(place.loading_until or now, now)


def cheapest_slot(
    slots: Iterable[Slot], queue: Queue, entry: QueueEntry, hits: CacheHits, now: float
) -> Choice:
    """The slot in which the request costs least, of slots in the order of their ends."""
    return _choice(_cheapest(slots, {}, queue, entry, hits, now), now)


def _choice(planned: Planned | None, now: float) -> Choice:
    if planned is None:
        return Choice(Action.WAIT, None, NO_PLACE)
    place = planned.place
    machine, wait = place.machine, max(planned.at - now, 0.0)
    if place.owner.is_seen:
        wait += _owner_wait(place, now)
    failure = 0.0
    if machine.trouble or place.failing:
        failure = _failure(place, planned.run, now)
    cost = (wait + planned.run + failure) / machine.preference + machine.backup
    return Choice(Action.WAIT, planned.place, cost, wait, planned.run, planned.cached, failure)


def _failure(place: Place, run: float, now: float) -> float:
    """What recent failures add."""
    return place.machine.penalty(now) + place.failing_share(now) * run


def _owner_wait(place: Place, now: float) -> float:
    """The wait for what is not ours, once one of ours there has ended."""
    return place.owner_wait(max(len(place.running) - 1, 0), now) if place.owner.is_seen else 0.0


def _cheapest(
    slots: Iterable[Slot], known: dict[Place, LaterRates], queue: Queue, entry: QueueEntry,
    hits: CacheHits, now: float,
) -> Planned | None:  # fmt: skip
    """The same; `known` keeps the rates of places."""
    excluded, tokens, receiver = entry.request.excluded, entry.request.prompt_tokens, entry.receiver
    output, weight, reading = receiver.output, receiver.write_weight, receiver.reading_seconds
    found: tuple[float, Place, float, int, int] | None = None
    lowest = latest = NO_PLACE
    previous: Place | None = None
    for index, (at, _, place) in enumerate(slots):
        wait = at - now
        if wait >= latest:
            break
        if place is previous:  # a later slot of the same place is never cheaper
            continue
        previous = place
        machine = place.machine
        if excluded and machine.id in excluded:
            continue
        rates = known.get(place)
        if rates is None:
            rates = known[place] = later_rates(place)
        read, write, late_rate = rates
        cached = hits.get(place, 0) if hits else 0
        new = tokens - cached if tokens > cached else 0
        run = new * read + weight * output * write
        late = output * late_rate - reading
        if late > 0:
            run += late
        cost = wait + run
        if machine.trouble or place.failing:
            cost += _failure(place, run, now)
        if place.owner.is_seen:
            cost += _owner_wait(place, now)
        cost = cost / machine.preference + machine.backup
        if cost < lowest:
            found, lowest = (at, place, run, cached, index), cost
            latest = cost * queue.most_preferred
    return Planned(*found) if found is not None else None


def start_in(plans: SlotPlans, queue: Queue, position: int, now: float) -> float | None:
    """The predicted wait in seconds at this position; `None` where none can be predicted."""
    entry = queue.at(position)
    choice = plans.wait(queue, entry, position, now)
    if choice.place is not None:
        return choice.wait
    soonest = [
        max(_loading_left(place, now), place.remaining(now)) + place.load
        for place in queue.cold
        if place.machine.id not in entry.request.excluded
    ]
    return min(soonest, default=None)


def _loading_left(place: Place, now: float) -> float:
    loading = place.machine.loading
    return max((loading.loading_until or now) - now, 0.0) if loading is not None else 0.0


_at = itemgetter(0, 1)
"""When a slot gets free, and its number."""
