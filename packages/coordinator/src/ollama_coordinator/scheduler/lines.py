"""The waiting lines of all models, and for each of them the places that come into question."""

from bisect import insort
from collections import defaultdict
from collections.abc import Iterable
from heapq import nsmallest

from .demand import Demand
from .fleet import Machine, Place
from .line import Line, load_seconds
from .mirror import Mirror
from .options import serves
from .slots import EMBEDDING_EXTRA
from .types import Kind, Request, RunnerOptions

REFRESH_SECONDS = 15.0
FORGET_SECONDS = 10.0
MANY_LINES = 512


class Lines:
    """Lines by model and options."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror
        self._lines: dict[tuple[str, RunnerOptions], Line] = {}
        self._of_model: defaultdict[str, list[Line]] = defaultdict(list)
        self.demands: dict[str, Demand] = {}

    def __contains__(self, key: tuple[str, RunnerOptions]) -> bool:
        return key in self._lines

    def get(self, request: Request, options: RunnerOptions, now: float) -> Line:
        """The line of a request whose options are normal."""
        key = (request.model, options)
        line = self._lines.get(key)
        if line is None:
            if len(self._lines) >= MANY_LINES:
                self._forget(now)
            demand = self.demands.setdefault(request.model, Demand())
            line = self._lines[key] = Line(request.model, options, demand)
            self._of_model[request.model].append(line)
        if request.kind is Kind.EMBED and not line.embeds:
            line.embeds, line.fresh_until = True, now
        line.used_at = now
        return line

    def _forget(self, now: float) -> None:
        """Clients may send any options: lines that nobody used for long are dropped."""
        for key, line in list(self._lines.items()):
            if not line.size and not line.ends and now - line.used_at > FORGET_SECONDS:
                del self._lines[key]
                self._of_model[line.model].remove(line)

    def waiting(self) -> list[Line]:
        """Those in which somebody waits, the most urgent first."""
        return sorted((line for line in self._lines.values() if line.size), key=_due)

    def wanting(self, machine: Machine, most: int) -> list[Line]:
        """Those of them that the machine could load the model for, the most urgent first."""
        places = machine.places
        lines = [line for line in self._lines.values() if line.size and line.model in places]
        return nsmallest(most, lines, key=_due)

    def of(self, models: Iterable[str]) -> Iterable[Line]:
        """Every line of these models."""
        for model in models:
            if model in self._of_model:
                yield from self._of_model[model]

    def backlog(self, model: str) -> bool:
        """Whether anybody waits for this model."""
        return any(line.size for line in self.of((model,)))

    def moved(self, place: Place) -> None:
        """What is in memory there has changed: this place alone is sorted anew in its lines."""
        for line in self.of(place.names):
            if line.drop(place):
                self._insert(line, place)
                line.futile = (0.0, 0.0)
            else:
                line.fresh_until = float("-inf")

    def drained(self, machine: Machine) -> None:
        """Places there take no new requests for a while: slots that get free are others' now."""
        for place in machine.residents:
            for line in self.of(place.names):
                line.away.add(place)

    def refresh(self, line: Line, now: float) -> None:
        """Sort the places of a line's model into in memory, being loaded, and on disk only.

        A place where the model failed a moment ago comes into question only when no other does.
        """
        if now < line.fresh_until:
            return
        line.fresh_until = now + REFRESH_SECONDS
        ready: list[Place] = []
        failed: list[Place] = []
        for place in self._mirror.places(line.model):
            if not place.machine.routable:
                continue
            cooldown = place.machine.agent.model_cooldowns.get(line.model)
            if cooldown is None or cooldown.until <= now:
                ready.append(place)
            else:
                line.fresh_until = min(line.fresh_until, cooldown.until)
                failed.append(place)
        self._sort(line, ready or failed, now)

    def _sort(self, line: Line, places: list[Place], now: float) -> None:
        line.hot, line.loading, line.cold = [], [], []
        line.futile = (0.0, 0.0)
        line.guesses = any(place.slots.fixed is None for place in places)
        line.away = {
            run.place
            for _, _, run in line.ends
            if not run.place.machine.routable or run.place.draining_until > now
        }
        for place in places:
            if line.embeds and not place.slots.extra:
                place.slots.fix(1, extra=EMBEDDING_EXTRA)
                for other in self.of(place.names):
                    other.rearranged()
            if (places_alike := _part(line, place)) is not None:
                places_alike.append(place)
        line.cold.sort(key=load_seconds)
        line.could_load = set(line.cold)
        line.rearranged()

    def _insert(self, line: Line, place: Place) -> None:
        """Put a place where `_sort` would have put it."""
        part = _part(line, place)
        if part is line.cold:
            insort(part, place, key=_load_and_id)
            line.could_load.add(place)
        elif part is not None:
            insort(part, place, key=_id)
        line.rearranged()


def _due(line: Line) -> float:
    return line.due


def _part(line: Line, place: Place) -> list[Place] | None:
    """Which part of its line a place belongs to: none while it loads with other options."""
    loading = place.loading_until is not None
    if not (loading or place.resident):
        return line.cold
    fits = serves(
        place.options,
        line.options,
        context=place.context,
        default_context=place.machine.context_length,
    )
    if fits:
        return line.loading if loading else line.hot
    return None if loading else line.cold


def _id(place: Place) -> str:
    return place.machine.id


def _load_and_id(place: Place) -> tuple[float, str]:
    return load_seconds(place), place.machine.id
