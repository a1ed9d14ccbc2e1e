"""How often a model is asked for: a count of arrivals that forgets."""

from dataclasses import dataclass
from math import exp

MEMORY_SECONDS = 120.0
HORIZON_SECONDS = 60.0


@dataclass(slots=True)
class Demand:
    """Arrivals, each weighing less the longer ago it was."""

    weight: float = 0.0
    at: float = 0.0

    def arrived(self, now: float) -> None:
        """One more request."""
        self.weight = self.weight * exp((self.at - now) / MEMORY_SECONDS) + 1.0
        self.at = now

    def wanted_again(self, now: float) -> float:
        """The probability of another request within the horizon."""
        rate = self.weight * exp((self.at - now) / MEMORY_SECONDS) / MEMORY_SECONDS
        return 1.0 - exp(-rate * HORIZON_SECONDS)
