"""A stand-in for one Ollama node: its wire behaviour, its scheduler, and its ways to fail.

    async with StandIn([Model("llama3.2", size_bytes=2_000_000_000)], slots=2) as ollama:
        ollama.hold(after=2)                            # generations wait after two tokens
        ...                                             # a client streams from ollama.url
        await ollama.seen.wait_for(lambda seen: seen.held == 1)
        with ollama.faults.status(503, times=1, paths=["/api/chat"]):
            ...
        await ollama.kill()                             # the process dies
        await ollama.start()                            # and comes back on the same port

`python -m support.ollama --help` runs one on its own.
"""

from .faults import HEALTH_PATHS, Fault, Faults, Injected
from .hardware import Hardware
from .models import Model
from .script import Request, Script, ToolCall
from .seen import Record, Seen
from .server import StandIn

__all__ = [
    "HEALTH_PATHS",
    "Fault",
    "Faults",
    "Hardware",
    "Injected",
    "Model",
    "Record",
    "Request",
    "Script",
    "Seen",
    "StandIn",
    "ToolCall",
]
