"""Make a block of code in another task raise an exception of one's choice."""

import asyncio
from types import TracebackType


class Interrupt:
    """`async with interrupt:` runs a block that `fire(exception)` ends with that exception.

    It works as `asyncio.timeout` does: the task is cancelled and the cancellation is turned into
    the exception when it leaves the block. A cancellation from elsewhere stays one. Firing before
    the block starts ends it at its first step; firing after its end does nothing. What happens
    inside of the block while it ends sees a cancellation that has the exception's text.
    """

    def __init__(self) -> None:
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0
        self._exception: Exception | None = None
        self._over = False

    def fire(self, exception: Exception) -> None:
        """End the block with `exception`; only the first call counts."""
        if self._exception is not None or self._over:
            return
        self._exception = exception
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
        if self._exception is None or self._task is None:
            return
        from_elsewhere = self._task.uncancel() > self._cancelling
        if kind is asyncio.CancelledError and not from_elsewhere:
            raise self._exception from raised
