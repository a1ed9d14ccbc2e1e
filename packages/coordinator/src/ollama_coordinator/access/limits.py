"""Limits of keys: requests a minute, at once, and tokens and GPU-seconds a day.

What counts is taken from leases: their tokens and their seconds, each once, when they end. Until
then a request holds back what it will probably use, so that many at once do not pass a limit
together. A request that is given up pays for what it got.
"""

import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
from msgspec import Struct, field

from ollama_coordinator.db import Store

from .caller import Denied
from .keys import NO_LIMITS, Key, KeyCounts

log = logging.getLogger(__name__)

MINUTE, DAY = 60.0, 86_400.0

UNKNOWN_TOKENS = 256
"""Held back for an answer whose length its client does not limit: a short chat's."""

MOST_TOKENS = 8192
"""Held back at most: clients give limits that no answer reaches."""

DOCUMENT = "limits"
"""Under which name the day's sums are in the database: a JSON object of key ids."""


class DaySums(Struct):
    """What a key has used on one day of UTC, numbered from 1970 on."""

    day: int = 0
    tokens: int = 0
    gpu_seconds: float = 0.0


class Usage(Struct):
    """What a key uses now: its requests in progress, what they hold back, and the last minute's."""

    day: DaySums = field(default_factory=DaySums)
    open: int = 0
    held_tokens: int = 0
    arrivals: deque[float] = field(default_factory=deque)


class KeyUsage:
    """How much of its limits each key has used.

    `counts`: by the names of keys. Operators alone make names, so that there are few.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._used: dict[str, Usage] = {}
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
        self, key: Key | None, prompt_tokens: int, output_limit: int | None
    ) -> Iterator["Account"]:
        """Count a request of a key as long as the block runs.

        Raises:
            Denied: 429, a limit is reached.
        """
        if key is None:
            yield _OF_NO_KEY
            return
        counts = self.counts_of(key)
        if key.limits == NO_LIMITS:
            counts.requests += 1
            yield Account(counts)
            return
        at = time.time()
        used = self._of(key, at)
        try:
            _check(key, used, at)
        except Denied:
            counts.refusals += 1
            raise
        counts.requests += 1
        output = UNKNOWN_TOKENS if output_limit is None else output_limit
        held = min(prompt_tokens + max(output, 0), MOST_TOKENS)
        used.arrivals.append(at)
        used.open += 1
        used.held_tokens += held
        account = Account(counts, used.day)
        try:
            yield account
        finally:
            used.open -= 1
            used.held_tokens -= held
            if account.has_used:
                self._store.note_document(DOCUMENT, self._encoded)

    def counts_of(self, key: Key) -> KeyCounts:
        """What was asked with a key, and with others of its name, since the start."""
        counts = self.counts.get(key.name)
        if counts is None:
            counts = self.counts[key.name] = KeyCounts()
        return counts

    def tokens_today(self, key: Key) -> int:
        """The tokens that a key has used today."""
        return self._of(key, time.time()).day.tokens

    def _of(self, key: Key, at: float) -> Usage:
        used = self._used.setdefault(key.id, Usage())
        day = int(at // DAY)
        if used.day.day != day:
            used.day = DaySums(day)
        return used

    def _encoded(self) -> bytes:
        return msgspec.json.encode({key_id: used.day for key_id, used in self._used.items()})


class Account:
    """What one request uses is added to its key's counts, and to the day's sums of its limits."""

    def __init__(self, counts: KeyCounts | None, sums: DaySums | None = None) -> None:
        self._counts = counts
        self._sums = sums
        self.has_used = False

    def add(self, tokens: int, gpu_seconds: float) -> None:
        """A lease of the request has ended."""
        if self._counts is not None:
            self._counts.tokens += tokens
        if self._sums is not None:
            self._sums.tokens += tokens
            self._sums.gpu_seconds += gpu_seconds
            self.has_used = True


_OF_NO_KEY = Account(None)


def _check(key: Key, used: Usage, at: float) -> None:
    limits = key.limits
    while used.arrivals and at - used.arrivals[0] >= MINUTE:
        used.arrivals.popleft()
    midnight = DAY - at % DAY
    if limits.requests_per_minute and len(used.arrivals) >= limits.requests_per_minute:
        wait = MINUTE - (at - used.arrivals[0])
        raise _reached(key, f"{limits.requests_per_minute} requests a minute", wait)
    if limits.concurrent and used.open >= limits.concurrent:
        raise _reached(key, f"{limits.concurrent} requests at a time", 1.0)
    tokens = used.day.tokens + used.held_tokens
    if limits.tokens_per_day and tokens >= limits.tokens_per_day:
        wait = midnight if used.day.tokens >= limits.tokens_per_day else 1.0
        raise _reached(key, f"{limits.tokens_per_day} tokens a day", wait)
    if limits.gpu_seconds_per_day and used.day.gpu_seconds >= limits.gpu_seconds_per_day:
        raise _reached(key, f"{limits.gpu_seconds_per_day:g} GPU-seconds a day", midnight)


def _reached(key: Key, what: str, wait: float) -> Denied:
    return Denied(429, f"the key '{key.name}' has reached its limit of {what}", retry_after=wait)
