"""Room for a model: which idle models leave at once, and which busy ones are drained for it.

An eviction costs what the models that leave will be missed. A drain is for a model that would
otherwise never be loaded, because all that would have to leave is always in use.
"""

from collections.abc import Callable, Iterable, Mapping
from math import exp

from msgspec import Struct

from .memory import Fit
from .prompt_cache import PromptCaches
from .queue import FadingRate, Queue
from .state import NEVER, NO_EVICTION, Eviction, Machine, Place

# A model loaded a moment ago stays: two must not chase each other, a load takes 2 to 40 s.
SETTLE_SECONDS = 5.0
# An eviction is kept so long while nothing changes: only demand fades, over 120 s.
KEEP_SECONDS = 1.0
DOUBT = 0.5  # where Ollama decides itself, a loss is as likely as not
# A model starves once its first request waited for six of its loads, in these bounds:
SHORTEST_WAIT_SECONDS = 5.0
LONGEST_WAIT_SECONDS = 20.0
LOADS_TO_WAIT = 6.0
# Most answers end within a minute; one that does not must not keep an agent half empty.
LONGEST_DRAIN_SECONDS = 60.0
SHORTEST_DRAIN_SECONDS = 0.1  # A request that is late already is expected to end a moment from now
# Where nothing can be drained now, it is tried again at every fourth tick.
DRAIN_AGAIN_SECONDS = 2.0
REST_FACTOR = 20.0  # the rest after a drain, times what it took: at most 5 % of the time makes way
# An evicted model is missed if it is wanted within this time, some loads of a large one.
WANTED_SECONDS = 60.0


class Evictions:
    """The cheapest evictions: how much each model is wanted, where else it is, which ones wait."""

    def __init__(
        self,
        demands: Mapping[str, FadingRate],
        replicas: Callable[[str], int],
        backlog: Callable[[str], bool],
        caches: PromptCaches,
    ) -> None:
        self._demands = demands
        self._replicas = replicas
        self._backlog = backlog
        self._caches = caches

    def find(self, place: Place, now: float) -> Eviction | None:
        """The cheapest eviction so that the model fits; `None` while there is none.

        An eviction is kept while nothing happens on the machine, a second at most. That there is
        none is kept for all models that are not smaller, until another model has settled.
        """
        machine = place.machine
        known = place.known_eviction
        if known is not None and known.epoch == machine.epoch and now - known.at < KEEP_SECONDS:
            return known.eviction
        eviction = self._find(place, now)
        if eviction is not None:
            place.keep_eviction(eviction, now)
        elif not place.resident:
            machine.found_full(place.memory_bytes, _next_settled(machine, now))
        return eviction

    def _find(self, place: Place, now: float) -> Eviction | None:
        others = [other for other in place.machine.residents if other is not place]
        fit = fit_beside(place, others)
        if fit is Fit.YES or not others:
            return NO_EVICTION
        idle = sorted(
            (self.loss(other, place, now), index)
            for index, other in enumerate(others)
            if _is_idle(other, now)
        )
        if fit is Fit.NO:
            return self._evict(place, others, idle)
        # Ollama decides: half of the cheapest loss, or of the wait for a model in use.
        if idle:
            return Eviction(penalty=DOUBT * idle[0][0])
        return Eviction(penalty=DOUBT * min(other.remaining(now) for other in others))

    def _evict(
        self, place: Place, others: list[Place], idle: list[tuple[float, int]]
    ) -> Eviction | None:
        """The cheapest first until it fits; then spare what need not have left, dearest first."""
        chosen: list[tuple[float, int]] = []
        for loss in idle:
            chosen.append(loss)
            if _fits_without(place, others, chosen):
                break
        else:
            if len(chosen) < len(others):
                return None
        for loss in sorted(chosen, reverse=True):
            fewer = [kept for kept in chosen if kept is not loss]
            if fewer and _fits_without(place, others, fewer):
                chosen = fewer
        victims = tuple(others[index] for _, index in chosen)
        return Eviction(victims=victims, penalty=sum(loss for loss, _ in chosen))

    def loss(self, place: Place, coming: Place, now: float) -> float:
        """The seconds that it costs if this model leaves for the one that is `coming`.

        That is its load, times the probability that it is wanted again, by its copies in memory;
        and the whole load again where requests wait for it. A conversation that goes on here waits
        for the load of the other model too, and reads again what it has in the cache.
        """
        lost, replicas = 0.0, max(self._replicas(place.model), 1)
        for name in place.names:
            if (demand := self._demands.get(name)) is not None:
                lost += place.load * wanted_again(demand, now) / replicas
            if self._backlog(name):
                lost += place.load
        ends = 1.0
        for one in self._caches.under_way(place, now):
            goes_on = one.goes_on(now)
            ends *= 1 - goes_on
            lost += goes_on * one.tokens * place.prefill
        return lost + (1 - ends) * coming.load / replicas


