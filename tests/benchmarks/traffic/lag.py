"""How late an event loop is: a program that is behind measures itself."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from ollama_coordinator.simulation.summary import percentile

STEP_SECONDS = 0.02


class Lag:
    """Seconds by which a loop woke up too late, looked at fifty times a second."""

    def __init__(self) -> None:
        self._late: list[float] = []

    @contextmanager
    def measured(self, after: float = 0.0) -> Iterator[None]:
        """Look during the block, from so many seconds after its start on."""
        looking = asyncio.create_task(self._look(after))
        try:
            yield
        finally:
            looking.cancel()

    @property
    def p99(self) -> float:
        """What 99 % of the looks did not exceed."""
        return percentile(sorted(self._late), 0.99)

    def note(self, late: float) -> None:
        """A look was so late; those that were due meanwhile are counted too, each with its own."""
        self._late.append(max(late, 0.0))
        while (late := late - STEP_SECONDS) > 0:
            self._late.append(late)

    async def _look(self, after: float) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(after)
        while True:
            due = loop.time() + STEP_SECONDS
            await asyncio.sleep(STEP_SECONDS)
            self.note(loop.time() - due)
