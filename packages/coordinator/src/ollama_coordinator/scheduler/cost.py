"""What a request costs where, in seconds. The formula, its symbols and an example: `DESIGN.md`.

Time to the first token counts in full, writing the answer by a tenth: people read along. Of the
delay for the requests that run a half counts, of that for those that wait all of it.
"""

from bisect import bisect_left
from collections.abc import Iterable
from itertools import islice
from operator import itemgetter

from .prompt_cache import CacheHits
from .queue import PredictedEnd, Queue, QueueEntry
from .state import Action, Choice, Place

NO_PLACE = float("inf")  # the cost where no place comes into question: anything is cheaper
DECODE_WEIGHT = 0.1  # A person reads about a tenth as fast as a model writes
# A request that waits for a slot holds up those behind by its whole answer, and more come.
HELD_WEIGHT = 1.5
# The delay of others is half as bad: their first token is there, and others will end.
HARM_WEIGHT = 0.5
OVERLAP = 0.7  # how much of the slow-down found at the start lasts: others end while a request runs
# How much the slow-down grows until the slot is free, measured on the simulated fleet.
CONCURRENCY_TO_COME = 1.3
LOOK_BEYOND = 4  # so many slots that get free in turn are compared: a later one may be a faster one


def alone_seconds(place: Place, tokens: float, output: float) -> float:
    """The weighted cost of a request that finds nothing else running."""
    return tokens * place.prefill + DECODE_WEIGHT * output * place.decode


def run_seconds(
    place: Place, tokens: float, output: float, now: float, courtesy: float = 1.0
) -> float:
    """The weighted cost of reading `tokens` and writing `output`, with the delay of others.

    With a = `alone_seconds`, T = the unweighted time alone, k = places at work on the machine, this
    one included, n = requests at this place, b = the batch factor, and w = `courtesy`:

        slow-down   s = 1 + OVERLAP (k (1 + b n) - 1)
        for others  d = OVERLAP b / (1 + b (n - 1))    at a place at work
                    d = OVERLAP / (k - 1)              at an idle one, for all of the machine
        cost          = a s + w d (HARM_WEIGHT min(left, m T s) + waiting T s)

    `left` is the sum of the predicted seconds left of the m requests that are delayed; as `ends`
    sums absolute times, it is ends - m now. `waiting` requests wait for the machine's other places:
    only a model that begins to run delays them.
    """
    machine = place.machine
    reading, writing = tokens * place.prefill, output * place.decode
    alone = reading + DECODE_WEIGHT * writing
    if not machine.running:
        return alone
    beside = len(place.running)
    batch = machine.batch
    if beside:
        active = len(machine.busy)
        slower = OVERLAP * batch / (1 + batch * (beside - 1))
        others, left = beside, place.ends - beside * now
    else:
        active = len(machine.busy) + 1
        slower = OVERLAP / (active - 1)
        others, left = machine.running, machine.ends - machine.running * now
    slow_down = 1 + OVERLAP * (active * (1 + batch * beside) - 1)
    run = alone * slow_down
    service = (reading + writing) * slow_down
    harmed = HARM_WEIGHT * max(min(left, others * service), 0.0)
    if not beside:
        harmed += (machine.waiting_load - place.waiting_load) * service
    return run + courtesy * slower * harmed


def service_seconds(place: Place, tokens: float, output: float) -> float:
    """How long a request holds its slot beside what runs there now, and what is to come."""
    now = place.slow_down if place.running else len(place.machine.busy) + 1
    return (tokens * place.prefill + output * place.decode) * (1 + CONCURRENCY_TO_COME * (now - 1))


# ── the wait for a slot ───────────────────────────────────────────────────────────────────────


