"""The one place that knows every request: the living, the last finished, and who hears of the end.

The request path calls `follow` once per request and `Following.leased` once per attempt; everything
else is derived when somebody looks.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from types import TracebackType

import msgspec
from msgspec import Struct

from ollama_coordinator.clock import Clock
from ollama_coordinator.db import Finished
from ollama_coordinator.dispatch import Dispatch, Held
from ollama_coordinator.registry import Registry
from ollama_coordinator.scheduler import Decision, Request, SchedulerError, Waiting
from ollama_coordinator.scheduler.eligibility import eligible
from ollama_coordinator_common.error import OllamaCoordinatorError

from .entry import Attempt, JournalAttempt, JournalEntry, RequestState, RequestView, finished

REMEMBERED = 500
"""How many finished requests stay in memory with their reasons."""

LONG_LINE = 100
CLIENT_LEFT = 499


class Ended(Struct, frozen=True):
    """A finished request with its attempts."""

    request: Finished
    attempts: list[Attempt]


class Following:
    """`with journal.follow(…) as entry:` the time in which a request lives."""

    __slots__ = ("_entry", "_journal")

    def __init__(self, journal: "Journal", entry: JournalEntry) -> None:
        self._journal = journal
        self._entry = entry

    def __enter__(self) -> "Following":
        return self

    def leased(self, held: Held) -> None:
        """The request has a place on an agent."""
        self._journal.leased(self._entry, held)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        raised: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._journal.ended(self._entry, raised)


class Journal:
    """Every request that lives, by id, and the last that ended. `listeners` hear of each end."""

    def __init__(
        self,
        registry: Registry,
        dispatch: Dispatch,
        clock: Clock,
        *,
        status_of: Callable[[OllamaCoordinatorError], int],
        listeners: Sequence[Callable[[JournalEntry, Ended], None]] = (),
    ) -> None:
        self._registry = registry
        self._dispatch = dispatch
        self._clock = clock
        self._status_of = status_of
        self._listeners = listeners
        self._places: dict[str, Waiting] = {}
        self._placed_at = 0.0
        self._refusals: dict[str, tuple[int, dict[str, str]]] = {}
        self.live: dict[str, JournalEntry] = {}
        self.recent: deque[Ended] = deque(maxlen=REMEMBERED)

    # ── what the request path tells ───────────────────────────────────────────────────────────

    def follow(self, request: Request, path: str) -> Following:
        """A request has arrived."""
        entry = self.live[request.id] = JournalEntry(request, path)
        return Following(self, entry)

    def leased(self, entry: JournalEntry, held: Held) -> None:
        """A request has a place. The decision is explained once the request is on its way."""
        refused = self._refused(held.lease.request, held.lease.granted_at)
        trial = JournalAttempt(held, None, refused)
        entry.trials.append(trial)
        entry.counted = 0
        asyncio.get_running_loop().call_soon(self._explain, trial)

    def _explain(self, trial: JournalAttempt) -> None:
        """The estimates of the other candidates are those of this moment, not of the end."""
        trial.decision = self._dispatch.scheduler.account(trial.held.lease.id)

    def _refused(self, request: Request, now: float) -> dict[str, str]:
        """The holders of a model that cannot serve it; looked up anew when the registry changed."""
        if request.excluded:
            return eligible(self._registry, request, now).refused
        changes, refused = self._refusals.get(request.model, (-1, {}))
        if changes != self._registry.changes:
            refused = eligible(self._registry, request, now).refused
            if len(self._refusals) > REMEMBERED:
                self._refusals.clear()
            self._refusals[request.model] = (self._registry.changes, refused)
        return refused

    def ended(self, entry: JournalEntry, raised: BaseException | None) -> None:
        """A request has its answer, an error, or nobody who wants it."""
        del self.live[entry.request.id]
        http_status, error = self._read(raised)
        now = self._clock.now()
        last = finished(entry, self._clock, now, http_status=http_status, error=error)
        ended = Ended(last, entry.attempts(self._clock))
        self.recent.append(ended)
        for listener in self._listeners:
            listener(entry, ended)

    def _read(self, raised: BaseException | None) -> tuple[int | None, str]:
        if raised is None:
            return None, ""
        if isinstance(raised, OllamaCoordinatorError):
            return self._status_of(raised), str(raised)
        if isinstance(raised, Exception):
            return 500, "internal error; the coordinator's log has it"
        return CLIENT_LEFT, str(raised) or "the client left"

    # ── what people ask ───────────────────────────────────────────────────────────────────────

    def waiting(self) -> int:
        """How many requests have no place."""
        return sum(entry.is_waiting() for entry in self.live.values())

    def _line(self, now: float) -> dict[str, Waiting]:
        """Places in the waiting line; a long one is not predicted anew within a second."""
        if len(self._places) < LONG_LINE or now - self._placed_at >= 1.0:
            waiting = self._dispatch.scheduler.waiting(now) if self.waiting() else ()
            self._places = {place.request.id: place for place in waiting}
            self._placed_at = now
        return self._places

    def views(self, now: float, *, most: int | None = None) -> list[RequestView]:
        """The living requests, at most so many, the oldest first, with their place in the line."""
        places = self._line(now)
        views = []
        for entry in islice(self.live.values(), most):
            view = entry.view(self._clock, now)
            place = places.get(entry.request.id) if view.state is RequestState.WAITING else None
            if place is not None:
                view = msgspec.structs.replace(
                    view, position=place.position, start_in_seconds=place.start_in_seconds
                )
            views.append(view)
        return views

    def find_ended(self, request_id: str) -> Ended | None:
        """A request that ended a while ago, if it is remembered."""
        return next((one for one in reversed(self.recent) if one.request.id == request_id), None)

    def explain(self, entry: JournalEntry, now: float) -> Decision | None:
        """What the scheduler would decide for a living request now, over all holders."""
        try:
            return self._dispatch.scheduler.explain(entry.request, now)
        except SchedulerError:
            return None
