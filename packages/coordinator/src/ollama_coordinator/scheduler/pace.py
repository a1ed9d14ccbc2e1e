"""How fast the waiting line moves, and so when somebody turned away should come back."""

from math import exp

MEMORY_SECONDS = 20.0
SOONEST_SECONDS = 1.0
LATEST_SECONDS = 60.0
SHARE_AHEAD = 0.1
"""Coming back pays when about this share of the line has gone."""


class Pace:
    """The rate at which places are given, forgetting within a minute."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._at = 0.0

    def granted(self, now: float) -> None:
        """A place was given."""
        self._weight = self._weight * exp((self._at - now) / MEMORY_SECONDS) + 1.0
        self._at = now

    def retry_after(self, waiting: int, now: float) -> float:
        """Seconds until there will be room in a line of so many."""
        rate = self._weight * exp((self._at - now) / MEMORY_SECONDS) / MEMORY_SECONDS
        if rate <= 0:
            return LATEST_SECONDS if waiting else SOONEST_SECONDS
        ahead = max(waiting * SHARE_AHEAD, 1.0)
        return min(max(ahead / rate, SOONEST_SECONDS), LATEST_SECONDS)
