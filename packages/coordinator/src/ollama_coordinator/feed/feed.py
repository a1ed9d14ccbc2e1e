"""One picture, computed once per tick while anybody looks, and its differences for all viewers.

A viewer holds nothing but a number: how far it has read. One that falls behind what is remembered
gets a whole picture again, so a slow one costs no memory. Differences are JSON merge patches
(RFC 7396); event ids carry the process they belong to, so that a restart is noticed.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable
from datetime import datetime
from secrets import token_hex
from typing import Any

import msgspec
from msgspec import Struct

log = logging.getLogger(__name__)

TICK_SECONDS = 0.25
HEARTBEAT_SECONDS = 15.0
REMEMBERED_PATCHES = 240
REMEMBERED_BYTES = 4 * 1024 * 1024
RETRY_MILLISECONDS = 1000

State = dict[str, Any]


class Snapshot(Struct, frozen=True):
    """What a picture is made of: `state` is compared with the last one, `extra` is for new viewers.

    `now` is the coordinator's clock at that moment.
    """

    now: datetime
    state: State
    extra: Callable[[], State]


class Feed:
    """`run` is its loop; `follow` is one viewer."""

    def __init__(self, draw: Callable[[], Snapshot]) -> None:
        self._draw = draw
        self._epoch = token_hex(4)
        self._number = 0
        self._state: State = {}
        self._patches: deque[tuple[int, bytes]] = deque()
        self._bytes = 0
        self._changed = asyncio.Event()
        self._watched = asyncio.Event()
        self._closed = False
        self.viewers = 0

    async def run(self) -> None:
        """Compute while anybody looks, until cancelled."""
        while True:
            await self._watched.wait()
            try:
                self.tick()
            except Exception:
                log.exception("the dashboard's picture stumbled and goes on")
            await asyncio.sleep(TICK_SECONDS)

    @property
    def remembered(self) -> int:
        """How many differences a viewer may be behind."""
        return len(self._patches)

    def close(self) -> None:
        """Send every viewer away; they come back to whoever serves next."""
        self._closed = True
        self._announce()

    async def follow(self, last_id: str | None) -> AsyncGenerator[bytes, None]:
        """One viewer's events: what it missed since `last_id` if that is known, else everything."""
        self.viewers += 1
        self._watched.set()
        try:
            self.tick()
            position = self._resume(last_id)
            yield f"retry: {RETRY_MILLISECONDS}\n\n".encode()
            while not self._closed:
                changed = self._changed
                events = self._since(position)
                position = self._number
                if events:
                    yield events
                elif not await _happens(changed, HEARTBEAT_SECONDS):
                    # Not a comment: pages cannot see those, and must notice a dead line.
                    yield b"event: beat\ndata: {}\n\n"
        finally:
            self.viewers -= 1
            if not self.viewers:
                self._watched.clear()

    # ── the picture ───────────────────────────────────────────────────────────────────────────

    def tick(self) -> None:
        """Draw anew, and tell the difference if there is one."""
        sketch = self._draw()
        patch = difference(self._state, sketch.state)
        if not patch:
            return
        self._state = sketch.state
        self._number += 1
        self._remember(self._event("patch", {"now": sketch.now, "patch": patch}))
        self._announce()

    def _remember(self, event: bytes) -> None:
        self._patches.append((self._number, event))
        self._bytes += len(event)
        while len(self._patches) > REMEMBERED_PATCHES or self._bytes > REMEMBERED_BYTES:
            self._bytes -= len(self._patches.popleft()[1])

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # ── one viewer ────────────────────────────────────────────────────────────────────────────

    def _resume(self, last_id: str | None) -> int:
        epoch, _, number = (last_id or "").partition("-")
        return int(number) if epoch == self._epoch and number.isdigit() else -1

    def _since(self, position: int) -> bytes:
        """The patches after a position, or the whole picture when they are not remembered."""
        if position == self._number:
            return b""
        first = self._patches[0][0] if self._patches else self._number + 1
        if not first - 1 <= position < self._number:
            return self._snapshot()
        return b"".join(event for number, event in self._patches if number > position)

    def _snapshot(self) -> bytes:
        sketch = self._draw()
        whole = {"now": sketch.now, "state": self._state, **sketch.extra()}
        return self._event("snapshot", whole)

    def _event(self, kind: str, data: State) -> bytes:
        head = f"id: {self._epoch}-{self._number}\nevent: {kind}\ndata: "
        return head.encode() + msgspec.json.encode(data) + b"\n\n"


def difference(old: State, new: State) -> State:
    """The merge patch that turns one object into another; neither has nulls in it."""
    patch: State = {}
    for key, value in new.items():
        before = old.get(key)
        if before is value or before == value:
            continue
        if isinstance(before, dict) and isinstance(value, dict):
            patch[key] = difference(before, value)
        else:
            patch[key] = value
    for key in old.keys() - new.keys():
        patch[key] = None
    return patch


async def _happens(event: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True
