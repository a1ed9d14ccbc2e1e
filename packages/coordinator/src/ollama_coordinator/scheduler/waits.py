"""How long a request waits for a slot, by the predicted ends of what runs."""

from itertools import islice

from .affinity import Hits
from .cost import NO_PLACE, alone_seconds, stay_seconds
from .fleet import Action, Choice, Place, Running
from .line import Entry, Line

LOOK_BEYOND = 4
"""So many slots that get free one after the other are compared: a later one may be a faster one."""


def wait_for_slot(line: Line, entry: Entry, ahead: int, hits: Hits, now: float) -> Choice:
    """The best slot that will be free once those ahead have had theirs."""
    excluded = entry.request.excluded
    tokens, output = entry.request.prompt_tokens, entry.output
    best = Choice(Action.WAIT, None, NO_PLACE)
    for wait, place in _freeing(line, entry, ahead, now):
        if wait >= best.cost:
            break
        if excluded and place.machine.id in excluded:
            continue
        cached = hits.get(place, 0) if hits else 0
        run = alone_seconds(place, max(tokens - cached, 0), output)
        if (cost := (wait + run) / place.machine.preference) < best.cost:
            best = Choice(Action.WAIT, place, cost, wait, run, cached)
    return best


def start_in(line: Line, entry: Entry, position: int, now: float) -> float | None:
    """The predicted wait of the request at this position; `None` without an idea."""
    excluded = entry.request.excluded
    for wait, place in _freeing(line, entry, position, now):
        if place.machine.id not in excluded:
            return wait
    soonest = [
        max(_loading_left(place, now), place.remaining(now)) + place.load
        for place in line.cold
        if place.machine.id not in excluded
    ]
    return min(soonest, default=None)


def _freeing(line: Line, entry: Entry, ahead: int, now: float) -> list[tuple[float, Place]]:
    """When the slots after the first `ahead` get free, soonest first."""
    ends = _undisturbed(line, ahead + LOOK_BEYOND, now) if line.disturbed else line.ends
    loading = _loading(line, now) if line.loading else []
    known = len(ends) + len(loading)
    if not known:
        return []
    if ahead >= known:
        place = ends[-1][2].place if ends else loading[-1][1]
        last = ends[-1][2].remaining(now) if ends else loading[-1][0]
        slots = sum(place.slots.limit for place in line.hot) or known
        stay = line.occupancy or stay_seconds(place, entry.request.prompt_tokens, entry.output)
        return [(last + (ahead - known + 1) * stay / slots, place)]
    # So many places being loaded shift the order of the ends by no more than their number.
    start = max(ahead - len(loading), 0)
    frees = [(run.remaining(now), run.place) for _, _, run in ends[start : ahead + LOOK_BEYOND]]
    if not loading:
        return frees
    frees = sorted(frees + loading, key=_first)
    return frees[ahead - start : ahead - start + LOOK_BEYOND]


def _undisturbed(line: Line, most: int, now: float) -> list[tuple[float, int, Running]]:
    """The first ends that free a slot for this line: not on an agent that is away, or makes way."""
    undisturbed = (
        end
        for end in line.ends
        if end[2].place.draining_until <= now and end[2].place.machine.routable
    )
    return list(islice(undisturbed, most))


def _loading(line: Line, now: float) -> list[tuple[float, Place]]:
    """The slots that get free with the loads under way."""
    return [
        (max((place.loading_until or now) - now, 0.0), place)
        for place in line.loading
        for _ in range(place.slots.limit - len(place.running))
    ]


def _loading_left(place: Place, now: float) -> float:
    loading = place.machine.loading
    return max((loading.loading_until or now) - now, 0.0) if loading is not None else 0.0


def _first(pair: tuple[float, Place]) -> float:
    return pair[0]
