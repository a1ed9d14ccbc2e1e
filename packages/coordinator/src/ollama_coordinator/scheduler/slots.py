"""How many requests of one model an agent runs at once: told, or found out by careful trying."""

from dataclasses import dataclass, field

EMBEDDING_EXTRA = 2
"""Embeddings in flight beyond the slot, to hide the round trip."""

TRY_AGAIN_SECONDS = 20.0
FIRST_REST_SECONDS = 60.0
LONGEST_REST_SECONDS = 1800.0
BURST_SECONDS = 0.1

SERIAL_FAMILIES = frozenset(
    {
        "mllama", "qwen3vl", "qwen3vlmoe", "qwen35", "qwen35moe", "qwen3next", "lfm2", "lfm2moe",
        "nemotron_h", "nemotron_h_moe", "nemotron_h_omni",
    }
)  # fmt: skip
"""Model families that Ollama runs one request at a time, whatever it is configured to."""


@dataclass(slots=True)
class Slots:
    """The slots of one model on one agent.

    `fixed` is what the agent said. Else `proven` were seen at work together; beyond them one more
    is tried, twice as many once two were proven. A trial that shows nothing rests for a while, one
    that fails for longer each time.
    """

    fixed: int | None = None
    extra: int = 0
    proven: int = 1
    failures: int = 0
    try_from: float = 0.0
    burst_until: float = -1.0
    limit: int = field(init=False, default=1)
    """How many may be in flight without trying anything."""

    def __post_init__(self) -> None:
        self.limit = self.count + self.extra

    @property
    def count(self) -> int:
        """How many are taken to run at once."""
        return self.proven if self.fixed is None else self.fixed

    def fix(self, count: int | None, *, extra: int = 0) -> None:
        """The agent says how many it runs, or says it no longer."""
        self.fixed, self.extra = count, extra
        self.limit = self.count + extra

    def allowance(self, now: float) -> int:
        """How many may be in flight, trials included."""
        if self.fixed is not None or (now < self.try_from and now > self.burst_until):
            return self.limit
        if self.proven < 2:
            return self.proven + 1
        return self.proven * 2

    def try_more(self, now: float) -> None:
        """A request was sent beyond what is proven."""
        if now >= self.try_from:
            self.burst_until = now + BURST_SECONDS
            self.try_from = now + TRY_AGAIN_SECONDS

    def prove(self, count: int) -> None:
        """So many were at work together."""
        if count > self.proven:
            self.proven = count
            self.failures = 0
            self.try_from = 0.0
            self.limit = self.count + self.extra

    def refute(self, count: int, now: float) -> None:
        """One waited although only `count` others were there."""
        self.proven = min(self.proven, max(count, 1))
        self.limit = self.count + self.extra
        self.failures += 1
        rest = FIRST_REST_SECONDS * 2.0 ** min(self.failures - 1, 10)
        self.try_from = now + min(rest, LONGEST_REST_SECONDS)
        self.burst_until = -1.0
