"""Where a request should go now, or whether it should rather wait: the cheapest prediction."""

from collections.abc import Iterable, Sequence

from .cost import NO_PLACE, alone_seconds, run_seconds, service_seconds
from .eviction import Evictions
from .prompt_cache import CacheHits
from .queue import Queue, QueueEntry
from .rates import UNLOAD_SECONDS
from .slot_plan import Slot, SlotPlans, cheapest_slot, next_slot
from .state import Action, Choice, Eviction, Place

# A search costs some 100 us; it is repeated for a wait so much longer, or after a while:
SEARCH_AGAIN_SECONDS = 2.0
MUCH_WORSE = 1.25
# Costs this close are equal, as clocks and networks are no better: preference decides, then turns.
TIE_SECONDS = 0.01


class Chooser:
    """Evaluates the candidates of a queue: the lowest cost is chosen, and nothing else decides."""

    def __init__(self, plans: SlotPlans, evictions: Evictions) -> None:
        self._plans = plans
        self._evictions = evictions

    def choose(self, queue: Queue, entry: QueueEntry, ahead: int, now: float) -> Choice:
        """The cheapest possibility of a request that has `ahead` others before it."""
        hits = self._plans.hits(entry)
        wait = (
            self._plans.wait(queue, entry, ahead, now)
            if ahead
            else next_slot(queue, entry, hits, now)
        )
        return self._compare(queue, entry, hits, wait, now)

    def choose_last(
        self, queue: Queue, entry: QueueEntry, slots: Iterable[Slot], now: float
    ) -> Choice:
        """The same for a request that is not queued, to which all others leave these slots."""
        hits = self._plans.hits(entry)
        wait = cheapest_slot(slots, queue, entry, hits, now)
        return self._compare(queue, entry, hits, wait, now)

    def _compare(
        self, queue: Queue, entry: QueueEntry, hits: CacheHits, wait: Choice, now: float
    ) -> Choice:
        go = self._go(queue.to_compare(), entry, hits, wait.cost, now)
        best, other = (wait, go) if _beats(wait, go) else (go, wait)
        is_preferred = best.place is None or queue.most_preferred <= best.place.machine.preference
        below = best.cost - TIE_SECONDS if is_preferred else best.cost + TIE_SECONDS
        if queue.cold and queue.quickest_load < below:
            load = self._load(queue, entry, below, now)
            if _beats(load, best):
                load.others = (best, other)
                return load
        best.others = (other,)
        return best

    def hits(self, entry: QueueEntry) -> CacheHits:
        """The prompt tokens that each place is expected to have in its cache."""
        return self._plans.hits(entry)

    def slots_left(self, queue: Queue, now: float) -> Sequence[Slot]:
        """The slots that the waiting requests of a queue leave to one more, soonest first."""
        return self._plans.slots_left(queue, now)

    def keep_slots(self, choice: Choice, queue: Queue, now: float) -> None:
        """Remember what was left to a request that goes before others, to explain it later."""
        choice.slots_left = self._plans.known_slots_left(queue, now)

    def choose_at(
        self, place: Place, entry: QueueEntry, hits: CacheHits, slot: Slot | None, now: float
    ) -> Choice:
        """The same as if the model had this place alone, of whose slots this one is left to it."""
        queue = entry.queue
        wait = cheapest_slot((slot,) if slot is not None else (), queue, entry, hits, now)
        if place in queue.could_load:
            return self.load_at(place, entry, wait.cost, now) or wait
        is_free = place.loading_until is None and len(place.running) < place.slots.limit
        go = self._go((place,) if is_free else (), entry, hits, wait.cost, now)
        return wait if _beats(wait, go) else go

    def _go(
        self, places: Iterable[Place], entry: QueueEntry, hits: CacheHits, waiting: float,
        now: float,
    ) -> Choice:  # fmt: skip
        """The best of these places, which have the model in memory and a free slot.

        `waiting` is what waiting costs: where that is less, the best one may cost more by a tie.
        """
        excluded, receiver = entry.request.excluded, entry.receiver
        tokens = entry.request.prompt_tokens
        cheap: list[tuple[float, Place]] = []
        floor = NO_PLACE
        for place in places:
            machine = place.machine
            if excluded and machine.id in excluded:
                continue
            new = max(tokens - hits.get(place, 0), 0) if hits else tokens
            seconds = run_seconds(place, new, receiver, now)
            if place.slots.extra or place.owner.is_seen:
                seconds += _wait_behind(place, now)
            if machine.trouble:
                seconds += machine.penalty(now)
            if place.failing:
                seconds += seconds * place.failing_share(now)
            cost = seconds / machine.preference + machine.backup
            if cost > floor + TIE_SECONDS or (
                place.draining_until > now and not _ends_in_time(place, new, receiver.output, now)
            ):
                continue
            cheap.append((cost, place))
            floor = min(cost, floor)
        if floor - TIE_SECONDS <= waiting < floor:
            floor = waiting
        best, best_cost = _first_of_tie(cheap, floor + TIE_SECONDS)
        if best is None:
            return Choice(Action.GO, None, NO_PLACE)
        cached = hits.get(best, 0) if hits else 0
        run = run_seconds(best, max(tokens - cached, 0), receiver, now)
        behind = _wait_behind(best, now)
        seconds = (best_cost - best.machine.backup) * best.machine.preference
        failure = seconds - run - behind
        return Choice(Action.GO, best, best_cost, behind, run, cached, max(failure, 0.0))

    def _load(self, queue: Queue, entry: QueueEntry, below: float, now: float) -> Choice:
        """The best machine to load the model, if one costs less than `below`.

        When there was none of many a moment ago it is not searched again: what changes meanwhile is
        a machine with something idle, and such are offered to the queues.
        """
        best = Choice(Action.LOAD, None, below)
        usual = (
            entry.receiver.courtesy == 1.0 and not entry.request.excluded and queue.is_widespread
        )
        if usual and now < queue.futile.until and below <= queue.futile.below:
            return best
        for place in queue.to_load():
            machine = place.machine
            if place.load / machine.preference + machine.backup >= best.cost:  # `load_seconds`
                break  # the others take longer
            if machine.loading is not None or place.running:
                continue
            if not place.resident and machine.is_full(place.memory_bytes, now):
                continue
            if (load := self.load_at(place, entry, best.cost, now)) is not None:
                best = load
        if best.place is None and usual:
            queue.search_failed(below * MUCH_WORSE, now + SEARCH_AGAIN_SECONDS)
        return best

    def load_at(self, place: Place, entry: QueueEntry, below: float, now: float) -> Choice | None:
        """Loading the model at this place, if that can start now and costs less than `below`."""
        machine = place.machine
        if machine.loading is not None or place.running:
            return None
        if not place.resident and machine.is_full(place.memory_bytes, now):
            return None
        if machine.reserved is not None and machine.reserved is not place:
            return None
        below = (below - machine.backup) * machine.preference
        tokens, receiver = entry.request.prompt_tokens, entry.receiver
        if place.load + alone_seconds(place, tokens, receiver) >= below:
            return None
        if machine.id in entry.request.excluded:
            return None
        run = run_seconds(place, tokens, receiver, now)
        failure = machine.penalty(now) if machine.trouble else 0.0
        if place.failing:
            failure += place.failing_share(now) * (place.load + run)
        least = place.load + run + failure
        if least >= below or (eviction := self._evictions.find(place, now)) is None:
            return None
        leave = UNLOAD_SECONDS if eviction.victims or place.resident else 0.0
        if place.resident:  # loaded with other options, it is missed itself, as it is
            missed = eviction.penalty + self._evictions.loss(place, place, now)
            eviction = Eviction(eviction.victims, missed)
        cost = least + leave + receiver.courtesy * eviction.penalty
        if cost >= below:
            return None
        cost = cost / machine.preference + machine.backup
        return Choice(Action.LOAD, place, cost, place.load + leave, run, 0, failure, eviction)

    def first_to_go(self, queue: Queue, now: float) -> int | None:
        """The first position behind the head for which another place beats its wait.

        Waits grow with the position among requests of one lane that feel delays alike: the last one
        shows whether there is any, and halving finds it. Retries may not go everywhere, so each of
        them is evaluated by itself.
        """
        if not (queue.cold or queue.with_free_slot()):
            return None
        if queue.retried:
            for position, entry in enumerate(queue.entries()):
                if position and entry.request.excluded:
                    choice = self.choose(queue, entry, position, now)
                    if choice.action is not Action.WAIT and choice.place is not None:
                        return position
        found = (self._first_of(queue, alike, now) for alike in queue.alike())
        return next((position for position in found if position is not None), None)

    def _first_of(self, queue: Queue, positions: Sequence[int], now: float) -> int | None:
        """The same among these positions, in order, of requests that feel delays alike."""
        last = positions[-1]
        choice = self.choose(queue, queue.at(last), last, now)
        if choice.action is Action.WAIT or choice.place is None:
            return None
        low, high = 0, len(positions) - 1
        while low < high:
            middle = (low + high) // 2
            if self._rather_waits(queue, positions[middle], choice, now):
                low = middle + 1
            else:
                high = middle
        return positions[high]

    def _rather_waits(self, queue: Queue, position: int, other: Choice, now: float) -> bool:
        entry = queue.at(position)
        return _beats(self._plans.wait(queue, entry, position, now), other)

    def beyond(self, queue: Queue, entry: QueueEntry, now: float) -> Choice | None:
        """A place where one request more than is known to run at once may be tried.

        Only where it would cost less than waiting if there is such a slot.
        """
        open_places = [
            place
            for place in queue.hot
            if place.slots.fixed is None
            and place.draining_until <= now
            and place.machine.id not in entry.request.excluded
            and place.slots.limit <= len(place.running) < place.slots.allowance(now)
        ]
        if not open_places:
            return None
        wait = next_slot(queue, entry, self.hits(entry), now)
        for place in sorted(open_places, key=_share_taken):
            run = run_seconds(place, entry.request.prompt_tokens, entry.receiver, now)
            cost = run / place.machine.preference + place.machine.backup
            if cost < wait.cost:
                return Choice(Action.GO, place, cost, 0.0, run, others=(wait,))
        return None


