"""Limits of keys and of names: requests a minute, at once, and tokens and GPU-seconds a day.

What counts is taken from leases: their tokens and their seconds, each once, when they end. Until
then a request holds back what it will probably use, so that many at once do not pass a limit
together. A request that is given up pays for what it got.
"""

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import msgspec
from msgspec import Struct, structs

from ollama_coordinator.db import Store
from ollama_coordinator_common.error import ConfigError

from .caller import Caller, Denied
from .keys import NO_LIMITS, Key, KeyCounts, KeyLimits

log = logging.getLogger(__name__)

MINUTE, DAY = 60.0, 86_400.0

UNKNOWN_TOKENS = 256
"""Held back for an answer whose length its client does not limit: a short chat's."""

MOST_TOKENS = 8192
"""Held back at most: clients give limits that no answer reaches."""

DOCUMENT = "limits"
"""Under which name the day's sums are in the database: a JSON object of key ids and names."""

MOST_NAMES = 4096
"""Whose use is counted: of more, that of the name that was silent for longest is forgotten."""


class NameLimits(Struct, frozen=True):
    """The limits of each client whose name a pattern means, in any letter case; `*` is any text."""

    pattern: str
    limits: KeyLimits


def limits_of_names(text: str) -> tuple[NameLimits, ...]:
    """What `COORDINATOR_LIMITS` says, such as `*@school.example concurrent=1, guest* ...`.

    Raises:
        ConfigError: it means nothing.
    """
    found = []
    for part in text.split(","):
        words = part.split()
        values = dict(word.partition("=")[::2] for word in words if "=" in word)
        if not words:
            continue
        try:
            limits = msgspec.convert(values, KeyLimits, strict=False)
        except msgspec.ValidationError:
            limits = NO_LIMITS
        pattern = " ".join(words[: len(words) - len(values)])
        is_right = all(value >= 0 for value in structs.astuple(limits)) and "=" not in pattern
        if not pattern or limits == NO_LIMITS or not is_right:
            names = ", ".join(field.name for field in structs.fields(KeyLimits))
            raise ConfigError(
                "COORDINATOR_LIMITS",
                text,
                "give names, * for any text, each with its limits, and split by commas: "
                f"*@school.example concurrent=1 tokens_per_day=50000; limits are {names}",
            )
        found.append(NameLimits(pattern.lower(), limits))
    return tuple(found)


class DaySums(Struct):
    """What a key has used on one day of UTC, numbered from 1970 on."""

    day: int = 0
    tokens: int = 0
    gpu_seconds: float = 0.0


class Usage(Struct):
    """What a key uses now: its requests in progress, what they hold back, and the last minute's."""

    day: DaySums = msgspec.field(default_factory=DaySums)
    open: int = 0
    held_tokens: int = 0
    arrivals: deque[float] = msgspec.field(default_factory=deque)


