"""Everything that records the fleet's history, as one value to start and to stop."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta

import msgspec
from msgspec import Struct, structs

from ollama_coordinator.aio import beside
from ollama_coordinator.db import Change, DatabaseError, History, Store, StoredBucket
from ollama_coordinator.dispatch import Dispatch
from ollama_coordinator_common.error import OllamaCoordinatorError

from .advice import Advisor
from .events import EventLog
from .journal import Journal
from .sampler import Sampler
from .statistics import TIERS, Bucket, Point, SeriesRow, Tier, merge, point, tier_for

log = logging.getLogger(__name__)

PRUNE_SECONDS = 60.0
"""How often old history is deleted: a minute more of it does no harm."""

SETTLED_SECONDS = 3600.0
"""How long after the start, and after the wall clock was set, nothing is deleted for its age: a
clock that is wrong at the start is set soon, and one that was set may be set again."""

FOLLOW_SECONDS = 1.0
"""How often it is looked whether the wall clock was set."""

CHART_POINTS = 120
"""The most points of a chart: more are closer than two pixels on a phone."""

_bucket = msgspec.json.Decoder(Bucket)


class Limits(Struct):
    """How much history is kept; may change while running."""

    rows: int
    days: float


class Observation:
    """The journal of requests, the numbers over time, the agents' events, and their history.

    `limits` may change while it runs. `status_of` gives the HTTP status of an error.
    """

    def __init__(
        self,
        dispatch: Dispatch,
        store: Store,
        limits: Limits,
        *,
        status_of: Callable[[OllamaCoordinatorError], int],
    ) -> None:
        self._clock = dispatch.clock
        self.store = store
        self.limits = limits
        self.history = History(store)
        self.events = EventLog()
        self.sampler = Sampler(dispatch, self.history)
        self.journal = Journal(dispatch, self.sampler, status_of)
        self.advisor = Advisor(dispatch, self.history)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Record as long as the block runs; the database must be open before and after.

        Raises:
            DatabaseError: the database cannot be read.
        """
        now = self._at()
        starts = {tier.seconds: int(now) // tier.seconds * tier.seconds for tier in TIERS}
        self.sampler.series.restore(_rows(await self.history.last_buckets(starts)))
        await self.history.begin()
        sampling, pruning = self.sampler.run(self.journal.live), self._prune_for_ever()
        try:
            async with beside(sampling, pruning, self._follow_for_ever()):
                with self.events:
                    yield
        finally:
            await self.sampler.write(everything=True)

    def note_change(self, change: Change) -> None:
        """Somebody changed something just now."""
        at = self._clock.utc(self._clock.now())
        change = structs.replace(change, at=at)
        self.history.note_change(change, stepped_by=self._clock.stepped_by)

    async def points(self, name: str, seconds: float, *, agent: bool) -> list[Point]:
        """The last so many seconds of a series, as a chart's points.

        Raises:
            DatabaseError: the database cannot be read.
        """
        self.sampler.series.fold(self._at())
        tier = TIERS[1] if agent and seconds <= TIERS[1].keep_agents_seconds else tier_for(seconds)
        width = _width(tier, seconds)
        last = int(self._at())
        first = int(last - seconds)
        stored = await self.history.buckets(tier.seconds, name, first // width * width, last)
        by_start = {row.start: row for row in _rows(stored)}
        by_start |= {row.start: row for row in self.sampler.series.unwritten(tier.seconds, name)}
        merged = merge(by_start.values(), width, first, last)
        return [
            point(bucket, datetime.fromtimestamp(start, UTC), min(width, max(last - start, 1)))
            for start, bucket in merged.items()
        ]

    async def _follow_for_ever(self) -> None:
        while True:
            await asyncio.sleep(FOLLOW_SECONDS)
            try:
                await self.follow_clock()
            except DatabaseError as exc:
                extra = {"problem": str(exc)}
                log.warning("times of the history not corrected; tried again", extra=extra)

    async def follow_clock(self) -> None:
        """Correct the times of this process's requests where the wall clock was set since.

        Raises:
            DatabaseError: the database cannot be written; the next call goes on.
        """
        self.journal.follow_clock()
        await self.history.follow(self._clock.stepped_by)

    async def _prune_for_ever(self) -> None:
        while True:
            try:
                await self.prune()
            except DatabaseError as exc:
                log.warning("old history not deleted", extra={"problem": str(exc)})
            await asyncio.sleep(PRUNE_SECONDS)

    async def prune(self) -> None:
        """Delete what is too old or too much.

        Raises:
            DatabaseError: the database cannot be written.
        """
        await self.history.prune_to(self.limits.rows)
        monotonic = self._clock.now()
        settled_at = max(self._clock.started_at, self._clock.stepped_at) + SETTLED_SECONDS
        if monotonic < settled_at:
            # What is old by a wrong wall clock is not: only the number counts for now.
            return
        at = self._clock.utc(monotonic)
        await self.history.prune_before(at - timedelta(days=self.limits.days))
        now = at.timestamp()
        for tier in TIERS:
            await self.history.prune_buckets(
                tier.seconds, now - tier.keep_seconds, now - tier.keep_agents_seconds
            )

    def _at(self) -> float:
        return self._clock.utc(self._clock.now()).timestamp()


def _width(tier: Tier, seconds: float) -> int:
    """The width of a chart's points: a multiple of the tier's, so that they are not too many."""
    rows = seconds / tier.seconds
    return tier.seconds * max(1, round(rows / CHART_POINTS + 0.49))


def _rows(stored: list[StoredBucket]) -> list[SeriesRow]:
    """The rows that can be read: of a damaged one a chart lacks a point."""
    rows = []
    for row in stored:
        with suppress(msgspec.DecodeError):
            rows.append(SeriesRow(row.tier, row.start, row.name, _bucket.decode(row.body)))
    return rows