def wanted_again(demand: FadingRate, now: float) -> float:
    """The probability of another request within `WANTED_SECONDS`."""
    return 1.0 - exp(-demand.per_second(now) * WANTED_SECONDS)


def fit_beside(place: Place, others: list[Place]) -> Fit:
    """Whether the model may be loaded beside these.

    If it does not fit after all, Ollama loads nothing until one of those in use is idle. Where the
    memory is known, that is worth no attempt while anything runs; elsewhere only a try shows it.
    """
    machine = place.machine
    beside = sum(other.memory_bytes for other in others)
    fit = machine.memory.fit(place.memory_bytes, beside, len(others) + 1)
    if fit is Fit.MAYBE and machine.running and machine.memory.total is not None:
        return Fit.NO
    return fit


def _fits_without(place: Place, others: list[Place], gone: list[tuple[float, int]]) -> bool:
    leaving = {index for _, index in gone}
    stay = [other for index, other in enumerate(others) if index not in leaving]
    return fit_beside(place, stay) is not Fit.NO


def _next_settled(machine: Machine, now: float) -> float:
    """When the next model that was loaded a moment ago may leave."""
    settled = [place.loaded_at + SETTLE_SECONDS for place in machine.residents]
    return min((time for time in settled if time > now), default=float("inf"))


def _is_idle(place: Place, now: float) -> bool:
    """Whether a model in memory may be asked to leave."""
    return (
        not place.running
        and place.loading_until is None
        and (now - place.loaded_at >= SETTLE_SECONDS)
    )


class Drain(Struct):
    """Victims that take nothing new until the model of `place` is loaded; times are monotonic."""

    queue: Queue
    place: Place
    victims: tuple[Place, ...]
    since: float
    until: float

    def predict(self, now: float) -> None:
        """Each victim may take what ends before it is empty, and before the drain is over."""
        for victim in self.victims:
            if victim.running:
                end = max(now + victim.remaining(now), now + SHORTEST_DRAIN_SECONDS)
                victim.drain(min(end, self.until))

    def is_over(self, now: float) -> bool:
        """Whether the load has begun, or the drain is pointless."""
        machine = self.place.machine
        loads = machine.reserved is not self.place
        return loads or not self.queue.size or now >= self.until or not machine.routable


class Drains:
    """The drains under way: at most one for a queue and one on a machine."""

    def __init__(self) -> None:
        self._drains: list[Drain] = []

    def consider(self, queue: Queue, now: float) -> Place | None:
        """Start a drain if this queue has starved for long enough; the place it is for, if so."""
        if queue.hot or queue.loading or not queue.cold or not queue.size or now < queue.drain_at:
            return None
        if any(drain.queue is queue for drain in self._drains):
            return None
        waited = now - queue.at(0).request.arrived_at
        longest = min(LOADS_TO_WAIT * queue.quickest_load, LONGEST_WAIT_SECONDS)
        if waited < max(SHORTEST_WAIT_SECONDS, longest):
            return None
        return self._start(queue, now)

    def _start(self, queue: Queue, now: float) -> Place | None:
        """Drain where the model will be in memory soonest."""
        excluded = queue.at(0).request.excluded
        options = [
            (seconds + place.load, index, victims)
            for index, place in enumerate(queue.cold)
            if place.machine.id not in excluded
            and _may_drain(place.machine, now)
            and (found := _victims(place, now)) is not None
            for seconds, victims in (found,)
        ]
        if not options:
            queue.drain_later(now + DRAIN_AGAIN_SECONDS)
            return None
        _, index, victims = min(options)
        place = queue.cold[index]
        until = now + LONGEST_DRAIN_SECONDS
        empty = now + max((victim.remaining(now) for victim in victims), default=0.0)
        place.machine.reserve(place)
        for victim in victims:
            victim.drain(min(max(empty, now + SHORTEST_DRAIN_SECONDS), until))
        self._drains.append(Drain(queue, place, victims, now, until))
        return place

    def settle(self, now: float) -> Iterable[Drain]:
        """End the drains that are over and return them; predict the ends of the others anew."""
        over = [drain for drain in self._drains if drain.is_over(now)]
        for drain in over:
            self._drains.remove(drain)
            for victim in drain.victims:
                victim.drain(NEVER)
            took = now - drain.since + drain.place.load
            drain.place.machine.drain_ended(drain.place, now + REST_FACTOR * took)
        for drain in self._drains:
            drain.predict(now)
        return over


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
