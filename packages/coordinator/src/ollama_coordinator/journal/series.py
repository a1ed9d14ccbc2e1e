"""The fleet's and each agent's numbers over time, rolled up as they come.

Three tiers: ten seconds for the last hours, a minute for a day, a quarter of an hour for a month.
A chart of any length reads the tier that suits it and never a request. The rows of the running
stretches are complete in memory; what is written behind replaces the row before.
"""

from collections.abc import Iterable

from msgspec import Struct

from .buckets import Bucket

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
