"""Whether a coordinator is, after hostile input, as it was before."""

import asyncio
import gc
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import aiohttp
import psutil

from .coordinator import Running
from .deadline import DEADLINE_SECONDS

MEBIBYTE = 1024 * 1024

SLACK_MEBIBYTES = 24
"""By so much the memory may differ: the allocator returns it when it likes."""


class Left(NamedTuple):
    """What there is in a process that has a coordinator in it."""

    tasks: Counter[str]
    descriptors: int
    mebibytes: float

    @classmethod
    def now(cls) -> "Left":
        """What there is now."""
        names = (str(task.get_coro()) for task in asyncio.all_tasks())
        process = psutil.Process()
        files = "num_handles" if sys.platform == "win32" else "num_fds"
        descriptors = getattr(process, files)()
        return cls(
            Counter(name.partition(" at ")[0] for name in names),
            descriptors,
            process.memory_info().rss / MEBIBYTE,
        )

    def beyond(self, before: "Left") -> dict[str, object]:
        """What there is more than before."""
        found: dict[str, object] = dict(self.tasks - before.tasks)
        if self.descriptors > before.descriptors:
            found["descriptors"] = self.descriptors - before.descriptors
        if self.mebibytes > before.mebibytes + SLACK_MEBIBYTES:
            found["MiB"] = self.mebibytes - before.mebibytes
        return found


async def leaves_nothing(
    coordinator: Running, attack: Callable[[], Awaitable[object]], *, times: int = 2
) -> None:
    """Do something once, and then so often again; afterwards all must be as after the first time.

    That first time fills the pools of connections and the caches. What `attack` opens it closes.
    """
    kept, coordinator.session = (
        coordinator.session,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)),
    )
    try:
        await attack()
        before = await _settled(coordinator, None)
        for _ in range(times):
            await attack()
        await _settled(coordinator, before)
    finally:
        await coordinator.session.close()
        coordinator.session = kept
    assert (await coordinator.get("/healthz"))["status"] == "ok"


async def _settled(coordinator: Running, before: Left | None) -> Left:
    """What there is once all requests have ended, and nothing is beyond what was before.

    Without a `before`: once it does not become less any more.
    """
    await coordinator.until(coordinator.at_rest)
    until = asyncio.get_running_loop().time() + DEADLINE_SECONDS
    last: Left | None = None
    while True:
        gc.collect()
        found = Left.now()
        if before is not None and not found.beyond(before):
            return found
        if before is None and last is not None and not last.beyond(found):
            return found
        last = found
        if asyncio.get_running_loop().time() > until:
            assert before is not None
            raise AssertionError(f"left behind: {found.beyond(before)}")
        await asyncio.sleep(0.3)
