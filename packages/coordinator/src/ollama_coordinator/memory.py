"""The memory that requests take: how much there is, and who has it."""

import asyncio
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from ollama_coordinator_common.error import OllamaCoordinatorError

from .clock import Clock

ROOM_SECONDS = 10.0
"""How long a body waits for room: others are read within seconds, or answered."""

SHARE = 4
"""Bodies take at most one byte in so many of the machine's memory."""

SPARED = 2
"""One byte in so many of the room is left to bodies, whatever else takes of it."""

LEAST_ROOM_BYTES, MEMORY_BYTES = 64 * 1024 * 1024, 4 * 1024**3
"""Room for bodies in any case, as the largest one by default needs; a machine's memory where the
platform does not tell."""

CGROUPS = {"": ("/sys/fs/cgroup", "memory.max")} | {
    "memory": ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
}
"""Where Linux says what a service or a container may take, in cgroups 2 and 1; `max`: no limit."""


def cgroup_limits(own: str = "/proc/self/cgroup") -> Iterator[str]:
    """The files with the limits of this process's cgroup, and of those around it."""
    with suppress(OSError, ValueError):
        for line in Path(own).read_text("utf-8").splitlines():
            _, controllers, name = line.split(":", 2)
            for root, file in (CGROUPS[one] for one in controllers.split(",") if one in CGROUPS):
                folder = Path(root, name.lstrip("/"))
                while folder.is_relative_to(root):
                    yield str(folder / file)
                    folder = folder.parent


def _own_limits() -> Iterator[int]:
    """What this process may take by `ulimit -v` and `-d`, or systemd's LimitAS and LimitDATA."""
    with suppress(ImportError):  # as on Windows
        import resource

        for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
            soft, _ = resource.getrlimit(kind)
            if soft != resource.RLIM_INFINITY:
                yield soft


def memory_share(limits: Iterable[str] | None = None) -> int:
    """The bytes that request bodies may take; `limits` are files with what all may take."""
    memory = MEMORY_BYTES
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    memory = min([memory, *_own_limits()])
    for path in cgroup_limits() if limits is None else limits:
        with suppress(OSError, ValueError):
            memory = min(memory, int(Path(path).read_text("ascii")))
    return max(memory // SHARE, LEAST_ROOM_BYTES)


class NoRoom(OllamaCoordinatorError):
    """So many requests have large bodies that one more has to wait for the end of another."""

    def __init__(self) -> None:
        super().__init__("too many requests with large bodies; please try again")


class BodyRoom:
    """The memory that all request bodies take together, at most `limit` bytes.

    A body that does not fit waits, and is not read from its socket meanwhile; the longest waiting
    one is next. One that is larger than the limit is let in alone.
    """

    def __init__(self, limit: int, clock: Clock) -> None:
        self._limit = limit
        self._clock = clock
        self.used = 0
        self._next = asyncio.Lock()
        self._freed = asyncio.Event()

    async def take(self, size: int) -> None:
        """Wait for room for so many bytes.

        Raises:
            NoRoom: there was none for `ROOM_SECONDS`.
        """
        try:
            async with self._clock.timeout(ROOM_SECONDS), self._next:
                while self.used and self.used + size > self._limit:
                    self._freed.clear()
                    await self._freed.wait()
                self.used += size
        except TimeoutError as exc:
            raise NoRoom from exc

    def take_spare(self, size: int) -> bool:
        """Take so many bytes at once, for what is no body; whether there was room.

        Enough is left for bodies, which would be refused for want of it.
        """
        if self.used + size > self._limit // SPARED:
            return False
        self.used += size
        return True

    def give_back(self, size: int) -> None:
        """These bytes are free again."""
        self.used -= size
        self._freed.set()
