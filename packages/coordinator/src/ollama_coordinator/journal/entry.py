"""The life of one request, derived from what the request path counts anyway.

An entry keeps the attempts (`Held`) of a request and derives everything from them when somebody
asks, so that a streamed token costs nothing here. It never contains prompts or answers.
"""

from datetime import datetime, timedelta
from enum import Enum
from functools import lru_cache

from msgspec import Struct, structs

from ollama_coordinator.clock import Clock
from ollama_coordinator.db import Finished, Status
from ollama_coordinator.dispatch import Held
from ollama_coordinator.scheduler import Lane, Outcome, Request, RequestId, Result, Timings
from ollama_coordinator.scheduler.explain import Decision
from ollama_coordinator.traces import RequestTrace
from ollama_coordinator_common.names import ModelName
from ollama_coordinator_common.types import AgentId


class RequestState(Enum):
    """The state of a request in progress."""

    WAITING = "waiting"
    LOADING = "loading"
    READING = "reading"
    WRITING = "writing"


class Attempt(Struct, frozen=True, omit_defaults=True):
    """One attempt on one agent, and why on this one, as the API shows it.

    `rule` is what decided, in words. `decision` is what the scheduler compared, if it predicts.
    `refused` are the holders of the model that could not take the request, with the reason by their
    names. `runner` is the context that serves it, if that is larger than what it asked for.
    `continues`: so many tokens of the answer the client had already, from the attempts before.
    """

    agent_id: AgentId
    agent: str
    granted_at: datetime
    result: str | None = None
    reason: str = ""
    decision: Decision | None = None
    refused: dict[str, str] = {}
    runner: str = ""
    rule: str = ""
    continues: int = 0


class RequestView(Struct, frozen=True, kw_only=True):
    """A request in progress, as the API shows it; times are UTC. `tokens` counts records.

    `alias` is the name that the client asked for, where that stands for the model. `ends_at` is
    when the end of an answer in one piece is predicted: before it nothing of that is seen, so
    `writing` is a prediction too. `waits_for` names a machine that is woken for it.
    """

    id: str
    state: RequestState
    model: str
    path: str
    client: str
    arrived_at: datetime
    elapsed_seconds: float
    prompt_tokens: int
    lane: str = Lane.INTERACTIVE.value
    lane_reason: str = ""
    alias: str = ""
    agent_id: AgentId | None = None
    agent: str | None = None
    position: int | None = None
    start_in_seconds: float | None = None
    granted_at: datetime | None = None
    first_byte_at: datetime | None = None
    ends_at: datetime | None = None
    tokens: int = 0
    tokens_per_second: float | None = None
    attempts: int = 0
    waits_for: str = ""


class Ended(Struct, frozen=True):
    """A finished request with its attempts."""

    request: Finished
    attempts: list[Attempt]

    def moved(self, seconds: float) -> "Ended":
        """With its times so much later: the wall clock was set."""
        by = timedelta(seconds=seconds)
        attempts = [structs.replace(one, granted_at=one.granted_at + by) for one in self.attempts]
        return Ended(self.request.moved(by), attempts)


class JournalAttempt(Struct):
    """An attempt in progress or over, with what was known when its agent was chosen.

    `loads`: the model was not in memory there. `first_byte_at` is when its first byte was predicted
    (monotonic seconds). Of an answer in one piece, `writes_at` and `ends_at` are when its writing
    and its end were predicted. `rule` is that of the policy.
    """

    held: Held
    decision: Decision | None
    refused: dict[str, str]
    loads: bool = False
    first_byte_at: float | None = None
    writes_at: float | None = None
    ends_at: float | None = None
    rule: str = ""


