"""Which event loop runs the coordinator: uvloop is an extra, for it is not there on Windows."""

from asyncio import AbstractEventLoop
from collections.abc import Callable

from ollama_coordinator_common.error import ConfigError

LOOPS = ("auto", "asyncio", "uvloop")


def loop_of(name: str) -> Callable[[], AbstractEventLoop] | None:
    """What makes the event loop; `None` is asyncio's own.

    Raises:
        ConfigError: uvloop is wanted, and not installed.
    """
    if name == "asyncio":
        return None
    try:
        import uvloop
    except ImportError as exc:
        if name == "auto":
            return None
        command = "uv tool install './packages/coordinator[fast]'"
        expected = f"in a clone, run {command} (not on Windows); or give auto"
        raise ConfigError("COORDINATOR_LOOP", name, expected) from exc
    return uvloop.new_event_loop
