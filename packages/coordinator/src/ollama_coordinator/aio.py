"""Additions to asyncio: interrupts, tasks with an owner, long work in slices, the event loop."""

import asyncio
import logging
from asyncio import AbstractEventLoop
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from time import perf_counter
from types import TracebackType
from typing import Any

from ollama_coordinator_common.error import ConfigError

log = logging.getLogger(__name__)

OFF = "off"
"""The value of `COORDINATOR_TLS` without TLS."""

SLICE_SECONDS = 0.002
"""How long a computation may hold up the streams of other requests."""


class Interrupt:
    """`async with interrupt:` runs a block that `fire(exception)` ends with that exception.

    It works as `asyncio.timeout` does: the task is cancelled, and the cancellation becomes the
    exception when it leaves the block. A cancellation from elsewhere stays one. Firing before
    the block starts ends it at its first step; firing after its end does nothing. Code inside of
    the block sees a cancellation with the exception's text.
    """

    def __init__(self) -> None:
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0
        self._exception: Exception | None = None
        self._over = False
        self._elsewhere: Callable[[Exception], None] | None = None

    def divert(self, fire: Callable[[Exception], None]) -> None:
        """Call `fire` in place of ending a block, which runs elsewhere."""
        self._elsewhere = fire
        if self._exception is not None:
            fire(self._exception)

    def fire(self, exception: Exception) -> None:
        """End the block with `exception`; only the first call counts."""
        if self._exception is not None or self._over:
            return
        self._exception = exception
        if self._elsewhere is not None:
            self._elsewhere(exception)
        if self._task is not None:
            self._task.cancel(str(exception) or None)

    async def __aenter__(self) -> "Interrupt":
        if self._exception is not None:
            raise self._exception
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("an Interrupt needs a running task")
        self._task = task
        self._cancelling = task.cancelling()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        raised: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over = True
        task, self._task = self._task, None
        exception, self._exception = self._exception, None
        if exception is None or task is None:
            return
        from_elsewhere = task.uncancel() > self._cancelling
        try:
            if isinstance(raised, asyncio.CancelledError) and not from_elsewhere:
                raise exception from raised.with_traceback(None)
        finally:
            # The exception's traceback has this frame: a name for it here would be a cycle, and
            # all that the frames refer to (a request's body) would stay until a full collection.
            # The cancellation's traceback is one where a generator's frame knows its caller, as
            # since Python 3.13: `contextlib` has the cancellation in that caller.
            del exception, raised, trace, task


class OwnedTasks:
    """`async with OwnedTasks() as tasks:` cancels on leaving every task that still runs.

    Unlike in a `TaskGroup`, the failure of one task ends no other: its error is logged.
    """

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> "OwnedTasks":
        return self

    async def __aexit__(self, *raised: object) -> None:
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `work` in a task of its own."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task failed", exc_info=error)


@asynccontextmanager
async def beside(*work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run `work` as long as the block runs: what has not ended by then is cancelled."""
    async with OwnedTasks() as tasks:
        for one in work:
            tasks.start(one)
        yield


async def first_of(*work: Coroutine[Any, Any, object]) -> None:
    """Run `work` until one of it has ended; the rest is cancelled."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Slices:
    """A long computation in the event loop, in slices: `await slices.pause()` often.

    Every `SLICE_SECONDS` the other tasks run; shared state may have changed afterwards.
    """

    def __init__(self) -> None:
        self._since = perf_counter()

    async def pause(self) -> None:
        """Let other tasks run, if this slice is over."""
        if perf_counter() - self._since >= SLICE_SECONDS:
            await asyncio.sleep(0)
            self._since = perf_counter()


def loop_of(name: str, tls: str = OFF) -> Callable[[], AbstractEventLoop] | None:
    """The factory of an event loop of this name; `None` for asyncio's own.

    uvloop is an extra, since it does not exist on Windows. It saves about a seventh of the CPU of a
    short answer, and a quarter of that of a streamed token. Where `tls` is not off, it is of no
    use: it reads a client's first bytes before TLS can be begun on a connection that is counted.

    Raises:
        ConfigError: uvloop is wanted, and not installed, or TLS too.
    """
    if name == "asyncio":
        return None
    if tls.lower() != OFF:
        if name == "auto":
            return None
        expected = "uvloop cannot serve COORDINATOR_TLS; give auto"
        raise ConfigError("COORDINATOR_LOOP", name, expected)
    try:
        import uvloop
    except ImportError as exc:
        if name == "auto":
            return None
        command = "uv tool install './packages/coordinator[fast]'"
        expected = f"in a clone, run {command} (not on Windows); or give auto"
        raise ConfigError("COORDINATOR_LOOP", name, expected) from exc
    return uvloop.new_event_loop