def _beats(later: Choice, sooner: Choice) -> bool:
    """Whether what begins later is chosen: it costs less, or as much where that is preferred."""
    if later.place is None or sooner.place is None:
        return later.place is not None
    if abs(later.cost - sooner.cost) > TIE_SECONDS:
        return later.cost < sooner.cost
    return later.place.machine.preference > sooner.place.machine.preference


def _first_of_tie(places: Iterable[tuple[float, Place]], most: float) -> tuple[Place | None, float]:
    """Which of these that cost `most` or less is taken, and its cost."""
    best, best_cost = None, most
    for cost, place in places:
        if cost <= most and (best is None or _before(place, best)):
            best, best_cost = place, cost
    return best, best_cost


def _before(place: Place, other: Place) -> bool:
    """Which of two places that cost the same is taken: as preferred, then in turn."""
    mine, others = place.machine.preference, other.machine.preference
    return mine > others or (mine == others and place.last_used < other.last_used)


def _wait_behind(place: Place, now: float) -> float:
    """The seconds that a request waits in a free slot for what is not ours.

    Embeddings go to a busy place too, and wait there for the one before them.
    """
    running = len(place.running)
    seconds = place.owner_wait(running, now) if place.owner.is_seen else 0.0
    beyond = running - place.slots.count + 1
    if beyond > 0 and place.slots.extra:
        seconds += beyond * (place.mean_service or 0.0)
    return seconds


def _share_taken(place: Place) -> tuple[float, int]:
    return len(place.running) / place.slots.count, place.last_used


def _ends_in_time(place: Place, tokens: float, output: float, now: float) -> bool:
    return now + service_seconds(place, tokens, output) <= place.draining_until
