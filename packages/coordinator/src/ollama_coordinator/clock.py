"""The two clocks: monotonic seconds inside, UTC on the wire and in the database."""

import time
from datetime import UTC, datetime


class Clock:
    """Monotonic `now()`, the clock of the event loop too, and its translation to UTC and back.

    The translation is fixed at the start, so that a jump of the wall clock makes no agent offline.
    """

    now = staticmethod(time.monotonic)
    """Monotonic seconds."""

    def __init__(self) -> None:
        self._epoch = time.time() - time.monotonic()

    def utc(self, now: float) -> datetime:
        """The UTC time of a monotonic reading."""
        return datetime.fromtimestamp(now + self._epoch, UTC)

    def monotonic(self, at: datetime) -> float:
        """The monotonic reading of a UTC time; negative for one before the machine started."""
        return at.timestamp() - self._epoch
