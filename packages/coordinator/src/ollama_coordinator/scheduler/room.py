"""Making room for a model: whose loss costs least, and what it costs."""

from collections.abc import Callable, Mapping

from .demand import Demand
from .fleet import NOTHING_LEAVES, Machine, Place, Room
from .memory import Fit

SETTLE_SECONDS = 5.0
"""A model that was loaded a moment ago is not evicted: two models must not chase each other."""

KEEP_SECONDS = 1.0
DOUBT = 0.5


class Rooms:
    """Who would have to leave. Knows how much each model is wanted and where else it is."""

    def __init__(
        self,
        demands: Mapping[str, Demand],
        replicas: Callable[[str], int],
        backlog: Callable[[str], bool],
    ) -> None:
        self._demands = demands
        self._replicas = replicas
        self._backlog = backlog

    def make(self, place: Place, now: float) -> Room | None:
        """The cheapest room for the model on its machine; `None` while that is impossible.

        Kept for as long as nothing happens on the machine, a second at most; that there is none,
        for all models that are not smaller and until one may leave that was loaded a moment ago.
        """
        machine = place.machine
        kept, epoch = place.room, machine.epoch
        if kept is not None and kept[0] == epoch and now - kept[1] < KEEP_SECONDS:
            return kept[2]
        room = self._make(place, now)
        if room is not None:
            place.room = (epoch, now, room)
        elif not place.resident:
            machine.full = (epoch, _next_settled(machine, now), place.memory_bytes)
        return room

    def _make(self, place: Place, now: float) -> Room | None:
        machine = place.machine
        others = [other for other in machine.residents if other is not place]
        fit = fit_beside(place, others)
        if fit is Fit.YES or not others:
            return NOTHING_LEAVES
        idle = sorted(
            ((self.loss(other, now), index) for index, other in enumerate(others)
             if is_idle(other, now))
        )  # fmt: skip
        if fit is Fit.MAYBE:
            return self._perhaps(idle, others, now)
        return self._evict(place, others, idle)

    def _perhaps(
        self, idle: list[tuple[float, int]], others: list[Place], now: float
    ) -> Room | None:
        """Ollama decides; half of what the cheapest loss would cost, or of the wait for one."""
        if idle:
            return Room(penalty=DOUBT * idle[0][0])
        wait = min(other.remaining(now) for other in others)
        return Room(penalty=DOUBT * wait)

    def _evict(
        self, place: Place, others: list[Place], idle: list[tuple[float, int]]
    ) -> Room | None:
        """The cheapest first until it fits; then spare who need not have left, dearest first."""
        chosen: list[tuple[float, int]] = []
        for loss in idle:
            chosen.append(loss)
            if self._fits_without(place, others, chosen):
                break
        else:
            if len(chosen) < len(others):
                return None
        for loss in sorted(chosen, reverse=True):
            fewer = [kept for kept in chosen if kept is not loss]
            if fewer and self._fits_without(place, others, fewer):
                chosen = fewer
        victims = tuple(others[index] for _, index in chosen)
        return Room(victims=victims, penalty=sum(loss for loss, _ in chosen))

    def _fits_without(
        self, place: Place, others: list[Place], gone: list[tuple[float, int]]
    ) -> bool:
        leaving = {index for _, index in gone}
        stay = [other for index, other in enumerate(others) if index not in leaving]
        return fit_beside(place, stay) is not Fit.NO

    def loss(self, place: Place, now: float) -> float:
        """What it costs that this model leaves: its load, as likely as it is wanted again."""
        lost, replicas = 0.0, max(self._replicas(place.model), 1)
        for name in place.names:
            if (demand := self._demands.get(name)) is not None:
                lost += place.load * demand.wanted_again(now) / replicas
            if self._backlog(name):
                lost += place.load
        return lost


def fit_beside(place: Place, others: list[Place]) -> Fit:
    """Whether the model may be loaded beside these.

    If it does not fit after all, Ollama loads nothing until one of those in use is idle. Where the
    memory is known that is worth no attempt while anything runs; where not, nothing else can tell.
    """
    machine = place.machine
    beside = sum(other.memory_bytes for other in others)
    fit = machine.memory.fit(place.memory_bytes, beside, len(others) + 1)
    if fit is Fit.MAYBE and machine.running and machine.memory.total is not None:
        return Fit.NO
    return fit


def _next_settled(machine: Machine, now: float) -> float:
    """When the next model that was loaded a moment ago may leave."""
    settled = [place.loaded_at + SETTLE_SECONDS for place in machine.residents]
    return min((time for time in settled if time > now), default=float("inf"))


def is_idle(place: Place, now: float) -> bool:
    """Whether a resident model may be asked to leave."""
    return (
        not place.running
        and place.loading_until is None
        and (now - place.loaded_at >= SETTLE_SECONDS)
    )