def wait_for_slot(
    queue: Queue, entry: QueueEntry, ahead: int, hits: CacheHits, now: float
) -> Choice:
    """The best slot that will be free once the requests ahead have had theirs."""
    excluded = entry.request.excluded
    tokens, output = entry.request.prompt_tokens, entry.output
    best = Choice(Action.WAIT, None, NO_PLACE)
    for wait, place in _freeing(queue, entry, ahead, now):
        if wait >= best.cost:
            break
        if excluded and place.machine.id in excluded:
            continue
        cached = hits.get(place, 0) if hits else 0
        run = alone_seconds(place, max(tokens - cached, 0), output)
        if (cost := (wait + run) / place.machine.preference) < best.cost:
            best = Choice(Action.WAIT, place, cost, wait, run, cached)
    return best


def start_in(queue: Queue, entry: QueueEntry, position: int, now: float) -> float | None:
    """The predicted wait in seconds at this position; `None` where none can be predicted."""
    excluded = entry.request.excluded
    for wait, place in _freeing(queue, entry, position, now):
        if place.machine.id not in excluded:
            return wait
    soonest = [
        max(_loading_left(place, now), place.remaining(now)) + place.load
        for place in queue.cold
        if place.machine.id not in excluded
    ]
    return min(soonest, default=None)


def _freeing(
    queue: Queue, entry: QueueEntry, ahead: int, now: float
) -> Iterable[tuple[float, Place]]:
    """In how many seconds the slots after the first `ahead` get free, soonest first."""
    away = _away(queue, now) if queue.away else []
    loading = _loading(queue, now) if queue.loading else []
    known = len(queue.ends) - len(away) + len(loading)
    if not known:
        return []
    if ahead >= known:
        return [_beyond(queue, entry, ahead - known, away, loading, now)]
    # So many places being loaded shift the order of the ends by no more than their number.
    start = max(ahead - len(loading), 0)
    ends = _ending(queue, start, ahead - start + LOOK_BEYOND, away)
    frees = ((run.remaining(now), run.place) for _, _, run in ends)
    if not loading:
        return frees
    return sorted([*frees, *loading], key=itemgetter(0))[
        ahead - start : ahead - start + LOOK_BEYOND
    ]


def _beyond(
    queue: Queue,
    entry: QueueEntry,
    further: int,
    away: list[int],
    loading: list[tuple[float, Place]],
    now: float,
) -> tuple[float, Place]:
    """A slot that gets free after all known ones, by the service time of one."""
    if len(queue.ends) > len(away):
        run = _ending(queue, len(queue.ends) - len(away) - 1, 1, away)[0].run
        last, place = run.remaining(now), run.place
    else:
        last, place = loading[-1]
    slots = sum([place.slots.limit for place in queue.hot]) or len(queue.ends) + len(loading)
    service = queue.mean_service or service_seconds(
        place, entry.request.prompt_tokens, entry.output
    )
    return last + (further + 1) * service / slots, place


def _ending(queue: Queue, start: int, most: int, away: list[int]) -> list[PredictedEnd]:
    """So many of the ends from a position on, without those that are away."""
    if not away:
        return queue.ends[start : start + most]
    for index in away:
        start += index <= start
    found = (index for index in range(start, len(queue.ends)) if index not in away)
    return [queue.ends[index] for index in islice(found, most)]


def _away(queue: Queue, now: float) -> list[int]:
    """The ends that free no slot for this queue: the agent is out of rotation, or drains."""
    found = []
    for place in queue.away:
        if place.draining_until > now or not place.machine.routable:
            for run in place.running.values():
                index = bisect_left(queue.ends, (run.ends_at, run.number))
                if index < len(queue.ends) and queue.ends[index].run is run:
                    found.append(index)
    found.sort()
    return found


def _loading(queue: Queue, now: float) -> list[tuple[float, Place]]:
    """The slots that get free with the loads under way."""
    return [
        (max((place.loading_until or now) - now, 0.0), place)
        for place in queue.loading
        for _ in range(place.slots.limit - len(place.running))
    ]


def _loading_left(place: Place, now: float) -> float:
    loading = place.machine.loading
    return max((loading.loading_until or now) - now, 0.0) if loading is not None else 0.0
