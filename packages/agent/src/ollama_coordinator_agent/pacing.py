"""When to look again, when to try again, and when to say so again."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)

AFTER_A_BUG_SECONDS = 5.0


async def forever(step: Callable[[], Awaitable[float]]) -> None:
    """Repeat `step`, which says after how many seconds; its bugs are logged and outlived."""
    while True:
        try:
            pause_seconds = await step()
        except Exception:
            log.exception("an error inside the agent; it goes on")
            pause_seconds = AFTER_A_BUG_SECONDS
        await asyncio.sleep(pause_seconds)


class Backoff:
    """Delays that double up to a ceiling, each shortened by chance so that a fleet spreads out."""

    def __init__(
        self,
        first_seconds: float,
        ceiling_seconds: float,
        *,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._first_seconds = first_seconds
        self._ceiling_seconds = ceiling_seconds
        self._chance = chance
        self._failures = 0

    def next(self) -> float:
        """The seconds to wait after one more failure: between half and all of the current step."""
        step = min(self._ceiling_seconds, self._first_seconds * 2.0**self._failures)
        if step < self._ceiling_seconds:
            self._failures += 1
        return step * (0.5 + 0.5 * self._chance())

    def reset(self) -> None:
        """Start over after a success."""
        self._failures = 0


class Reminder:
    """Says when a lasting trouble is worth a line: at once, then at doubling distances."""

    def __init__(self, first_seconds: float = 15.0, ceiling_seconds: float = 600.0) -> None:
        self._first_seconds = first_seconds
        self._ceiling_seconds = ceiling_seconds
        self._text: str | None = None
        self._distance = first_seconds
        self._next = 0.0

    def due(self, text: str, now: float) -> bool:
        """Whether to say `text` at `now`; another text than last time always is."""
        if text != self._text:
            self._text, self._distance = text, self._first_seconds
        elif now < self._next:
            return False
        else:
            self._distance = min(self._ceiling_seconds, self._distance * 2)
        self._next = now + self._distance
        return True

    def over(self) -> bool:
        """Forget the trouble; true if there was one."""
        was_told, self._text = self._text is not None, None
        return was_told
