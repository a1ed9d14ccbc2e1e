"""The two clocks, monotonic seconds inside and UTC outside, and the lag of the event loop.

A coordinator that was stopped, or whose event loop was held up, has heard nobody meanwhile. That is
its own trouble: `now()` leaves such gaps out, so that no agent's silence grows by them, and what a
time-out found while the loop lagged decides nothing (`has_lagged_since`).
"""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from math import inf

TICK_SECONDS = 0.25
"""How often the lag is measured: several times within the shortest time-out for an agent, 1 s."""

LAG_SECONDS = 0.5
"""A loop that is so late may see an answer after its time-out; a busy machine is late by less."""

GAP_SECONDS = 2.0
"""More than that between two readings is a gap; less than any silence that is judged, 5 s."""

STEP_SECONDS = 0.5
"""The wall clock was set if it moves so far from the monotonic one; reading both takes far less."""


if sys.platform == "darwin":
    _AWAKE_AND_ASLEEP: int | None = time.CLOCK_MONOTONIC
else:
    _AWAKE_AND_ASLEEP = getattr(time, "CLOCK_BOOTTIME", None)


def uptime() -> float:
    """Monotonic seconds, with those in which the machine slept.

    `time.monotonic` leaves sleep out on Linux and macOS, and not on Windows.
    """
    if _AWAKE_AND_ASLEEP is None:
        return time.monotonic()
    return time.clock_gettime(_AWAKE_AND_ASLEEP)


class Clock:
    """Monotonic `now()` without the gaps, and its translation to UTC and back.

    The translation is the present one: the wall clock of a machine may be set after its start.
    `gaps` counts the gaps, and the times when other clocks ran on without the monotonic one, as
    while a laptop sleeps. `stepped_at` is when the wall clock was last set, `stepped_by` by how
    many seconds in all; sleep sets nothing. `lag` is by how many seconds the event loop was late
    when it was last measured.
    """

    def __init__(self) -> None:
        self.gaps = 0
        self.lag = 0.0
        self.started_at = self._read_at = time.monotonic()
        self.stepped_at = -inf
        self.stepped_by = 0.0
        self._lagged_at = -inf
        self._left_out = 0.0
        self._slept = uptime() - self._read_at
        self._offset = time.time() - self._slept - self._read_at
        self._tick: asyncio.TimerHandle | None = None

    def now(self) -> float:
        """Monotonic seconds; a gap since the last reading is left out."""
        at = time.monotonic()
        since = at - self._read_at
        self._read_at = at
        if since > GAP_SECONDS:
            self.gaps += 1
            self._left_out += since
            self._lagged_at = at - self._left_out
        return at - self._left_out

    def utc(self, now: float) -> datetime:
        """The UTC time of a monotonic reading."""
        return datetime.fromtimestamp(now + self._epoch(), UTC)

    def monotonic(self, at: datetime) -> float:
        """The monotonic reading of a UTC time; negative for one before the machine started."""
        return at.timestamp() - self._epoch()

    def _epoch(self) -> float:
        """The UTC time of the monotonic zero; the same until the wall clock is set."""
        now, since_boot = self.now(), uptime()
        slept = since_boot - time.monotonic()
        moved = time.time() - since_boot - self._offset
        if abs(slept - self._slept) > STEP_SECONDS:
            self.gaps += slept - self._slept > GAP_SECONDS
            self._slept = slept
        if abs(moved) > STEP_SECONDS:
            self.gaps += moved > GAP_SECONDS
            self.stepped_at = now
            self.stepped_by += moved
            self._offset += moved
        return self._offset + self._slept + self._left_out

    def has_lagged_since(self, now: float) -> bool:
        """Whether the event loop was late, or did not run at all, after a monotonic reading."""
        return self._lagged_at >= now

    @asynccontextmanager
    async def timeout(self, seconds: float) -> AsyncIterator[None]:
        """As `asyncio.timeout`, in seconds in which the coordinator ran.

        Where the event loop is late, what came meanwhile is read first.

        Raises:
            TimeoutError: the block took longer.
        """
        loop, due = asyncio.get_running_loop(), self.now() + seconds
        timer: asyncio.TimerHandle | None = None

        def check(expected: float) -> None:
            nonlocal timer
            now, left = loop.time(), due - self.now()
            if now - expected > LAG_SECONDS:
                left = max(left, LAG_SECONDS)
            if left > 0:
                timer = loop.call_at(now + left, check, now + left)
            else:
                waiting.reschedule(now)

        async with asyncio.timeout(None) as waiting:
            timer = loop.call_at(loop.time() + seconds, check, loop.time() + seconds)
            try:
                yield
            finally:
                if timer is not None:
                    timer.cancel()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Measure the lag of the running event loop during the block."""
        self._watch(asyncio.get_running_loop())
        try:
            yield
        finally:
            if self._tick is not None:
                self._tick.cancel()

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        due = loop.time() + TICK_SECONDS

        def tick() -> None:
            # A timer that is due earlier is called earlier: those of time-outs see the lag.
            self.lag = max(loop.time() - due, 0.0)
            if self.lag > LAG_SECONDS:
                self._lagged_at = self.now()
            self._epoch()
            self._watch(loop)

        self._tick = loop.call_at(due, tick)
