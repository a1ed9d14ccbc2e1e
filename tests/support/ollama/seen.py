"""What the node saw and did: counters, request records, and a way to wait for any of it."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from support.deadline import DEADLINE_SECONDS

Outcome = Literal["running", "completed", "cancelled", "failed"]


@dataclass(eq=False)
class Record:
    """One request, from its first line to its end."""

    method: str
    path: str
    headers: Mapping[str, str]
    at: float  # the loop's clock
    body: bytes = b""
    model: str = ""
    status: int | None = None
    outcome: Outcome = "running"
    ended: float | None = None

    @property
    def body_bytes(self) -> int:
        return len(self.body)

    def summary(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "path": self.path,
            "headers": dict(self.headers),
            "body_bytes": self.body_bytes,
            "model": self.model,
            "at": self.at,
            "status": self.status,
            "outcome": self.outcome,
        }


@dataclass
class Figures:
    """Everything that is a number; gauges first, then what only grows."""

    open: int = 0  # requests being served
    active: int = 0  # generations holding a slot
    waiting: int = 0  # for a slot
    queued: int = 0  # for their turn to load
    loading: int = 0
    held: int = 0  # stopped at the gate
    faulted: int = 0  # stopped in a fault: hang, stall, slow start
    peak: int = 0  # most generations active at once
    connections: int = 0
    completed: int = 0
    cancelled: int = 0
    failed: int = 0
    loads: int = 0
    loads_aborted: int = 0
    loads_failed: int = 0
    reloads: int = 0  # loads that replaced a runner of the same weights
    evictions: int = 0
    unloads: int = 0
    tokens: int = 0


@dataclass
class Seen(Figures):
    """The node's memory of its life so far."""

    keep: int = 20_000
    counts: Counter[str] = field(default_factory=Counter)
    requests: deque[Record] = field(init=False)
    _waiters: list[tuple[Callable[[Seen], object], asyncio.Future[None]]] = field(
        default_factory=list, init=False, repr=False
    )

    def __post_init__(self) -> None:
        self.requests = deque(maxlen=self.keep)

    def count(self, path: str) -> int:
        return self.counts[path]

    def of(self, path: str) -> list[Record]:
        return [record for record in self.requests if record.path == path]

    @property
    def last(self) -> Record:
        return self.requests[-1]

    def figures(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in Figures.__dataclass_fields__}

    def begin(self, record: Record) -> None:
        self.counts[record.path] += 1
        self.requests.append(record)
        self.open += 1
        self.changed()

    def end(self, record: Record, outcome: Outcome, now: float) -> None:
        record.outcome, record.ended = outcome, now
        self.open -= 1
        setattr(self, outcome, getattr(self, outcome) + 1)
        self.changed()

    def generation(self, change: int) -> None:
        self.active += change
        self.peak = max(self.peak, self.active)
        self.changed()

    def changed(self) -> None:
        """Wakes whoever waits for what is now true; called after every change."""
        if not self._waiters:
            return
        for predicate, future in self._waiters:
            if not future.done() and predicate(self):
                future.set_result(None)

    async def wait_for(
        self, predicate: Callable[[Seen], object], *, timeout: float | None = DEADLINE_SECONDS
    ) -> None:
        """Returns when the predicate holds; checked at every change, never by polling."""
        if predicate(self):
            return
        waiter = (predicate, asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        try:
            async with asyncio.timeout(timeout):
                await waiter[1]
        except TimeoutError:
            raise TimeoutError(f"not seen within {timeout} s; figures: {self.figures()}") from None
        finally:
            self._waiters.remove(waiter)

    async def another(self, path: str) -> None:
        """Returns when one more request of this path than now has been answered in full."""

        def answered() -> int:
            return sum(record.outcome == "completed" for record in self.of(path))

        before = answered()
        await self.wait_for(lambda _: answered() > before)

    def reset(self) -> None:
        """Forgets what was counted; gauges keep describing what goes on now."""
        gauges = {"open", "active", "waiting", "queued", "loading", "held", "faulted"}
        for name in self.figures().keys() - gauges:
            setattr(self, name, 0)
        self.peak = self.active
        self.counts.clear()
        self.requests.clear()
