"""Numbers over a stretch of time that can be added up: counts, sums, and histograms of waits."""

from collections.abc import Iterable
from datetime import datetime
from math import exp, log

from msgspec import Struct

from ollama_coordinator.db import Finished, Status

FIRST_SECONDS = 0.001
STEP = 1.15
"""Percentiles are right to half a step: 7 %."""

_LOG_STEP = log(STEP)


class Bucket(Struct, omit_defaults=True):
    """What happened in one stretch of time, in the fleet or on one agent.

    `first_token` counts requests by the logarithm of their time to first token. The `_sum` fields
    are divided by `samples`, how often they were looked at; `speed_sum` by `speeds`.
    """

    requests: int = 0
    refused: int = 0
    failed: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    first_token: dict[int, int] = {}
    speed_sum: float = 0.0
    speeds: int = 0
    samples: int = 0
    waiting_sum: int = 0
    waiting_most: int = 0
    in_flight_sum: int = 0
    in_flight_most: int = 0
    readings: int = 0
    cpu_sum: float = 0.0
    memory_sum: float = 0.0
    gpu_readings: int = 0
    gpu_sum: float = 0.0
    vram_sum: float = 0.0
    hottest: float = 0.0

    def count(self, request: Finished, tokens: int) -> None:
        """A request ended; `tokens` of its answer were not counted while it ran."""
        self.requests += 1
        self.refused += request.status is Status.REFUSED
        self.failed += request.status is Status.FAILED
        self.cancelled += request.status is Status.CANCELLED
        self.prompt_tokens += request.prompt_tokens or 0
        self.output_tokens += tokens
        if request.first_token_seconds is not None:
            step = _step(request.first_token_seconds)
            self.first_token[step] = self.first_token.get(step, 0) + 1
        if request.tokens_per_second is not None:
            self.speed_sum += request.tokens_per_second
            self.speeds += 1

    def sample(self, waiting: int, in_flight: int) -> None:
        """How many waited and ran at one moment."""
        self.samples += 1
        self.waiting_sum += waiting
        self.waiting_most = max(self.waiting_most, waiting)
        self.in_flight_sum += in_flight
        self.in_flight_most = max(self.in_flight_most, in_flight)

    def add(self, other: "Bucket") -> None:
        """Take over another bucket's numbers."""
        for name in self.__struct_fields__:
            mine, its = getattr(self, name), getattr(other, name)
            if name == "first_token":
                for step, count in its.items():
                    mine[step] = mine.get(step, 0) + count
            elif name in ("waiting_most", "in_flight_most", "hottest"):
                setattr(self, name, max(mine, its))
            else:
                setattr(self, name, mine + its)


class Point(Struct, frozen=True):
    """One bucket as charts show it; `None` where nothing was measured.

    Waiting and in flight are means, `tokens_per_second` is what the fleet (or the agent) wrote in
    all, `request_tokens_per_second` what one request saw on average. Times in seconds.
    """

    at: datetime
    requests: int
    failed: int
    refused: int
    cancelled: int
    prompt_tokens: int
    output_tokens: int
    tokens_per_second: float
    first_token_p50: float | None
    first_token_p95: float | None
    request_tokens_per_second: float | None
    waiting: float | None
    waiting_most: int
    in_flight: float | None
    in_flight_most: int
    cpu_percent: float | None = None
    memory_percent: float | None = None
    gpu_percent: float | None = None
    vram_percent: float | None = None
    temperature_celsius: float | None = None


def point(bucket: Bucket, at: datetime, seconds: float) -> Point:
    """A bucket that lasted `seconds` as a point of a chart."""
    return Point(
        at=at,
        requests=bucket.requests,
        failed=bucket.failed,
        refused=bucket.refused,
        cancelled=bucket.cancelled,
        prompt_tokens=bucket.prompt_tokens,
        output_tokens=max(bucket.output_tokens, 0),
        tokens_per_second=max(bucket.output_tokens, 0) / seconds,
        first_token_p50=percentile(bucket.first_token, 0.50),
        first_token_p95=percentile(bucket.first_token, 0.95),
        request_tokens_per_second=_mean(bucket.speed_sum, bucket.speeds),
        waiting=_mean(bucket.waiting_sum, bucket.samples),
        waiting_most=bucket.waiting_most,
        in_flight=_mean(bucket.in_flight_sum, bucket.samples),
        in_flight_most=bucket.in_flight_most,
        cpu_percent=_mean(bucket.cpu_sum, bucket.readings),
        memory_percent=_mean(bucket.memory_sum, bucket.readings),
        gpu_percent=_mean(bucket.gpu_sum, bucket.gpu_readings),
        vram_percent=_mean(bucket.vram_sum, bucket.gpu_readings),
        temperature_celsius=bucket.hottest or None,
    )


