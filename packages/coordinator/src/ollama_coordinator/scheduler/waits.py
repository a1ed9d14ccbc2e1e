"""How long a request waits for a slot, by the predicted ends of what runs."""

from bisect import bisect_left
from collections.abc import Iterable
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


def _freeing(line: Line, entry: Entry, ahead: int, now: float) -> Iterable[tuple[float, Place]]:
    """When the slots after the first `ahead` get free, soonest first."""
    away = _away(line, now) if line.away else []
    loading = _loading(line, now) if line.loading else []
    known = len(line.ends) - len(away) + len(loading)
    if not known:
        return []
    if ahead >= known:
        return [_beyond(line, entry, ahead - known, away, loading, now)]
    # So many places being loaded shift the order of the ends by no more than their number.
    start = max(ahead - len(loading), 0)
    runs = _ending(line, start, ahead - start + LOOK_BEYOND, away)
    frees = ((run.remaining(now), run.place) for _, _, run in runs)
    if not loading:
        return frees
    return sorted([*frees, *loading], key=_first)[ahead - start : ahead - start + LOOK_BEYOND]


def _beyond(
    line: Line,
    entry: Entry,
    further: int,
    away: list[int],
    loading: list[tuple[float, Place]],
    now: float,
) -> tuple[float, Place]:
    """A slot that gets free after all known ones, by how long requests stay in one."""
    if len(line.ends) > len(away):
        run = _ending(line, len(line.ends) - len(away) - 1, 1, away)[0][2]
        last, place = run.remaining(now), run.place
    else:
        last, place = loading[-1]
    slots = sum(place.slots.limit for place in line.hot) or len(line.ends) + len(loading)
    stay = line.occupancy or stay_seconds(place, entry.request.prompt_tokens, entry.output)
    return last + (further + 1) * stay / slots, place


def _ending(line: Line, start: int, most: int, away: list[int]) -> list[tuple[float, int, Running]]:
    """So many of the ends from a position on, those that are away not counted."""
    if not away:
        return line.ends[start : start + most]
    for index in away:
        start += index <= start
    found = (index for index in range(start, len(line.ends)) if index not in away)
    return [line.ends[index] for index in islice(found, most)]


def _away(line: Line, now: float) -> list[int]:
    """Which of the ends free no slot for this line: the agent is out of rotation, or makes way."""
    found = []
    for place in line.away:
        if place.draining_until > now or not place.machine.routable:
            for run in place.running.values():
                index = bisect_left(line.ends, (run.ends_at, run.number))
                if index < len(line.ends) and line.ends[index][2] is run:
                    found.append(index)
    found.sort()
    return found


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
