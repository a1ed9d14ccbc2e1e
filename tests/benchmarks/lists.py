"""What it costs to list a large fleet, and how long the event loop stands still meanwhile.

`python tests/benchmarks/lists.py` prints for every list the milliseconds of a call, the longest
time in which nothing else ran in the loop, and the bytes of the answer: when nothing has changed,
after one agent lost or got a model, and after every agent reported other models. All times are of
the CPU, so that other work on the machine does not count; of several calls the median is told.
"""

import argparse
import asyncio
import gc
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import msgspec
from starlette.types import Message

from ollama_coordinator.app import create_app
from ollama_coordinator.parts import Parts
from ollama_coordinator_common.protocol import HealthReport, RegisterRequest
from ollama_coordinator_common.settings import CoordinatorConfig
from ollama_coordinator_common.types import AgentId

PATHS = ("/api/models", "/api/tags", "/v1/models", "/api/ps", "/api/agents", "/v1/models/model-7")
CHANGES = ("nothing", "one agent", "every agent")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--agents", type=int, default=1000)
    parser.add_argument("--models", type=int, default=100, help="on each agent")
    parser.add_argument("--names", type=int, default=500, help="different ones in the fleet")
    parser.add_argument("--calls", type=int, default=7, help="of which the median is told")
    asyncio.run(measure(parser.parse_args()))


async def measure(wanted: argparse.Namespace) -> None:
    app = create_app(CoordinatorConfig(database_url="sqlite://:memory:"))
    parts: Parts = app.state.parts
    # Not started: what a coordinator does beside would be counted too.
    fleet = Fleet(parts, wanted.agents, wanted.models, wanted.names)
    print(f"{wanted.agents} agents x {wanted.models} models, {wanted.names} names")
    print(f"{'list':20} {'changed':13} {'ms a call':>10} {'loop stands':>12} {'bytes':>12}")
    for path in PATHS:
        for change in CHANGES:
            taken, stood, size = [], [], 0
            await ask(app, path)
            for call in range(wanted.calls):
                fleet.change(change, call)
                gc.collect()
                async with standstill() as longest:
                    began = time.thread_time()
                    size = await ask(app, path)
                    taken.append(time.thread_time() - began)
                stood.append(longest[0])
            ms = [1000 * statistics.median(values) for values in (taken, stood)]
            print(f"{path:20} {change:13} {ms[0]:10.2f} {ms[1]:12.2f} {size:12,}")


class Fleet:
    """Agents that report their models with their heartbeats."""

    def __init__(self, parts: Parts, agents: int, models: int, names: int) -> None:
        self.registry, self.clock = parts.registry, parts.clock
        self.plan = parts.dispatch.plan
        self.agents, self.models, self.names = agents, models, names
        now = self.clock.now()
        for number in range(agents):
            request = RegisterRequest(f"gpu-{number}", "127.0.0.1", "0.33.0", 20_000 + number)
            self.registry.register(request, self._id(number), datetime.now(UTC), now)
            self._report(number)

    def change(self, what: str, call: int) -> None:
        if what == "one agent":
            self._report(0, fewer=(call + 1) % 2)
        elif what == "every agent":
            for number in range(self.agents):
                self._report(number, size=call + 1)
        self.plan()

    def _report(self, number: int, *, fewer: int = 0, size: int = 0) -> None:
        listed = [(number * 7 + index) % self.names for index in range(self.models - fewer)]
        report = HealthReport(
            self._id(number),
            10.0,
            20.0,
            0,
            tags=msgspec.Raw(tags(listed, size)),
            ps=msgspec.Raw(ps(listed[:4])),
            model_blobs={f"model-{index}:latest": f"sha256:{index:064}" for index in listed},
        )
        self.registry.heartbeat(report, self.clock.now())

    def _id(self, number: int) -> AgentId:
        return AgentId(f"agent-{number:05}")


def tags(listed: list[int], size: int) -> bytes:
    return msgspec.json.encode({"models": [row(index, size) for index in listed]})


def ps(listed: list[int]) -> bytes:
    more = {
        "size_vram": 4_000_000_000,
        "context_length": 8192,
        "expires_at": "2099-01-01T00:00:00.123456789+09:00",
    }
    return msgspec.json.encode({"models": [{**row(index), **more} for index in listed]})


def row(index: int, size: int = 0) -> dict[str, object]:
    name = f"model-{index}:latest"
    details = {"format": "gguf", "family": "llama", "families": ["llama"], "parent_model": ""}
    sizes = {"parameter_size": "8.0B", "quantization_level": "Q4_K_M", "context_length": 131072}
    return {
        "name": name,
        "model": name,
        "modified_at": f"2026-01-{index % 28 + 1:02}T08:00:00.123456789+09:00",
        "size": 4_000_000_000 + size,
        "digest": f"{index:064}",
        "details": {**details, **sizes},
        "capabilities": ["completion", "tools"],
    }


async def ask(app: object, path: str) -> int:
    """The bytes of an answer, got from the application itself."""
    size = 0

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        nonlocal size
        assert message.get("status", 200) == 200, message
        size += len(message.get("body", b""))

    scope = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode()}
    scope |= {"query_string": b"", "headers": [], "http_version": "1.1", "scheme": "http"}
    await app(scope, receive, send)  # type: ignore[operator]
    return size


@asynccontextmanager
async def standstill() -> AsyncIterator[list[float]]:
    """The longest time in which a task could not run that always wants to."""
    longest = [0.0]

    async def tick() -> None:
        while True:
            before = time.thread_time()
            await asyncio.sleep(0)
            longest[0] = max(longest[0], time.thread_time() - before)

    ticking = asyncio.create_task(tick())
    await asyncio.sleep(0)
    yield longest
    await asyncio.sleep(0)
    ticking.cancel()


if __name__ == "__main__":
    main()