class JournalEntry:
    """A request in progress. `counted` is how many of its tokens the statistics have already.

    `gpu_seconds`: how long its attempts held slots, those that have ended. `is_divided`: its
    attempts are those of its portions, some at the same time. `is_elsewhere`: another entry tells
    of its end. `trace`: its spans.
    """

    __slots__ = (
        "attempts",
        "counted",
        "gpu_seconds",
        "is_divided",
        "is_elsewhere",
        "path",
        "request",
        "trace",
    )

    def __init__(self, request: Request, path: str, trace: RequestTrace | None = None) -> None:
        self.trace = trace
        self.request = request
        self.path = path
        self.attempts: list[JournalAttempt] = []
        self.counted = 0
        self.gpu_seconds = 0.0
        self.is_divided = False
        self.is_elsewhere = False

    @property
    def passed_on(self) -> int:
        """The tokens that its client had from attempts which another one continued."""
        return sum(attempt.held.passed_on for attempt in self.attempts)

    def cancelled(self, reason: str) -> None:
        """An operator ended it while its answer waited to go on."""
        if self.held is not None:
            self.held.outcome = Outcome(Result.CANCELLED, reason)

    @property
    def held(self) -> Held | None:
        """The attempt in progress, or the last one."""
        if self.is_divided:
            under_way = (one.held for one in reversed(self.attempts) if not one.held.ended)
            return next(under_way, self.attempts[-1].held if self.attempts else None)
        return self.attempts[-1].held if self.attempts else None

    def end_with(self, portion: RequestId) -> None:
        """One portion ended it: its last attempt is the last one."""
        ids = [attempt.held.lease.request.id for attempt in self.attempts]
        if portion in ids:
            at = len(ids) - 1 - ids[::-1].index(portion)
            self.attempts.append(self.attempts.pop(at))

    def is_waiting(self) -> bool:
        """Whether it has no slot: not yet, or not since its last attempt failed."""
        return self.held is None or self.held.ended

    def state(self, now: float) -> RequestState:
        """The request's state at `now`, in monotonic seconds."""
        held = self.held
        if held is None or held.ended:
            return RequestState.WAITING
        if held.began_at is not None:
            return RequestState.WRITING
        if not held.agent.inventory.is_loaded(self.request.model):
            return RequestState.LOADING
        writes_at = self.attempts[-1].writes_at
        is_written = writes_at is not None and now >= writes_at
        return RequestState.WRITING if is_written else RequestState.READING

    def view(self, clock: Clock, now: float) -> RequestView:
        """The request as the API shows it, without its position in the queue."""
        request, held = self.request, self.held
        granted = held if held is not None and not held.ended else None
        began_at = granted.began_at if granted else None
        tokens = granted.records if granted else 0
        before = self.passed_on
        ends_at = self.attempts[-1].ends_at if granted and began_at is None else None
        return RequestView(
            id=request.id,
            state=self.state(now),
            model=short_name(request.model),
            path=self.path,
            client=request.client,
            arrived_at=clock.utc(request.arrived_at),
            elapsed_seconds=now - request.arrived_at,
            prompt_tokens=request.prompt_tokens,
            lane=request.lane.value,
            lane_reason=request.lane_reason,
            alias=request.alias,
            agent_id=granted.agent.id if granted else None,
            agent=granted.agent.name if granted else None,
            granted_at=clock.utc(granted.lease.granted_at) if granted else None,
            first_byte_at=clock.utc(began_at) if began_at is not None else None,
            ends_at=clock.utc(ends_at) if ends_at is not None else None,
            tokens=before + tokens,
            tokens_per_second=_rate(tokens, began_at, now),
            attempts=len(self.attempts),
        )

    def attempt_views(self, clock: Clock) -> list[Attempt]:
        """Every attempt so far, with its reasons, as the API shows it."""
        views, before = [], 0
        for attempt in self.attempts:
            views.append(_attempt_view(attempt, clock, before))
            before += attempt.held.passed_on
        return views


def _attempt_view(attempt: JournalAttempt, clock: Clock, before: int) -> Attempt:
    held = attempt.held
    return Attempt(
        agent_id=held.agent.id,
        agent=held.agent.name,
        granted_at=clock.utc(held.lease.granted_at),
        result=held.outcome.result.value if held.ended else None,
        reason=held.outcome.reason if held.ended else "",
        decision=attempt.decision,
        refused=attempt.refused,
        runner=held.note,
        rule=attempt.decision.rule if attempt.decision else attempt.rule,
        continues=before,
    )


def _rate(tokens: int, began_at: float | None, now: float) -> float | None:
    if began_at is None or not tokens or now <= began_at:
        return None
    return tokens / (now - began_at)


