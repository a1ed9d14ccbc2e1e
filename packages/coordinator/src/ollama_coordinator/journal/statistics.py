"""The fleet's and each agent's numbers over time: buckets that add up, in three tiers of widths.

Ten-second buckets for the last hours, a minute for a day, a quarter of an hour for a month. A chart
of any length reads the tier that suits it, and never a request. The buckets that are filling are
complete in memory; a row that is written replaces the row before.
"""

from collections.abc import Iterable
from datetime import datetime
from math import exp, log

from msgspec import Struct

from ollama_coordinator.db import Finished, Status

FIRST_SECONDS = 0.001
"""The first step of the histogram of times to first token; no shorter one is of interest."""

STEP = 1.15
"""The ratio of one step to the one before: percentiles are right to half a step, 7 %."""

_LOG_STEP = log(STEP)


class Bucket(Struct, omit_defaults=True):
    """What happened in one period of time, in the fleet or on one agent.

    `first_token` counts requests by the logarithm of their time to first token. Means divide
    `waiting_sum` and `in_flight_sum` by `samples`, `speed_sum` by `speeds`, the GPU's sums by
    `gpu_readings`, and the other sums by `readings`.
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

    def count(self, request: Finished) -> None:
        """Add a request that ended; the tokens of its answer are counted while it runs."""
        self.requests += 1
        self.refused += request.status is Status.REFUSED
        self.failed += request.status is Status.FAILED
        self.cancelled += request.status is Status.CANCELLED
        self.prompt_tokens += request.prompt_tokens or 0
        if request.first_token_seconds is not None:
            step = _step(request.first_token_seconds)
            self.first_token[step] = self.first_token.get(step, 0) + 1
        if request.tokens_per_second is not None:
            self.speed_sum += request.tokens_per_second
            self.speeds += 1

    def sample(self, waiting: int, in_flight: int) -> None:
        """Add how many requests waited and ran at one moment."""
        self.samples += 1
        self.waiting_sum += waiting
        self.waiting_most = max(self.waiting_most, waiting)
        self.in_flight_sum += in_flight
        self.in_flight_most = max(self.in_flight_most, in_flight)

    def add(self, other: "Bucket") -> None:
        """Add another bucket's numbers."""
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

    `waiting` and `in_flight` are means. `tokens_per_second` is the sum over all requests,
    `request_tokens_per_second` the mean of one request. Times are in seconds.
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
    """A bucket of `seconds` as a point of a chart."""
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
    """The seconds below which `share` (0 to 1) of a histogram lies; `None` if it is empty."""
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
"""The name of the fleet's series; an agent's series has the agent's id."""


class Tier(Struct, frozen=True):
    """Buckets of `seconds`, and how long the fleet's and each agent's are kept."""

    seconds: int
    keep_seconds: int
    keep_agents_seconds: int = 0


TIERS = (
    Tier(10, 2 * HOUR),
    Tier(60, 25 * HOUR, 25 * HOUR),
    Tier(900, 32 * DAY, 8 * DAY),
)
"""Each chart has at most 120 points: 20 minutes, 8 hours (a day of an agent), a month."""


class SeriesRow(Struct, frozen=True):
    """One bucket of a series; `start` is in Unix seconds, `tier` is its width in seconds."""

    tier: int
    start: int
    name: str
    bucket: Bucket


class Series:
    """The buckets that are filling, and the rows to write; `at` is in Unix seconds."""

    def __init__(self) -> None:
        self._fresh: dict[str, Bucket] = {}
        self._open: dict[tuple[int, str], SeriesRow] = {}
        self._changed: dict[tuple[int, int, str], SeriesRow] = {}

    def restore(self, rows: Iterable[SeriesRow]) -> None:
        """Continue the buckets that an earlier process began."""
        for row in rows:
            known = self._open.get((row.tier, row.name))
            if known is None or known.start < row.start:
                self._open[row.tier, row.name] = row

    def fresh(self, name: str) -> Bucket:
        """The bucket that counts what happens now; `fold` adds it to the tiers."""
        bucket = self._fresh.get(name)
        if bucket is None:
            bucket = self._fresh[name] = Bucket()
        return bucket

    def fold(self, at: float) -> None:
        """Add what was counted since the last call to the buckets of the moment `at`."""
        fresh, self._fresh = self._fresh, {}
        for name, counted in fresh.items():
            for bucket in self._buckets(name, at):
                bucket.add(counted)

    def _buckets(self, name: str, at: float) -> list[Bucket]:
        """The bucket of each tier that the moment `at` belongs to."""
        return [
            self._bucket(tier, name, at)
            for tier in TIERS
            if name == FLEET or tier.keep_agents_seconds
        ]

    def _bucket(self, tier: Tier, name: str, at: float) -> Bucket:
        start = int(at) // tier.seconds * tier.seconds
        row = self._open.get((tier.seconds, name))
        # A row of later, with a tier between: the wall clock was set back.
        if row is None or row.start < start or row.start > start + tier.seconds:
            row = SeriesRow(tier.seconds, start, name, Bucket())
            self._open[tier.seconds, name] = row
        self._changed[row.tier, row.start, row.name] = row
        return row.bucket

    def take_changed(self, *, fleet_only: bool) -> list[SeriesRow]:
        """The rows that changed since they were last taken; `fleet_only` leaves the agents'."""
        taken = [row for row in self._changed.values() if row.name == FLEET or not fleet_only]
        for row in taken:
            del self._changed[row.tier, row.start, row.name]
        return taken

    def put_back(self, rows: Iterable[SeriesRow]) -> None:
        """Keep rows that could not be written; newer ones stay."""
        for row in rows:
            self._changed.setdefault((row.tier, row.start, row.name), row)

    def forget(self, name: str) -> None:
        """The agent was removed."""
        for tier in TIERS:
            self._open.pop((tier.seconds, name), None)

    def unwritten(self, tier: int, name: str) -> list[SeriesRow]:
        """The rows of a series that are newer in memory than in the database."""
        rows = [row for row in self._changed.values() if row.tier == tier and row.name == name]
        row = self._open.get((tier, name))
        return [*rows, row] if row is not None else rows


def tier_for(seconds: float) -> Tier:
    """The finest tier that reaches back so far with at most a chart's number of rows."""
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
