"""One loaded model: its slots, who waits for one, and the prompt each slot remembers."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import msgspec

from .models import Model
from .seen import Seen
from .wire import FOREVER_SECONDS

MIN_CONTEXT = 4
MIN_CONTEXT_VISION = 2048


class Settings(msgspec.Struct, frozen=True):
    """What a loaded runner must agree on with a request, else it is loaded anew."""

    num_ctx: int
    num_batch: int = 512
    num_gpu: int | None = None
    main_gpu: int = 0
    use_mmap: bool | None = None
    num_thread: int = 0
    draft_num_predict: int = 0
    shift: bool = True
    adapters: tuple[str, ...] = ()
    projectors: tuple[str, ...] = ()

    def serves(self, wanted: Settings) -> bool:
        if wanted.num_gpu is None:  # absent or negative: whatever is loaded will do
            wanted = msgspec.structs.replace(wanted, num_gpu=self.num_gpu)
        return self == wanted


@dataclass(eq=False)
class Slot:
    """Room for one generation; what it evaluated last it need not evaluate again."""

    cached: str = ""
    evaluation: asyncio.Task[None] | None = None  # of the prompt; goes on without its client

    def overlap(self, prompt: str) -> int:
        return common_prefix(self.cached, prompt) if self.cached else 0


def common_prefix(a: str, b: str) -> int:
    """Length of the common beginning, by bisection: prompts may be long."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(eq=False)
class Runner:
    """A model in memory, loading or loaded."""

    model: Model
    settings: Settings
    slot_count: int
    keep_alive: float
    seen: Seen
    memory_bytes: int = 0
    vram_bytes: int = 0
    ready: bool = False
    doomed: bool = False  # goes as soon as nobody uses it
    unloading: asyncio.Task[None] | None = None
    refs: int = 0  # requests using it or waiting for one of its slots
    expires_at: float | None = None
    timer: asyncio.TimerHandle | None = None
    settled: asyncio.Event = field(default_factory=asyncio.Event)  # load ended, well or not
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    busy: int = 0
    slots: list[Slot] = field(init=False)
    free: list[Slot] = field(init=False)
    waiting: deque[tuple[str, asyncio.Future[Slot]]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.slots = [Slot() for _ in range(self.slot_count)]
        self.free = list(self.slots)

    @property
    def lives_on(self) -> bool:
        return not self.doomed and self.keep_alive > 0

    @property
    def forever(self) -> bool:
        return self.keep_alive >= FOREVER_SECONDS

    @contextlib.asynccontextmanager
    async def slot(self, prompt: str) -> AsyncIterator[Slot]:
        """A slot, first come first served; among free ones the one that knows most of it."""
        slot = self._take(prompt) if self.free else await self._wait(prompt)
        self.busy += 1
        self.seen.generation(+1)
        try:
            yield slot
        finally:
            if slot.evaluation is None or slot.evaluation.done():
                self._end(slot)
            else:
                slot.evaluation.add_done_callback(lambda _: self._end(slot))

    def _end(self, slot: Slot) -> None:
        slot.evaluation = None
        self.busy -= 1
        self._give(slot)
        self.seen.generation(-1)

    def _take(self, prompt: str) -> Slot:
        slot = max(self.free, key=lambda slot: slot.overlap(prompt))
        self.free.remove(slot)
        return slot

    def _give(self, slot: Slot) -> None:
        while self.waiting:
            _, future = self.waiting.popleft()
            if not future.done():
                future.set_result(slot)
                return
        self.free.append(slot)

    async def _wait(self, prompt: str) -> Slot:
        future: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        entry = (prompt, future)
        self.waiting.append(entry)
        self.seen.waiting += 1
        self.seen.changed()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():  # handed over, but its owner has left
                self._give(future.result())
            raise
        finally:
            self.seen.waiting -= 1
            if entry in self.waiting:
                self.waiting.remove(entry)
            self.seen.changed()
