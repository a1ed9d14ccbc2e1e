"""A deadline that moves often and is reached seldom."""

import asyncio
from collections.abc import Callable


class Alarm:
    """One timer that is set anew for each request, at the price of an assignment."""

    def __init__(self, ring: Callable[[], None]) -> None:
        self._ring = ring
        self._loop = asyncio.get_running_loop()
        self._due: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def set(self, seconds: float) -> None:
        """Ring so much later, and not before."""
        self._due = self._loop.time() + seconds
        if self._timer is None or self._timer.when() > self._due:
            self._schedule(self._due)

    def silence(self) -> None:
        """Do not ring."""
        self._due = None

    def end(self) -> None:
        """Not needed any more."""
        self.silence()
        if self._timer is not None:
            self._timer.cancel()

    def _schedule(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(when, self._check)

    def _check(self) -> None:
        self._timer = None
        if self._due is None:
            return
        if self._due > self._loop.time():
            self._schedule(self._due)
        else:
            self._due = None
            self._ring()
