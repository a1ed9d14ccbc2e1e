"""Ending on request: Ctrl-C, a service manager's stop, a closed terminal."""

import asyncio
import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
"""SIGHUP is POSIX's closed terminal, SIGBREAK Windows' Ctrl-Break and closed console."""


@contextlib.contextmanager
def cancelled_by_signals() -> Iterator[None]:
    """Cancel the current task on a signal, and end the block quietly once it has cleaned up.

    Plain handlers and not `loop.add_signal_handler`, which Windows does not have.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    if task is None:
        raise RuntimeError("no task to cancel")
    asked = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        loop.call_soon_threadsafe(task.cancel)

    before = {
        number: signal.signal(number, stop)
        for name in STOPPING
        if (number := getattr(signal, name, None)) is not None
        and signal.getsignal(number) is not signal.SIG_IGN  # as under nohup
    }
    try:
        yield
    except asyncio.CancelledError:
        if not asked:
            raise
        task.uncancel()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
