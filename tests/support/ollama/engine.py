"""The node's scheduler: which models are in memory, who loads next, who has to go.

A request for a loaded, compatible model takes it at once. Any other takes its turn in a bounded
line; the one whose turn it is evicts what must go, loads, and only then lets the next one in.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from .gate import Gate
from .hardware import Hardware
from .models import Model
from .runner import MIN_CONTEXT, MIN_CONTEXT_VISION, Runner, Settings
from .seen import Seen
from .wire import BUSY, ApiError


class Engine:
    """Runners by the blob they hold, so that two names of one blob share a runner."""

    def __init__(
        self,
        *,
        hardware: Hardware,
        seen: Seen,
        gate: Gate,
        slots: int,
        max_loaded_models: int,
        max_queue: int,
        keep_alive: float,
        default_context: int | None,
        evaluates_on: bool,
        load_failure: Callable[[Model], str | None],
    ) -> None:
        self.hardware = hardware
        self.seen = seen
        self.gate = gate
        self.slots = slots
        self.max_loaded_models = max_loaded_models
        self.max_queue = max_queue
        self.keep_alive = keep_alive
        self.default_context = default_context or hardware.default_context()
        self.evaluates_on = evaluates_on
        self._load_failure = load_failure
        self._runners: dict[str, Runner] = {}
        self._turn = asyncio.Lock()
        self._ended: set[asyncio.Task[None]] = set()  # work that is being cancelled

    @property
    def loaded(self) -> list[Runner]:
        """What ps shows: loaded models, latest expiry first."""
        ready = [runner for runner in self._runners.values() if runner.ready]
        return sorted(ready, key=self.expiry, reverse=True)

    @property
    def busy_runners(self) -> int:
        return sum(1 for runner in self._runners.values() if runner.busy)

    def expiry(self, runner: Runner) -> float:
        """When it will go, as epoch seconds; for a busy one, were it to go idle now."""
        if runner.expires_at is not None and not runner.refs:
            return runner.expires_at
        return time.time() + self._wall(runner)

    def settings(self, model: Model, options: Mapping[str, Any], *, shift: bool = True) -> Settings:
        """The part of a request's options that decides whether a runner serves it."""
        merged = {**model.parameters, **options}
        low = MIN_CONTEXT_VISION if "vision" in model.capabilities else MIN_CONTEXT
        wanted = int(merged.get("num_ctx") or self.default_context)
        num_gpu = merged.get("num_gpu")
        return Settings(
            num_ctx=min(max(wanted, low), max(model.context_length, low)),
            num_batch=int(merged.get("num_batch") or 512),
            num_gpu=num_gpu if num_gpu is not None and num_gpu >= 0 else None,
            main_gpu=int(merged.get("main_gpu") or 0),
            use_mmap=merged.get("use_mmap"),
            num_thread=int(merged.get("num_thread") or 0),
            draft_num_predict=int(merged.get("draft_num_predict") or 0),
            shift=shift,
            adapters=model.adapters,
            projectors=model.projectors,
        )

    @contextlib.asynccontextmanager
    async def runner(
        self, model: Model, settings: Settings, keep_alive: float | None
    ) -> AsyncIterator[Runner]:
        """The model in memory for as long as the block lasts."""
        runner = await self._ready(model, settings, keep_alive)
        try:
            yield runner
        finally:
            self._release(runner)

    def unload(self, model: Model) -> None:
        """Lets the model go: at once if idle, else when its requests have ended."""
        runner = self._runners.get(model.blob)
        if runner is not None and runner.ready:
            runner.keep_alive = 0.0
            self._settle(runner)

    def unload_all(self) -> None:
        for runner in list(self._runners.values()):
            if runner.ready:
                runner.doomed = True
                self._settle(runner)

    async def close(self) -> None:
        """Forgets every runner and ends its work, as the end of the process does."""
        for runner in list(self._runners.values()):
            self._drop(runner)
        await asyncio.gather(*self._ended, return_exceptions=True)
        self._ended.clear()

    async def _ready(self, model: Model, settings: Settings, keep_alive: float | None) -> Runner:
        while True:
            runner = self._runners.get(model.blob)
            if runner is None:
                break
            if not runner.ready:
                await runner.settled.wait()
            elif runner.unloading is not None:
                await runner.gone.wait()
            elif runner.settings.serves(settings):
                return self._use(runner, keep_alive)
            else:
                break
        async with self._my_turn():
            runner = self._runners.get(model.blob)
            if runner is not None and runner.settings.serves(settings):
                return self._use(runner, keep_alive)
            if runner is not None:
                await self._evict(runner)
                self.seen.reloads += 1
            return self._use(await self._load(model, settings, keep_alive), keep_alive)

    @contextlib.asynccontextmanager
    async def _my_turn(self) -> AsyncIterator[None]:
        if self._turn.locked() and self.seen.queued >= self.max_queue:
            raise ApiError(503, BUSY)
        self.seen.queued += 1
        self.seen.changed()
        try:
            await self._turn.acquire()
        finally:
            self.seen.queued -= 1
            self.seen.changed()
        try:
            yield
        finally:
            self._turn.release()

    async def _load(self, model: Model, settings: Settings, keep_alive: float | None) -> Runner:
        slots = 1 if model.serial else self.slots
        runner = Runner(
            model=model,
            settings=settings,
            slot_count=slots,
            keep_alive=self.keep_alive if keep_alive is None else keep_alive,
            seen=self.seen,
            memory_bytes=model.size_bytes + model.kv_bytes_per_token * settings.num_ctx * slots,
        )
        hardware = self.hardware
        runner.vram_bytes = (
            0 if hardware.cpu_only else min(runner.memory_bytes, hardware.vram_bytes)
        )
        await self._make_room(runner.memory_bytes)
        self._runners[model.blob] = runner
        self.seen.loading += 1
        self.seen.changed()
        try:
            await self._bring_in(runner)
        except BaseException:
            self._drop(runner)
            raise
        finally:
            self.seen.loading -= 1
            runner.settled.set()
            self.seen.changed()
        return runner

    async def _bring_in(self, runner: Runner) -> None:
        try:
            if seconds := self.hardware.load_seconds(runner.model):
                await asyncio.sleep(seconds)
            await self.gate.before_load_ends()
        except asyncio.CancelledError:  # whoever asked for the load has left: it is given up
            self.seen.loads_aborted += 1
            raise
        if failure := runner.model.damage or self._load_failure(runner.model):
            self.seen.loads_failed += 1
            raise ApiError(500, failure)
        runner.ready = True
        self.seen.loads += 1

    async def _make_room(self, wanted_bytes: int) -> None:
        while self._runners and not self._fits(wanted_bytes):
            # Idle before busy, then the shortest keep-alive: a busy one is waited for.
            victim = min(self._runners.values(), key=lambda r: (r.refs > 0, r.keep_alive))
            await self._evict(victim)
            self.seen.evictions += 1

    def _fits(self, wanted_bytes: int) -> bool:
        used = sum(runner.memory_bytes for runner in self._runners.values())
        few_enough = len(self._runners) < self.max_loaded_models
        free = self.hardware.vram_bytes - used
        return few_enough and wanted_bytes <= free * self.hardware.fit_share

    async def _evict(self, runner: Runner) -> None:
        runner.doomed = True
        self._settle(runner)
        await runner.gone.wait()

    def _use(self, runner: Runner, keep_alive: float | None) -> Runner:
        if keep_alive is not None:  # sticks for later requests that say nothing
            runner.keep_alive = keep_alive
        runner.refs += 1
        self._stop_timer(runner)
        return runner

    def _release(self, runner: Runner) -> None:
        runner.refs -= 1
        self._settle(runner)

    def _settle(self, runner: Runner) -> None:
        """What becomes of a runner after a change: nothing, a timer, or its end."""
        self._stop_timer(runner)
        if runner.refs or runner.gone.is_set() or runner.unloading is not None:
            return
        if not runner.lives_on:
            self._unload(runner)
            return
        seconds = self._wall(runner)
        runner.expires_at = time.time() + seconds
        if not runner.forever:
            runner.timer = asyncio.get_running_loop().call_later(seconds, self._expire, runner)

    def _expire(self, runner: Runner) -> None:
        runner.doomed = True
        self._settle(runner)

    def _unload(self, runner: Runner) -> None:
        """Takes its time where a node's does; until then it is listed as loaded."""
        if self.hardware.unload_seconds or self.gate.holds_unloads:
            runner.unloading = asyncio.create_task(self._unloaded(runner))
        else:
            self._unloaded_now(runner)

    async def _unloaded(self, runner: Runner) -> None:
        await self.gate.before_unload_ends()
        await asyncio.sleep(self.hardware.unload_seconds / self.hardware.speed)
        self._unloaded_now(runner)

    def _unloaded_now(self, runner: Runner) -> None:
        self._drop(runner)
        self.seen.unloads += 1
        self.seen.changed()

    def _drop(self, runner: Runner) -> None:
        """The process ends, and with it what it still evaluated for clients that had left."""
        self._stop_timer(runner)
        for work in (runner.unloading, *(slot.evaluation for slot in runner.slots)):
            if work is not None and work is not asyncio.current_task() and not work.done():
                work.cancel()
                self._ended.add(work)
                work.add_done_callback(self._ended.discard)
        if self._runners.get(runner.model.blob) is runner:
            del self._runners[runner.model.blob]
        runner.gone.set()

    def _stop_timer(self, runner: Runner) -> None:
        if runner.timer is not None:
            runner.timer.cancel()
            runner.timer = None

    def _wall(self, runner: Runner) -> float:
        return runner.keep_alive if runner.forever else runner.keep_alive / self.hardware.speed
