"""How fast models write on their agents now, as they would alone, for whoever watches over them.

What the scheduler learns serves its predictions: it learns at the end of an answer, and a machine
that became slow has answers that end late, and few. Streams show their speed while they run.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from msgspec import Struct

from ollama_coordinator.dispatch import Held
from ollama_coordinator.scheduler import LeaseId, Result
from ollama_coordinator_common.types import AgentId

from .entry import JournalAttempt, JournalEntry

ENOUGH_SECONDS = 10.0
ENOUGH_TOKENS = 20.0
"""So much writing tells a speed: the newest of it alone counts. Tool calls come as one record each:
few answers have so many of them in a row."""

KEPT_SECONDS = 600.0
"""An older measurement says nothing about now."""

BATCH_FACTOR = 0.4
"""One more request slows each other one so much, at most. Where it slows them more, as on a CPU,
all together still write as fast as one alone, and the speed comes out as no less than 0.4 of it."""

SHORT_STRETCH_SECONDS = 0.5
"""Shorter ones become one: a busy fleet has thousands of them a second."""

LONGEST_STRETCH_SECONDS = 5.0
"""A longer time without a token is a pause: of a stopped coordinator, or a call that is written."""

MOST_RECORDS = 1000
"""What lies between us and a client holds so many records: it makes us read more slowly only after
these, however slowly it reads."""

LONG_PROMPT_TOKENS = 8000
"""Behind a longer prompt each token takes more time, on a machine that is well too."""

FEWEST_TOKENS = 8
"""An answer of fewer tokens is mostly overhead."""

MOST_DISTURBED = 0.2
"""An answer beside which prompts were read for a larger share of its time shows no speed."""


MOST_LATE = 100
LATE_IN_A_ROW = 2
"""So many requests that waited there in vain, with no answer between, are no odd request."""


class Lateness(NamedTuple):
    """So many requests in a row went elsewhere as no answer came in time, in so many seconds."""

    requests: int
    seconds: float


class _Stretch(NamedTuple):
    """So many tokens were written in so many seconds, as alone, until `at`."""

    tokens: float
    seconds: float
    at: float

    def and_then(self, other: "_Stretch") -> "_Stretch":
        """The two as one."""
        return _Stretch(self.tokens + other.tokens, self.seconds + other.seconds, other.at)


class _Seen(Struct):
    """An attempt at its last sample: `silent` seconds after its last token.

    `pending` is a stretch that counts if the next one goes on. The seconds since it was first seen:
    of all, times the attempts beside it, and with a prompt that was read beside it.
    """

    held: Held
    records: int
    silent: float = 0.0
    goes_on: bool = False
    pending: _Stretch | None = None
    is_counted: bool = False
    seconds: float = 0.0
    beside: float = 0.0
    disturbed: float = 0.0


class Speeds:
    """`sample` and `ended` take measurements, `recent` is the speed of a model on an agent.

    An answer in one piece shows its speed at its end only, and where another agent is well it does
    not come to that: `lateness` tells it.
    """

    def __init__(self) -> None:
        self._recent: defaultdict[tuple[AgentId, str], deque[_Stretch]] = defaultdict(deque)
        self._seen: dict[LeaseId, _Seen] = {}
        self._late: defaultdict[tuple[AgentId, str], list[float]] = defaultdict(list)
        self._running: dict[AgentId, int] = {}
        self._at = float("-inf")

    def recent(self, agent_id: AgentId, key: str, now: float) -> float | None:
        """Tokens a second; `None` where too little was written to tell."""
        known = self._recent.get((agent_id, key))
        if not known or now - known[-1].at > KEPT_SECONDS:
            return None
        tokens, seconds = _sums(known)
        return _middle(known, tokens) if _is_enough(tokens, seconds) else None

    def lateness(self, agent_id: AgentId, key: str, now: float) -> Lateness | None:
        """Whether requests of a model are in vain there, one after the other."""
        late = self._late.get((agent_id, key), [])
        if len(late) < LATE_IN_A_ROW or now - late[-1] > KEPT_SECONDS:
            return None
        return Lateness(len(late), late[-1] - late[0])

    def sample(self, live: Iterable[JournalEntry], now: float) -> None:
        """Look at the requests in progress (monotonic seconds)."""
        since, self._at = now - self._at, now
        by_agent: defaultdict[AgentId, list[tuple[Held, bool]]] = defaultdict(list)
        for entry in live:
            if entry.attempts and not (held := entry.attempts[-1].held).ended:
                by_agent[held.agent.id].append((held, _is_writing(entry.attempts[-1], now)))
        before, self._seen = self._seen, {}
        self._running = {agent_id: len(attempts) for agent_id, attempts in by_agent.items()}
        for attempts in by_agent.values():
            reading, beside = sum(not writes for _, writes in attempts), len(attempts) - 1
            for held, writes in attempts:
                seen = before.get(held.lease.id)
                if seen is None:
                    seen = _Seen(held, held.records)
                else:
                    self._look(held, seen, since, beside, disturbed=reading > (not writes))
                self._seen[held.lease.id] = seen
        for lease_id in before.keys() - self._seen.keys():
            self._note_end(before[lease_id].held, now)

    def _note_end(self, held: Held, now: float) -> None:
        """An attempt ended: well, in vain, or in a way that says nothing."""
        pair, result = (held.agent.id, held.lease.request.model), held.outcome.result
        if result is Result.SERVED:
            self._late.pop(pair, None)
        elif result is Result.TAKEN_BACK or (held.late and result is not Result.CANCELLED):
            late = self._late[pair]
            # Those that waited at the same time are one trouble.
            if not late or held.lease.granted_at >= late[-1]:
                late.append(now)
                del late[:-MOST_LATE]

    def _look(self, held: Held, seen: _Seen, since: float, beside: int, *, disturbed: bool) -> None:
        """A stretch counts between two others: it is neither a start, an end nor a pause."""
        seen.seconds += since
        seen.beside += beside * since
        seen.disturbed += disturbed * since
        tokens, seconds = held.records - seen.records, seen.silent + since
        seen.records, seen.silent = held.records, 0.0 if tokens else seconds
        if disturbed or seconds > LONGEST_STRETCH_SECONDS:
            seen.goes_on, seen.pending = False, None
        elif tokens:
            if seen.pending is not None:
                self._note(held, seen.pending)
                seen.is_counted = True
            is_whole = seen.goes_on and held.records <= MOST_RECORDS
            seen.pending = _stretch(tokens, seconds, beside, self._at) if is_whole else None
            seen.goes_on = True

    def ended(self, entry: JournalEntry, now: float) -> None:
        """A request ended: what it shows if no stretch of it did."""
        held = entry.held
        if held is None or entry.is_divided:
            return
        seen = self._seen.pop(held.lease.id, None)
        self._note_end(held, now)
        if held.outcome.result is not Result.SERVED:
            return
        agent_id = held.agent.id
        beside = max(self._running.get(agent_id, 0) - 1.0, 0.0)
        if seen is None:
            seen = _Seen(held, 0)
        elif seen.seconds:
            beside = seen.beside / seen.seconds
        if seen.is_counted or seen.disturbed > MOST_DISTURBED * seen.seconds:
            return
        for tokens, seconds in _written(held, now):
            self._note(held, _stretch(tokens, seconds, beside, now))

    def _note(self, held: Held, stretch: _Stretch) -> None:
        request = held.lease.request
        if request.prompt_tokens > LONG_PROMPT_TOKENS:
            return
        known = self._recent[held.agent.id, request.model]
        if known and known[-1].seconds < SHORT_STRETCH_SECONDS:
            known[-1] = known[-1].and_then(stretch)
            return
        known.append(stretch)
        tokens, seconds = _sums(known)
        while _is_enough(tokens := tokens - known[0].tokens, seconds := seconds - known[0].seconds):
            known.popleft()

    def forget(self, agent_id: AgentId) -> None:
        """The agent was removed."""
        for pair in [pair for pair in {*self._recent, *self._late} if pair[0] == agent_id]:
            self._recent.pop(pair, None)
            self._late.pop(pair, None)


def _is_writing(attempt: JournalAttempt, now: float) -> bool:
    """Whether its prompt is read; an answer in one piece is written when it was predicted to be."""
    writes_at = attempt.writes_at
    return attempt.held.began_at is not None or (writes_at is not None and now >= writes_at)


def _sums(stretches: Iterable[_Stretch]) -> tuple[float, float]:
    """Their tokens and seconds."""
    return sum(one.tokens for one in stretches), sum(one.seconds for one in stretches)


def _is_enough(tokens: float, seconds: float) -> bool:
    return tokens >= ENOUGH_TOKENS and seconds >= ENOUGH_SECONDS


def _middle(stretches: Iterable[_Stretch], tokens: float) -> float:
    """The speed than which half of the tokens were written more slowly: pauses hardly move it."""
    left = tokens / 2
    for one in sorted(stretches, key=_speed):
        left -= one.tokens
        if left <= 0:
            break
    return _speed(one)


def _speed(stretch: _Stretch) -> float:
    return stretch.tokens / stretch.seconds


def _stretch(tokens: float, seconds: float, beside: float, at: float) -> _Stretch:
    """What one attempt wrote in seconds that it shared with those beside it."""
    share = 1 / (1 + beside)
    return _Stretch(tokens * (1 + BATCH_FACTOR * beside) * share, seconds * share, at)


def _written(held: Held, now: float) -> Iterator[tuple[int, float]]:
    """The tokens of an answer and the seconds of their writing, where both are known."""
    timings = held.outcome.timings
    if timings is None or timings.output_tokens < FEWEST_TOKENS:
        return
    if timings.output_seconds:
        yield timings.output_tokens, timings.output_seconds
    elif held.records and held.began_at is not None and now > held.began_at:
        yield timings.output_tokens, now - held.began_at
