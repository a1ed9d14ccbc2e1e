"""Draining: busy models make way for one that would otherwise never be loaded."""

from collections.abc import Iterable

from msgspec import Struct

from .fleet import Machine, Place
from .line import Line
from .memory import Fit
from .room import fit_beside

SHORTEST_WAIT_SECONDS = 5.0
LONGEST_WAIT_SECONDS = 20.0
LOADS_TO_WAIT = 6.0
LONGEST_DRAIN_SECONDS = 60.0
RETRY_SECONDS = 2.0
"""Where nothing can be drained now it is not looked for again at once."""

REST_FACTOR = 20.0
"""After a drain an agent serves in peace for this many times what the drain and load took."""


class Drain(Struct):
    """Places that take nothing new until the model they make way for is loaded."""

    line: Line
    place: Place
    victims: tuple[Place, ...]
    since: float
    until: float


class Drains:
    """The drains under way: at most one for a line and one on a machine."""

    def __init__(self) -> None:
        self._drains: list[Drain] = []

    def consider(self, line: Line, now: float) -> Place | None:
        """Start a drain if this line has starved for long enough; where, if so."""
        if line.hot or line.loading or not line.cold or not line.size or now < line.drain_at:
            return None
        if any(drain.line is line for drain in self._drains):
            return None
        waited = now - line.at(0).request.arrived_at
        patience = min(LOADS_TO_WAIT * line.quickest_load, LONGEST_WAIT_SECONDS)
        if waited < max(SHORTEST_WAIT_SECONDS, patience):
            return None
        return self._start(line, now)

    def _start(self, line: Line, now: float) -> Place | None:
        excluded = line.at(0).request.excluded
        options = [
            (seconds + place.load, index, victims)
            for index, place in enumerate(line.cold)
            if place.machine.id not in excluded
            and _may_drain(place.machine, now)
            and (found := _victims(place, now)) is not None
            for seconds, victims in (found,)
        ]
        if not options:
            line.drain_at = now + RETRY_SECONDS
            return None
        _, index, victims = min(options)
        place = line.cold[index]
        until = now + LONGEST_DRAIN_SECONDS
        predicted = now + max((victim.remaining(now) for victim in victims), default=0.0)
        place.machine.reserved = place
        for victim in victims:
            victim.draining_until = min(max(predicted, now + 0.1), until)
        self._drains.append(Drain(line, place, victims, now, until))
        return place

    def settle(self, now: float) -> Iterable[Drain]:
        """End the drains that have reached their aim, or cannot any more; these are returned."""
        over = [drain for drain in self._drains if _is_over(drain, now)]
        for drain in over:
            self._drains.remove(drain)
            machine = drain.place.machine
            if machine.reserved is drain.place:
                machine.reserved = None
            for victim in drain.victims:
                victim.draining_until = float("-inf")
            took = now - drain.since + drain.place.load
            machine.drain_from = now + REST_FACTOR * took
        for drain in self._drains:
            for victim in drain.victims:
                if victim.running:
                    left = now + victim.remaining(now)
                    victim.draining_until = min(max(left, now + 0.1), drain.until)
        return over


def _is_over(drain: Drain, now: float) -> bool:
    machine = drain.place.machine
    loaded = machine.reserved is not drain.place
    return loaded or not drain.line.size or now >= drain.until or not machine.routable


def _may_drain(machine: Machine, now: float) -> bool:
    return machine.loading is None and machine.reserved is None and now >= machine.drain_from


def _victims(place: Place, now: float) -> tuple[float, tuple[Place, ...]] | None:
    """The places that free enough memory soonest, and how soon; itself, if it must be reloaded."""
    machine = place.machine
    if place.resident:
        return place.remaining(now), (place,)
    stay = [other for other in machine.residents if other is not place]
    stay.sort(key=lambda other: other.remaining(now), reverse=True)
    gone: list[Place] = []
    while stay and fit_beside(place, stay) is Fit.NO:
        gone.append(stay.pop())
    if not gone:
        return None
    return max(victim.remaining(now) for victim in gone), tuple(gone)
