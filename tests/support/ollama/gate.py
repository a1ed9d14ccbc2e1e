"""Points where a test can stop the node and let it go on: generation, loads, everything."""

from __future__ import annotations

import asyncio

from .seen import Seen


class Gate:
    """Holds generations before their token number `after`, and loads, until released."""

    def __init__(self, seen: Seen) -> None:
        self._seen = seen
        self._open = asyncio.Event()
        self._open.set()
        self._loads_open = asyncio.Event()
        self._loads_open.set()
        self._after = 0

    def hold(self, after: int = 0) -> None:
        self._after = after
        self._open.clear()

    def hold_loads(self) -> None:
        self._loads_open.clear()

    def release(self) -> None:
        """Generations and loads go on."""
        self._open.set()
        self._loads_open.set()

    def stops(self, produced: int) -> bool:
        """Whether a generation with that many tokens has to wait; cheap, asked per token."""
        return produced >= self._after and not self._open.is_set()

    async def wait(self) -> None:
        await self._wait(self._open)

    async def before_load_ends(self) -> None:
        await self._wait(self._loads_open)

    async def _wait(self, event: asyncio.Event) -> None:
        if event.is_set():
            return
        self._seen.held += 1
        self._seen.changed()
        try:
            await event.wait()
        finally:
            self._seen.held -= 1
            self._seen.changed()