def _ending(entry: JournalEntry, http_status: int | None, error: str) -> tuple[Status, int, str]:
    """Its status, HTTP status and error: from the error that was raised, else the last attempt.

    `http_status` is that of the raised error; 499: the client left or an operator cancelled it.
    """
    held = entry.held
    if http_status is None and held is not None:
        result, http_status = held.outcome.result, held.status
        error = held.outcome.reason
        if result is Result.CANCELLED:
            http_status = http_status or 499
            return Status.CANCELLED, http_status, error
        if result not in (Result.SERVED, Result.REJECTED):
            return Status.FAILED, http_status or 503, error
    status = http_status or 500
    if status == 499:
        return Status.CANCELLED, status, error
    if status >= 500:
        return Status.FAILED, status, error
    return (Status.REFUSED if status >= 400 else Status.SERVED), status, error


def finished(
    entry: JournalEntry, clock: Clock, now: float, *, http_status: int | None, error: str
) -> Finished:
    """The row of a request that ended at `now`."""
    request, held = entry.request, entry.held
    status, http_status, error = _ending(entry, http_status, error)
    timings = held.outcome.timings if held is not None else None
    if entry.is_divided:
        timings = _sum(entry)
    before = entry.passed_on
    placed_at = _first(entry).lease.granted_at if held is not None else now
    streamed = held is not None and held.records + before > 0
    output = timings.output_tokens if timings is not None else held.records if held else None
    if held is not None and held.passed_on:
        output = 0  # `before` has them
    # A stream that ends without a count says nothing of its prompt, which had some tokens.
    prompt = max(timings.prompt_tokens - before, 0) or None if timings is not None else None
    return Finished(
        id=request.id,
        status=status,
        model=short_name(request.model),
        path=entry.path,
        client=request.client,
        arrived_at=clock.utc(request.arrived_at),
        finished_at=clock.utc(now),
        waited_seconds=placed_at - request.arrived_at,
        total_seconds=now - request.arrived_at,
        http_status=http_status,
        error=error[:500],
        agent_id=held.agent.id if held is not None else None,
        agent=held.agent.name if held is not None else None,
        attempts=len(entry.attempts),
        streamed=streamed,
        lane=request.lane.value,
        alias=request.alias,
        prompt_tokens=prompt,
        output_tokens=None if output is None else before + output,
        load_seconds=timings.load_seconds if timings is not None else None,
        first_token_seconds=_first_token(entry, now),
        tokens_per_second=_speed(held, now) if held is not None else None,
    )


def _sum(entry: JournalEntry) -> Timings | None:
    """The tokens of all portions, and the longest load."""
    of_all = [one.held.outcome.timings for one in entry.attempts]
    known = [timings for timings in of_all if timings is not None]
    if not known:
        return None
    read, wrote = sum(one.prompt_tokens for one in known), sum(one.output_tokens for one in known)
    loads = [one.load_seconds for one in known if one.load_seconds is not None]
    return Timings(read, wrote, load_seconds=max(loads, default=None))


def _first(entry: JournalEntry) -> Held:
    """The attempt that began the answer."""
    attempts = [attempt.held for attempt in entry.attempts]
    return next((held for held in attempts if held.passed_on), attempts[-1])


def _first_token(entry: JournalEntry, now: float) -> float | None:
    """Seconds to the first token: the first record, else the end less Ollama's output time."""
    held = _first(entry) if entry.attempts else None
    if held is None or held.began_at is None:
        return None
    if held.records:
        return held.began_at - entry.request.arrived_at
    timings = held.outcome.timings
    if timings is None or timings.output_seconds is None or not timings.output_tokens:
        return None
    return max(now - entry.request.arrived_at - timings.output_seconds, 0.0)


def _speed(held: Held, now: float) -> float | None:
    timings = held.outcome.timings
    if timings is not None and timings.output_seconds:
        return timings.output_tokens / timings.output_seconds
    return _rate(held.records, held.began_at, now)


@lru_cache(maxsize=4096)
def short_name(key: str) -> str:
    """The shortest name of a routing key."""
    return ModelName.parse(key).short


def tokens_of(held: Held) -> int:
    """What an attempt has read and written: as Ollama counted it, else as far as it was seen."""
    timings = held.outcome.timings
    if timings is not None:
        return timings.prompt_tokens + timings.output_tokens
    return 0 if held.began_at is None else held.lease.request.prompt_tokens + held.records
