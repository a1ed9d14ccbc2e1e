"""Where a request should go now, or whether it should rather wait: the cheapest prediction."""

from .cost import (
    HELD_WEIGHT,
    NO_PLACE,
    alone_seconds,
    run_seconds,
    service_seconds,
    wait_for_slot,
)
from .eviction import Evictions
from .prompt_cache import CacheHits, PromptCaches
from .queue import Queue, QueueEntry
from .rates import UNLOAD_SECONDS
from .state import Action, Choice, Eviction, Place

# A search costs some 100 us; it is repeated for a wait so much longer, or after a while:
SEARCH_AGAIN_SECONDS = 2.0
MUCH_WORSE = 1.25
# Costs this close are equal, as rates are no better known: the place used longest ago wins:
NEARLY = 1.05
NEARLY_SECONDS = 0.01


class Chooser:
    """Evaluates the candidates of a queue."""

    def __init__(self, caches: PromptCaches, evictions: Evictions) -> None:
        self._caches = caches
        self._evictions = evictions

    def choose(self, queue: Queue, entry: QueueEntry, ahead: int, now: float) -> Choice:
        """The cheapest possibility of a request that has `ahead` others before it."""
        return self.choose_with(self.hits(entry), queue, entry, ahead, now)

    def choose_with(
        self, hits: CacheHits, queue: Queue, entry: QueueEntry, ahead: int, now: float
    ) -> Choice:
        """The same, where what is in the prompt caches is known already."""
        go = self._go(queue, entry, hits, now)
        wait = wait_for_slot(queue, entry, ahead, hits, now)
        best, other = (go, wait) if go.cost <= waiting_cost(wait, entry) else (wait, go)
        if queue.cold and queue.quickest_load < best.cost:
            load = self._load(queue, entry, best.cost, now)
            if load.cost < best.cost:
                load.others = (best, other)
                return load
        best.others = (other,)
        return best

    def hits(self, entry: QueueEntry) -> CacheHits:
        """The prompt tokens that each place is expected to have in its cache."""
        prefix = entry.request.prefix
        return (self._caches.expected(prefix) or None) if prefix else None

    def _go(self, queue: Queue, entry: QueueEntry, hits: CacheHits, now: float) -> Choice:
        """The best place that is in memory and has a slot."""
        excluded = entry.request.excluded
        tokens, output, courtesy = entry.request.prompt_tokens, entry.output, entry.courtesy
        best: Place | None = None
        best_cost = floor = NO_PLACE
        for place in queue.with_free_slot():
            machine = place.machine
            if excluded and machine.id in excluded:
                continue
            new = max(tokens - hits.get(place, 0), 0) if hits else tokens
            cost = run_seconds(place, new, output, now, courtesy)
            if place.slots.extra:
                cost += _wait_behind(place)
            if machine.trouble:
                cost += machine.penalty(now)
            if place.failing:
                cost += cost * place.failing_share(now)
            if machine.preference != 1.0:
                cost /= machine.preference
            near = floor * NEARLY + NEARLY_SECONDS
            if cost > near or (
                place.draining_until > now and not _ends_in_time(place, new, output, now)
            ):
                continue
            if (
                cost * NEARLY + NEARLY_SECONDS < floor
                or best is None
                or (place.last_used < best.last_used)
            ):
                best, best_cost = place, cost
            floor = min(cost, floor)
        if best is None:
            return Choice(Action.GO, None, NO_PLACE)
        return Choice(Action.GO, best, best_cost, 0.0, best_cost, hits.get(best, 0) if hits else 0)

    def _load(self, queue: Queue, entry: QueueEntry, below: float, now: float) -> Choice:
        """The best machine to load the model, if one costs less than `below`.

        When there was none a moment ago it is not searched again: what changes meanwhile is a
        machine with something idle, and such are offered to the queues.
        """
        best = Choice(Action.LOAD, None, below)
        usual = entry.courtesy == 1.0 and not entry.request.excluded
        if usual and now < queue.futile.until and below <= queue.futile.below:
            return best
        for place in queue.to_load():
            if place.load / place.machine.preference >= best.cost:
                break  # the others take longer
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
        below *= machine.preference
        tokens, output = entry.request.prompt_tokens, entry.output
        if place.load + alone_seconds(place, tokens, output) >= below:
            return None
        if machine.id in entry.request.excluded:
            return None
        run = run_seconds(place, tokens, output, now, entry.courtesy)
        least = place.load + run + (machine.penalty(now) if machine.trouble else 0.0)
        if place.failing:
            least += place.failing_share(now) * (place.load + run)
        if least >= below or (eviction := self._evictions.find(place, now)) is None:
            return None
        leave = UNLOAD_SECONDS if eviction.victims or place.resident else 0.0
        if place.resident:  # loaded with other options, it is missed itself, as it is
            missed = eviction.penalty + self._evictions.loss(place, now)
            eviction = Eviction(eviction.victims, missed)
        cost = least + leave + entry.courtesy * eviction.penalty
        if cost >= below:
            return None
        cost /= machine.preference
        return Choice(Action.LOAD, place, cost, place.load + leave, run, 0, eviction)

    def first_to_go(self, queue: Queue, now: float) -> int | None:
        """The first position behind the head for which another place beats its wait.

        Waits grow with the position: the last one shows whether there is any, and halving finds it.
        Retries may not go everywhere, so each of them is evaluated by itself.
        """
        if queue.retried:
            for position, entry in enumerate(queue.entries()):
                if position and entry.request.excluded:
                    choice = self.choose(queue, entry, position, now)
                    if choice.action is not Action.WAIT and choice.place is not None:
                        return position
        first = 1
        for last in queue.lasts():
            if first <= last:
                found = self._first_between(queue, first, last, now)
                if found is not None:
                    return found
            first = last + 1
        return None

    def _first_between(self, queue: Queue, low: int, high: int, now: float) -> int | None:
        """The same among the positions of one lane, whose requests weigh alike what others lose."""
        choice = self.choose(queue, queue.at(high), high, now)
        if choice.action is Action.WAIT or choice.place is None:
            return None
        while low < high:
            middle = (low + high) // 2
            if self._rather_waits(queue, middle, choice, now):
                low = middle + 1
            else:
                high = middle
        return high

    def _rather_waits(self, queue: Queue, position: int, other: Choice, now: float) -> bool:
        entry = queue.at(position)
        wait = wait_for_slot(queue, entry, position, self.hits(entry), now)
        cost = waiting_cost(wait, entry) if other.action is Action.GO else wait.cost
        return cost < other.cost

    def beyond(self, queue: Queue, entry: QueueEntry, now: float) -> Choice | None:
        """A place where one request more than is known to run at once may be tried."""
        open_places = [
            place
            for place in queue.hot
            if place.slots.fixed is None
            and place.draining_until <= now
            and place.machine.id not in entry.request.excluded
            and len(place.running) < place.slots.allowance(now)
        ]
        if not open_places:
            return None
        place = min(open_places, key=_share_taken)
        tokens, output = entry.request.prompt_tokens, entry.output
        run = run_seconds(place, tokens, output, now, entry.courtesy)
        return Choice(Action.GO, place, run, 0.0, run)


def waiting_cost(wait: Choice, entry: QueueEntry) -> float:
    """What waiting costs beside a free place: the contended slot is held for the whole answer."""
    if wait.place is None:
        return wait.cost
    return wait.cost + entry.courtesy * HELD_WEIGHT * entry.output * wait.place.decode


def _wait_behind(place: Place) -> float:
    """Embeddings go to a busy place too, and wait there for the one before them: seconds."""
    beyond = len(place.running) - place.slots.count + 1
    return beyond * (place.mean_service or 0.0) if beyond > 0 else 0.0


def _share_taken(place: Place) -> tuple[float, int]:
    return len(place.running) / place.slots.count, place.last_used


def _ends_in_time(place: Place, tokens: float, output: float, now: float) -> bool:
    return now + service_seconds(place, tokens, output) <= place.draining_until