class KeyUsage:
    """How much of its limits each key and each name has used.

    `counts`: by the names of keys. Operators alone make names, so that there are few. `of_names`:
    the limits of clients by their names; the first pattern that means a name counts.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._used: dict[str, Usage] = {}
        self.of_names: tuple[NameLimits, ...] = ()
        self.counts: dict[str, KeyCounts] = {}

    async def restore(self) -> None:
        """Take the day's sums over from the database; unreadable ones begin at nothing.

        Raises:
            DatabaseError: it cannot be read.
        """
        body = await self._store.document(DOCUMENT)
        try:
            days = msgspec.json.decode(body or b"{}", type=dict[str, DaySums])
        except msgspec.DecodeError as exc:
            log.warning("what keys used today is unreadable", extra={"reason": str(exc)})
            days = {}
        self._used = {key_id: Usage(day) for key_id, day in days.items()}

    @contextmanager
    def admitted(
        self,
        caller: Caller,
        prompt_tokens: int,
        output_limit: int | None,
        *,
        before: bool = False,
    ) -> Iterator["Account"]:
        """Count a request of a caller as long as the block runs.

        `before`: another coordinator has admitted it.

        Raises:
            Denied: 429, a limit is reached.
        """
        counts = None if caller.key is None else self.counts_of(caller.key)
        at = time.time()
        limited = list(self._limited(caller, at))
        try:
            for who, limits, used in limited:
                if not before:
                    _check(who, limits, used, at)
        except Denied:
            if counts is not None:
                counts.refusals += 1
            raise
        if counts is not None:
            counts.requests += 1
        output = UNKNOWN_TOKENS if output_limit is None else output_limit
        held = min(prompt_tokens + max(output, 0), MOST_TOKENS)
        for _, _, used in limited:
            used.arrivals.append(at)
            used.open += 1
            used.held_tokens += held
        account = Account(counts, [used.day for _, _, used in limited])
        try:
            yield account
        finally:
            for _, _, used in limited:
                used.open -= 1
                used.held_tokens -= held
            if account.has_used:
                self._store.note_document(DOCUMENT, self._encoded)

    def _limited(self, caller: Caller, at: float) -> Iterator[tuple[str, KeyLimits, Usage]]:
        """Whoever of a caller has limits: its key, and its name."""
        key = caller.key
        if key is not None and key.limits != NO_LIMITS:
            yield f"the key '{key.name}'", key.limits, self._of(key.id, at)
        if not self.of_names:
            return
        name = caller.name.lower()
        for one in self.of_names:
            if fnmatchcase(name, one.pattern):
                yield f"'{caller.name}'", one.limits, self._of(f"name {name}", at)
                return

    def counts_of(self, key: Key) -> KeyCounts:
        """What was asked with a key, and with others of its name, since the start."""
        counts = self.counts.get(key.name)
        if counts is None:
            counts = self.counts[key.name] = KeyCounts()
        return counts

    def tokens_today(self, key: Key) -> int:
        """The tokens that a key has used today."""
        return self._of(key.id, time.time()).day.tokens

    def _of(self, whose: str, at: float) -> Usage:
        used = self._used.pop(whose, None) or Usage()
        self._used[whose] = used
        if len(self._used) > MOST_NAMES:
            silent = (name for name, one in self._used.items() if not one.open)
            self._used.pop(next(silent, whose), None)
        day = int(at // DAY)
        if used.day.day != day:
            used.day = DaySums(day)
        return used

    def _encoded(self) -> bytes:
        day = int(time.time() // DAY)
        days = {whose: used.day for whose, used in self._used.items() if used.day.day == day}
        return msgspec.json.encode(days)


class Account:
    """What one request uses is added to its key's counts, and to the day's sums of its limits."""

    def __init__(self, counts: KeyCounts | None, sums: Sequence[DaySums]) -> None:
        self._counts = counts
        self._sums = sums
        self.has_used = False

    def add(self, tokens: int, gpu_seconds: float) -> None:
        """A lease of the request has ended."""
        if self._counts is not None:
            self._counts.tokens += tokens
        for sums in self._sums:
            sums.tokens += tokens
            sums.gpu_seconds += gpu_seconds
            self.has_used = True


def _check(who: str, limits: KeyLimits, used: Usage, at: float) -> None:
    while used.arrivals and at - used.arrivals[0] >= MINUTE:
        used.arrivals.popleft()
    midnight = DAY - at % DAY
    if limits.requests_per_minute and len(used.arrivals) >= limits.requests_per_minute:
        wait = MINUTE - (at - used.arrivals[0])
        raise _reached(who, f"{limits.requests_per_minute} requests a minute", wait)
    if limits.concurrent and used.open >= limits.concurrent:
        raise _reached(who, f"{limits.concurrent} requests at a time", 1.0)
    tokens = used.day.tokens + used.held_tokens
    if limits.tokens_per_day and tokens >= limits.tokens_per_day:
        wait = midnight if used.day.tokens >= limits.tokens_per_day else 1.0
        raise _reached(who, f"{limits.tokens_per_day} tokens a day", wait)
    if limits.gpu_seconds_per_day and used.day.gpu_seconds >= limits.gpu_seconds_per_day:
        raise _reached(who, f"{limits.gpu_seconds_per_day:g} GPU-seconds a day", midnight)


def _reached(who: str, what: str, wait: float) -> Denied:
    return Denied(429, f"{who} has reached the limit of {what}", retry_after=wait)
