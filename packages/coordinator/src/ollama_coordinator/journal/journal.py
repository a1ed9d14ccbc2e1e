"""Every request: those in progress, those that ended last, and what each cost the statistics.

The request path calls `follow` once per request and `leased` once per attempt; everything else is
derived when somebody asks.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice

from msgspec import structs

from ollama_coordinator.dispatch import Dispatch, HandedOver, Held
from ollama_coordinator.scheduler import Form, Kind, Lease, Request, SchedulerError, Waiting
from ollama_coordinator.scheduler.eligibility import eligible
from ollama_coordinator.scheduler.explain import Decision
from ollama_coordinator.traces import RequestTrace
from ollama_coordinator_common.error import OllamaCoordinatorError

from .entry import Ended, JournalAttempt, JournalEntry, RequestState, RequestView, finished
from .sampler import Sampler

REMEMBERED = 500
"""Finished requests kept in memory with their reasons; older ones are read from the database."""

LONG_QUEUE = 100
"""A queue of so many is predicted once a second only: each prediction costs some microseconds."""

CLIENT_LEFT = 499
"""The status of a request whose client disconnected, as nginx logs it."""


class Journal:
    """The requests in progress by id (`live`), and the last that ended (`recent`, oldest first).

    `status_of` gives the HTTP status of an error.
    """

    def __init__(
        self,
        dispatch: Dispatch,
        sampler: Sampler,
        status_of: Callable[[OllamaCoordinatorError], int],
    ) -> None:
        self._dispatch = dispatch
        self._registry = dispatch.registry
        self._clock = dispatch.clock
        self._sampler = sampler
        self._status_of = status_of
        self._queued: dict[str, Waiting] = {}
        self._queued_at = 0.0
        self._refusals: dict[str, tuple[int, dict[str, str]]] = {}
        self._stepped_by = 0.0
        self._is_over = False
        self.live: dict[str, JournalEntry] = {}
        self.recent: deque[Ended] = deque(maxlen=REMEMBERED)

    # ── what the request path reports ─────────────────────────────────────────────────────────

    @contextmanager
    def follow(
        self, request: Request, path: str, trace: RequestTrace | None = None
    ) -> Iterator[JournalEntry]:
        """Keep a request as long as the block runs; an error that leaves it is its end."""
        entry = self.live[request.id] = JournalEntry(request, path, trace)
        try:
            yield entry
        except BaseException as raised:
            entry.is_elsewhere = entry.is_elsewhere or isinstance(raised, HandedOver)
            self._ended(entry, *self._reason(raised))
            raise
        self._ended(entry, None, "")

    def leased(self, entry: JournalEntry, held: Held) -> None:
        """An attempt got a slot. The decision is explained once the request is on its way."""
        refused = self._refused(held.lease.request, held.lease.granted_at)
        loads = not held.agent.inventory.is_loaded(held.lease.request.model)
        attempt = JournalAttempt(held, None, refused, loads, rule=self._dispatch.scheduler.rule)
        entry.attempts.append(attempt)
        entry.counted = 0
        asyncio.get_running_loop().call_soon(self._explain, attempt)

    def passed_on(self, entry: JournalEntry, held: Held, tokens: int) -> None:
        """The client has so many tokens of an attempt that broke off: another one goes on."""
        self._sampler.count(entry)
        held.passed_on, entry.counted = tokens, 0

    def _explain(self, attempt: JournalAttempt) -> None:
        """The estimates of the other candidates are those of this moment, not of the end."""
        scheduler, lease_id = self._dispatch.scheduler, attempt.held.lease.id
        attempt.decision = scheduler.account(lease_id)
        attempt.first_byte_at = scheduler.first_byte_at(lease_id)
        self._predict(attempt, attempt.held.lease)

    def _predict(self, attempt: JournalAttempt, lease: Lease) -> None:
        """When an answer in one piece is written, and when it is there."""
        request, decision = lease.request, attempt.decision
        if request.form is Form.STREAM or request.kind is Kind.EMBED:
            return
        attempt.ends_at = attempt.first_byte_at
        chosen = decision.candidate if decision is not None else None
        if decision is None or chosen is None:
            return
        attempt.writes_at = lease.granted_at + chosen.load_seconds + chosen.prefill_seconds
        token = self._dispatch.scheduler.token_seconds(lease.agent_id, request.model)
        if attempt.ends_at is None and token is not None:
            attempt.ends_at = attempt.writes_at + decision.expected_output_tokens * token

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

    def _ended(self, entry: JournalEntry, http_status: int | None, error: str) -> None:
        del self.live[entry.request.id]
        if entry.is_elsewhere or (self._is_over and not entry.is_divided):
            return
        now = self._clock.now()
        last = finished(entry, self._clock, now, http_status=http_status, error=error)
        ended = Ended(last, entry.attempt_views(self._clock))
        if entry.trace is not None:
            entry.trace.ended(last)
        self.follow_clock()
        self.recent.append(ended)
        self._sampler.finished(entry, ended)

    def hand_over(self) -> None:
        """Record nothing any more but what runs in portions: another one goes on with the rest."""
        self._is_over = True

    def _reason(self, raised: BaseException) -> tuple[int, str]:
        if isinstance(raised, OllamaCoordinatorError):
            return self._status_of(raised), str(raised)
        if isinstance(raised, Exception):
            return 500, "internal error; the coordinator's log has it"
        return CLIENT_LEFT, str(raised) or "the client left"

    # ── what the API asks ─────────────────────────────────────────────────────────────────────

    def waiting(self) -> int:
        """How many requests have no slot."""
        return sum(entry.is_waiting() for entry in self.live.values())

    def _queue(self, now: float) -> dict[str, Waiting]:
        """The waiting requests by id; a long queue is predicted at most once a second."""
        if len(self._queued) < LONG_QUEUE or now - self._queued_at >= 1.0:
            waiting = self._dispatch.scheduler.waiting(now) if self.waiting() else ()
            self._queued = {one.request.id: one for one in waiting}
            self._queued_at = now
        return self._queued

    def views(self, now: float, *, most: int | None = None) -> list[RequestView]:
        """The requests in progress, the oldest `most`, with their position in the queue."""
        queue = self._queue(now)
        wakes = any(agent.woken_at is not None for agent in self._registry)
        views = []
        for entry in islice(self.live.values(), most):
            view = entry.view(self._clock, now)
            waits = view.state is RequestState.WAITING
            if waits and wakes:
                view = structs.replace(view, waits_for=self._woken_for(entry.request))
            queued = queue.get(entry.request.id) if waits else None
            if queued is not None:
                view = structs.replace(
                    view, position=queued.position, start_in_seconds=queued.start_in_seconds
                )
            views.append(view)
        return views

    def _woken_for(self, request: Request) -> str:
        """The name of the machine that is woken for a request that waits; empty for none."""
        servers = self._registry.servers(request.model)
        return next((agent.name for agent in servers if agent.woken_at is not None), "")

    def follow_clock(self) -> None:
        """Correct the times of what ended before the wall clock was set."""
        seconds = self._clock.stepped_by - self._stepped_by
        if seconds:
            self._stepped_by = self._clock.stepped_by
            ended = [one.moved(seconds) for one in self.recent]
            self.recent.clear()
            self.recent.extend(ended)

    def find_ended(self, request_id: str) -> Ended | None:
        """A request that ended, if it is among the last `REMEMBERED`."""
        return next((one for one in reversed(self.recent) if one.request.id == request_id), None)

    def explain(self, entry: JournalEntry, now: float) -> Decision | None:
        """What the scheduler would decide for a request now; `None` if it would refuse it."""
        try:
            return self._dispatch.scheduler.explain(entry.request, now)
        except SchedulerError:
            return None
