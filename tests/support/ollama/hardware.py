"""How fast a node is: what loading, reading a prompt and writing a token cost in wall time.

The defaults cost nothing, so functional tests take milliseconds. Rates are stated for a model of
`reference_bytes` and fall as models grow. `speed` divides every wait, keep-alive included. What the
node *reports* is always wall time as the client saw it, so that rates learned from the reports and
rates taken by a stopwatch agree at any speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .models import Model

GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """One machine's figures; `Hardware.realistic()` gives those of a mid-size GPU."""

    vram_bytes: int = 24 * GIB
    cpu_only: bool = False  # `vram_bytes` is then main memory, and ps reports no VRAM
    load_bytes_per_second: float = math.inf
    load_overhead_seconds: float = 0.0
    unload_seconds: float = 0.0
    prefill_tokens_per_second: float = math.inf
    decode_tokens_per_second: float = math.inf
    reference_bytes: int = 5_000_000_000
    batch_slowdown: float = 0.4  # n generations in one runner: each 1 + 0.4 (n - 1) slower
    slowdown: Callable[[int, int], float] | None = None  # (in this runner, runners busy) -> factor
    fit_share: float = 1.0  # of the free memory that a model may take beside others
    line_seconds: float = 0.0  # tokens of so many seconds go out in one line, the first by itself
    speed: float = 1.0

    @classmethod
    def realistic(cls, *, speed: float = 1.0, vram_bytes: int = 24 * GIB) -> Hardware:
        return cls(
            vram_bytes=vram_bytes,
            load_bytes_per_second=1.5e9,
            load_overhead_seconds=1.0,
            unload_seconds=0.6,
            prefill_tokens_per_second=1_500,
            decode_tokens_per_second=60,
            speed=speed,
        )

    def load_seconds(self, model: Model) -> float:
        rate = self.load_bytes_per_second
        return (self.load_overhead_seconds + model.size_bytes / rate) / self.speed

    def prefill_seconds(self, model: Model, tokens: int) -> float:
        own = model.prefill_tokens_per_second
        rate = own if own is not None else self.prefill_tokens_per_second * self._scale(model)
        return tokens / rate / self.speed

    def decode_seconds(self, model: Model) -> float:
        """Wall seconds from one token to the next, with nothing else running."""
        own = model.decode_tokens_per_second
        rate = own if own is not None else self.decode_tokens_per_second * self._scale(model)
        return 1 / rate / self.speed

    def tokens_per_line(self, model: Model) -> int:
        """How many tokens a running answer writes at once."""
        return max(int(self.line_seconds / self.speed / (self.decode_seconds(model) or 1.0)), 1)

    def factor(self, in_runner: int, busy_runners: int) -> float:
        """How much slower each generation is with that many others."""
        if self.slowdown is not None:
            return self.slowdown(in_runner, busy_runners)
        return (1 + self.batch_slowdown * (in_runner - 1)) * busy_runners

    def default_context(self) -> int:
        if self.cpu_only or self.vram_bytes < 23 * GIB:
            return 4096
        return 262_144 if self.vram_bytes >= 47 * GIB else 32_768

    def _scale(self, model: Model) -> float:
        return self.reference_bytes / max(model.size_bytes, 1)
