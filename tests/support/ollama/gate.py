"""Points where a test can stop the node and let it go on, each by itself or all at once."""

from __future__ import annotations

import asyncio

from .seen import Seen


class Gate:
    """Holds loads, evaluations of prompts, generations and unloads until released."""

    def __init__(self, seen: Seen) -> None:
        self._seen = seen
        self._tokens, self._prompts, self._loads, self._unloads = (_opened() for _ in range(4))
        self._after = 0

    def hold(self, after: int = 0) -> None:
        """Generations wait before their token number `after`."""
        self._after = after
        self._tokens.clear()

    def hold_prompts(self) -> None:
        """No prompt is evaluated to its end."""
        self._prompts.clear()

    def hold_loads(self) -> None:
        self._loads.clear()

    def hold_unloads(self) -> None:
        """What is unloaded stays in memory, and in the list of what is loaded."""
        self._unloads.clear()

    def release(self) -> None:
        """Everything goes on."""
        for event in (self._tokens, self._prompts, self._loads, self._unloads):
            event.set()

    def stops(self, produced: int) -> bool:
        """Whether a generation with that many tokens has to wait; cheap, asked per token."""
        return produced >= self._after and not self._tokens.is_set()

    @property
    def holds_prompts(self) -> bool:
        return not self._prompts.is_set()

    @property
    def holds_unloads(self) -> bool:
        return not self._unloads.is_set()

    async def before_token(self) -> None:
        await self._wait(self._tokens)

    async def before_prompt_ends(self) -> None:
        await self._wait(self._prompts)

    async def before_load_ends(self) -> None:
        await self._wait(self._loads)

    async def before_unload_ends(self) -> None:
        await self._wait(self._unloads)

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


def _opened() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event
