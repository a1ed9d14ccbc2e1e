"""What an operation has to tell, for any number of clients that come and go at their own pace.

Of a layer only the newest line is kept: a client that reads slowly, or comes late, gets where
things stand and not everything that was. So nothing piles up.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable

import msgspec

from .progress import Line


class Feed:
    """Lines by what they are about, in the order of their last change."""

    def __init__(self) -> None:
        self._lines: dict[str, tuple[int, bytes]] = {}
        self._version = 0
        self._changed = asyncio.Event()
        self.is_over = False

    def tell(self, lines: Iterable[Line]) -> None:
        """Publish lines."""
        for line in lines:
            about = str(line.get("digest") or line.get("status") or "error")
            self._lines.pop(about, None)
            self._version += 1
            self._lines[about] = (self._version, msgspec.json.encode(line) + b"\n")
        self._wake()

    def end(self) -> None:
        """Nothing more will be told."""
        self.is_over = True
        self._wake()

    @property
    def last(self) -> bytes:
        """The newest line; empty before there is one."""
        return next(reversed(self._lines.values()))[1] if self._lines else b""

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def began(self) -> None:
        """Wait for the first line, or the end."""
        while not self._lines and not self.is_over:
            await self._changed.wait()

    async def over(self) -> None:
        """Wait for the end."""
        while not self.is_over:
            await self._changed.wait()

    async def follow(self) -> AsyncIterator[bytes]:
        """Where things stand, then what changes, until the end."""
        seen = 0
        while True:
            changed, is_over = self._changed, self.is_over
            news = self._since(seen)
            seen = self._version
            if news:
                yield news
            if is_over:
                return
            if changed is self._changed:
                await changed.wait()

    def _since(self, version: int) -> bytes:
        newer: list[bytes] = []
        for at, line in reversed(self._lines.values()):
            if at <= version:
                break
            newer.append(line)
        return b"".join(reversed(newer))
