"""The dashboard's event stream: a snapshot for each new viewer, then the differences.

Snapshots are taken once per tick, and only while anybody watches. A viewer is only a number: how
far it has read. One that is further behind than the remembered differences gets a snapshot again,
so a slow viewer costs no memory. Differences are JSON merge patches (RFC 7396). Event ids contain
the process's epoch, so that a viewer notices a restart.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable
from secrets import token_hex

import msgspec

from .snapshot import Row, Snapshot

log = logging.getLogger(__name__)

TICK_SECONDS = 0.25
"""Often enough that counters move smoothly, seldom enough for a thousand agents."""

HEARTBEAT_SECONDS = 15.0
"""How often an idle stream sends something: proxies end silent ones after 30 s or more."""

REMEMBERED_PATCHES = 240
"""A minute of differences: the time in which a page reconnects."""

REMEMBERED_BYTES = 4 * 1024 * 1024
"""The most memory for differences; a snapshot of a large fleet is about as long."""

RETRY_MILLISECONDS = 1000
"""When a page reconnects."""


class Feed:
    """`run` is its loop; `follow` is one viewer; `take` takes a snapshot."""

    def __init__(self, take: Callable[[], Snapshot]) -> None:
        self._take = take
        self._epoch = token_hex(4)
        self._number = 0
        self._state: Row = {}
        self._patches: deque[tuple[int, bytes]] = deque()
        self._bytes = 0
        self._changed = asyncio.Event()
        self._watched = asyncio.Event()
        self._closed = False
        self.viewers = 0

    async def run(self) -> None:
        """Take snapshots while anybody watches, until cancelled."""
        while True:
            await self._watched.wait()
            try:
                self.tick()
            except Exception:
                log.exception("the dashboard's feed failed and goes on")
            await asyncio.sleep(TICK_SECONDS)

    @property
    def remembered(self) -> int:
        """How many differences are remembered."""
        return len(self._patches)

    def close(self) -> None:
        """End every viewer's stream; the pages reconnect."""
        self._closed = True
        self._announce()

    async def follow(self, last_id: str | None) -> AsyncGenerator[bytes, None]:
        """One viewer's events: the differences since `last_id` if remembered, else a snapshot."""
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
                    # Not a comment: pages cannot see those, and must notice a dead connection.
                    yield b"event: beat\ndata: {}\n\n"
        finally:
            self.viewers -= 1
            if not self.viewers:
                self._watched.clear()

    # ── snapshots ─────────────────────────────────────────────────────────────────────────────

    def tick(self) -> None:
        """Take a snapshot, and send the difference if there is one."""
        snapshot = self._take()
        patch = difference(self._state, snapshot.state)
        if not patch:
            return
        self._state = snapshot.state
        self._number += 1
        self._remember(self._event("patch", {"now": snapshot.now, "patch": patch}))
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
        """The differences after a position; a snapshot if they are not remembered."""
        if position == self._number:
            return b""
        first = self._patches[0][0] if self._patches else self._number + 1
        if not first - 1 <= position < self._number:
            return self._snapshot()
        return b"".join(event for number, event in self._patches if number > position)

    def _snapshot(self) -> bytes:
        snapshot = self._take()
        whole = {"now": snapshot.now, "state": self._state, **snapshot.extra()}
        return self._event("snapshot", whole)

    def _event(self, kind: str, data: Row) -> bytes:
        head = f"id: {self._epoch}-{self._number}\nevent: {kind}\ndata: "
        return head.encode() + msgspec.json.encode(data) + b"\n\n"


def difference(old: Row, new: Row) -> Row:
    """The merge patch that turns one object into another; neither has nulls in it."""
    patch: Row = {}
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
