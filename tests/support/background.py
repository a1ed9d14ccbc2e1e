"""An event loop in a thread of its own, for tests whose client blocks."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import TypeVar

from support.deadline import DEADLINE_SECONDS

T = TypeVar("T")


class Background:
    """Runs coroutines in the thread's loop; `run` waits for one."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def run(self, work: Awaitable[T]) -> T:
        """What an awaitable gives.

        Raises:
            TimeoutError: it takes too long.
        """
        return asyncio.run_coroutine_threadsafe(_awaited(work), self._loop).result(DEADLINE_SECONDS)

    def call(self, function: Callable[[], T]) -> T:
        """What a function gives in the loop's own thread."""

        async def called() -> T:
            return function()

        return self.run(called())

    @contextmanager
    def holding(self, context: AbstractAsyncContextManager[T]) -> Iterator[T]:
        """An asynchronous context, open as long as the block runs, in one task from end to end."""
        opened: asyncio.Future[T] = asyncio.Future(loop=self._loop)
        close = asyncio.Event()

        async def hold() -> None:
            try:
                async with context as value:
                    opened.set_result(value)
                    await close.wait()
            except BaseException as exc:
                if not opened.done():
                    opened.set_exception(exc)
                    return
                raise

        held = asyncio.run_coroutine_threadsafe(hold(), self._loop)
        try:
            yield self.run(opened)
        finally:
            self._loop.call_soon_threadsafe(close.set)
            held.result(30.0)


async def _awaited(work: Awaitable[T]) -> T:
    return await work


@contextmanager
def background() -> Iterator[Background]:
    """A thread with a loop, which ends with the block."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="background loop", daemon=True)
    thread.start()
    try:
        yield Background(loop)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10.0)
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