def percentile(histogram: dict[int, int], share: float) -> float | None:
    """The value below which `share` of the counted seconds lie."""
    total = sum(histogram.values())
    if not total:
        return None
    seen = 0
    for step in sorted(histogram):
        seen += histogram[step]
        if seen >= share * total:
            return FIRST_SECONDS * exp((step + 0.5) * _LOG_STEP)
    return None


def _step(seconds: float) -> int:
    return max(0, int(log(max(seconds, FIRST_SECONDS) / FIRST_SECONDS) / _LOG_STEP))


def _mean(total: float, count: int) -> float | None:
    return total / count if count else None


HOUR = 3600
DAY = 24 * HOUR
FLEET = ""
"""The name of the series of the whole fleet; an agent's series has the agent's id."""


class Tier(Struct, frozen=True):
    """Rows of so many seconds, kept for so long: the fleet's, and each agent's."""

    seconds: int
    keep_seconds: int
    keep_agents_seconds: int = 0


TIERS = (
    Tier(10, 2 * HOUR),
    Tier(60, 25 * HOUR, 25 * HOUR),
    Tier(900, 32 * DAY, 8 * DAY),
)


class SeriesRow(Struct, frozen=True):
    """One bucket in the database; `start` in Unix seconds."""

    tier: int
    start: int
    name: str
    bucket: Bucket


Key = tuple[int, str]


class Series:
    """The buckets that are filling, and the rows to write. `at` is always Unix seconds."""

    def __init__(self) -> None:
        self._fresh: dict[str, Bucket] = {}
        self._open: dict[Key, SeriesRow] = {}
        self._changed: dict[tuple[int, int, str], SeriesRow] = {}

    def restore(self, rows: Iterable[SeriesRow]) -> None:
        """Go on filling what an earlier process began."""
        for row in rows:
            known = self._open.get((row.tier, row.name))
            if known is None or known.start < row.start:
                self._open[row.tier, row.name] = row

    def fresh(self, name: str) -> Bucket:
        """Where what happens now is counted, once; `fold` spreads it over the tiers."""
        bucket = self._fresh.get(name)
        if bucket is None:
            bucket = self._fresh[name] = Bucket()
        return bucket

    def fold(self, at: float) -> None:
        """Add what was counted since the last call to the buckets of this moment."""
        fresh, self._fresh = self._fresh, {}
        for name, counted in fresh.items():
            for bucket in self._buckets(name, at):
                bucket.add(counted)

    def _buckets(self, name: str, at: float) -> list[Bucket]:
        """The buckets of all tiers that a moment belongs to."""
        return [
            self._bucket(tier, name, at)
            for tier in TIERS
            if name == FLEET or tier.keep_agents_seconds
        ]

    def _bucket(self, tier: Tier, name: str, at: float) -> Bucket:
        start = int(at) // tier.seconds * tier.seconds
        row = self._open.get((tier.seconds, name))
        if row is None or row.start < start:
            row = SeriesRow(tier.seconds, start, name, Bucket())
            self._open[tier.seconds, name] = row
        self._changed[row.tier, row.start, row.name] = row
        return row.bucket

    def take_changed(self, *, fleet_only: bool) -> list[SeriesRow]:
        """The rows that changed since they were last taken; agents' rows can wait."""
        taken = [row for row in self._changed.values() if row.name == FLEET or not fleet_only]
        for row in taken:
            del self._changed[row.tier, row.start, row.name]
        return taken

    def put_back(self, rows: Iterable[SeriesRow]) -> None:
        """These could not be written."""
        for row in rows:
            self._changed.setdefault((row.tier, row.start, row.name), row)

    def forget(self, name: str) -> None:
        """The agent is gone."""
        for tier in TIERS:
            self._open.pop((tier.seconds, name), None)

    def unwritten(self, tier: int, name: str) -> list[SeriesRow]:
        """The rows of a series that are newer in memory than in the database."""
        rows = [row for row in self._changed.values() if row.tier == tier and row.name == name]
        row = self._open.get((tier, name))
        return [*rows, row] if row is not None else rows


def tier_for(seconds: float) -> Tier:
    """The finest tier whose rows reach back so far and are not too many for a chart."""
    if seconds <= 20 * 60:
        return TIERS[0]
    return TIERS[1] if seconds <= 8 * HOUR else TIERS[2]


def merge(rows: Iterable[SeriesRow], width: int, first: int, last: int) -> dict[int, Bucket]:
    """Rows as buckets of `width` seconds from `first` to `last`, empty ones included."""
    merged = {start: Bucket() for start in range(first // width * width, last + 1, width)}
    for row in rows:
        bucket = merged.get(row.start // width * width)
        if bucket is not None:
            bucket.add(row.bucket)
    return merged
