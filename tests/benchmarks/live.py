"""The same trace through a real coordinator under each policy, against stand-ins as processes.

Eight unlike machines (`simulator/fleet.py`) and a drawn load (`simulator/workload.py`), with time
sped up; every machine reports like our agent. Prints the seconds to the first token, scaled back,
for each policy. `nox -s live`; `-- --policy NAME` for one.
"""

import argparse
import asyncio
import json
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from msgspec import Struct
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.simulator.fleet import mixed_fleet
from benchmarks.simulator.workload import make_trace
from ollama_coordinator.scheduler import Kind, Lane
from ollama_coordinator.simulation import MachineSpec, TraceRequest
from ollama_coordinator.simulation.machine import GIB, TYPICAL_BYTES
from ollama_coordinator.simulation.summary import percentile
from support import programs

REPORT_SECONDS = 2.0
PATIENCE_SECONDS = 120.0
IN_TIME_SECONDS = 10.0
POLICIES = ("predicted", "loaded-first", "least-connections", "round-robin", "random")


class Told(Struct):
    """What one client saw; seconds to the first token in the trace's time."""

    request: TraceRequest
    first_token: float | None = None
    trouble: str = ""


class Node:
    """One stand-in process and the reports that our agent would send for it."""

    def __init__(self, spec: MachineSpec, port: int, speed: float) -> None:
        self.spec = spec
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self._speed = speed
        self._agent_id = ""

    def command(self) -> list[str]:
        """How to start it."""
        spec = self.spec
        words = [sys.executable, "-m", "support.ollama", "--port", str(self.port)]
        for model in spec.models:
            words += ["--model", f"{model.name}={model.size_bytes}"]
        options: dict[str, object] = {
            "--slots": spec.slots,
            "--vram-gib": spec.memory_bytes / GIB,
            "--load-rate": spec.load_bytes_per_second,
            "--load-overhead": spec.load_overhead_seconds,
            "--prefill-rate": spec.prefill_tokens_per_second * TYPICAL_BYTES / 5e9,
            "--decode-rate": spec.decode_tokens_per_second * TYPICAL_BYTES / 5e9,
            "--batch-slowdown": spec.batch_factor,
            "--speed": self._speed,
        }
        for name, value in options.items():
            words += [name, str(value)]
        return words if spec.has_gpu else [*words, "--cpu-only"]

    async def register(self, session: aiohttp.ClientSession, coordinator: str) -> None:
        facts = {
            "machine_name": self.spec.name,
            "ip_address": "127.0.0.1",
            "ollama_version": "0.33.0",
            "ollama_port": self.port,
        }
        async with session.post(f"{coordinator}/api/agents", json=facts) as response:
            self._agent_id = (await response.json())["agent_id"]

    async def report(self, session: aiohttp.ClientSession, coordinator: str) -> None:
        """One heartbeat with everything that our agent tells."""
        lists = {}
        for name in ("tags", "ps"):
            async with session.get(f"{self.url}/api/{name}") as response:
                lists[name] = await response.json()
        memory = self.spec.memory_bytes
        used = sum(row["size"] for row in lists["ps"]["models"])
        gpu = {"name": "simulated", "memory_total_bytes": memory, "memory_used_bytes": used}
        report = {
            "agent_id": self._agent_id,
            "cpu_usage": 10,
            "memory_usage": 10,
            "active_requests": 0,
            "memory_total_bytes": memory,
            "gpus": [gpu] if self.spec.has_gpu else [],
            "runner": {"num_parallel": self.spec.slots, "max_loaded_models": 3},
            **lists,
        }
        async with session.post(f"{coordinator}/api/health", json=report) as response:
            assert response.status == 200, await response.text()


@asynccontextmanager
async def fleet(folder: Path, policy: str, speed: float) -> AsyncIterator[tuple[str, list[Node]]]:
    """The stand-ins and a coordinator that hears of them every other second."""
    async with AsyncExitStack() as stack:
        nodes = [Node(spec, programs.free_port(), speed) for spec in mixed_fleet().machines]
        for node in nodes:
            log, path = folder / f"{node.spec.name}.log", str(Path(__file__).parents[1])
            started = programs.program(log, *node.command(), PYTHONPATH=path)
            await programs.answers(node.url, await stack.enter_async_context(started))
        settings = {"COORDINATOR_POLICY": policy, "COORDINATOR_MAX_QUEUE": "100000"}
        url, _ = await stack.enter_async_context(
            programs.coordinator(folder, programs.free_port(), **settings)
        )
        session = await stack.enter_async_context(aiohttp.ClientSession())
        for node in nodes:
            await node.register(session, url)
            await node.report(session, url)
        reporting = asyncio.create_task(_report_for_ever(session, url, nodes))
        try:
            yield url, nodes
        finally:
            reporting.cancel()
            await asyncio.gather(reporting, return_exceptions=True)


async def _report_for_ever(session: aiohttp.ClientSession, url: str, nodes: list[Node]) -> None:
    while True:
        await asyncio.sleep(REPORT_SECONDS)
        await asyncio.gather(*(node.report(session, url) for node in nodes))


def body_of(request: TraceRequest) -> tuple[str, dict[str, Any]]:
    """The route and the body: words for tokens, and for each link of the prefix a message."""
    if request.kind is Kind.EMBED:
        return "/api/embed", {"model": request.model, "input": "word " * request.prompt_tokens}
    options = {"num_predict": request.output_tokens}
    links = request.prefix or (0,)
    share = max(request.prompt_tokens // len(links), 1)
    if request.kind is Kind.GENERATE:
        prompt = f"{links[0]} " + "word " * request.prompt_tokens
        return "/api/generate", {"model": request.model, "prompt": prompt, "options": options}
    roles = ["user" if index % 2 else "system" for index in range(len(links))]
    messages = [
        {"role": role, "content": f"{link} " + "word " * share}
        for role, link in zip(roles, links, strict=True)
    ]
    messages[-1]["role"] = "user"
    return "/api/chat", {"model": request.model, "messages": messages, "options": options}


async def ask(session: aiohttp.ClientSession, url: str, told: Told, speed: float) -> None:
    """One client: impatient until the first token, then it listens to the end."""
    loop = asyncio.get_running_loop()
    path, body = body_of(told.request)
    lane = "batch" if told.request.lane is Lane.BATCH else "interactive"
    started = loop.time()
    try:
        async with asyncio.timeout(PATIENCE_SECONDS / speed) as patience:
            headers = {"x-ollama-coordinator-lane": lane}
            async with session.post(url + path, json=body, headers=headers) as response:
                if response.status != 200:
                    told.trouble = f"{response.status} {(await response.text())[:200]}"
                    return
                async for _ in response.content.iter_any():
                    if told.first_token is None:
                        told.first_token = (loop.time() - started) * speed
                        patience.reschedule(None)
    except TimeoutError:
        told.trouble = "out of patience"
    except aiohttp.ClientError as exc:
        told.trouble = repr(exc)


async def play(url: str, trace: Sequence[TraceRequest], speed: float) -> list[Told]:
    """All clients, each at its time."""
    everything = [Told(request) for request in trace]
    loop = asyncio.get_running_loop()
    async with (
        aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
        ) as session,
        asyncio.TaskGroup() as clients,
    ):
        started = loop.time()
        for told in everything:
            await asyncio.sleep(started + told.request.at / speed - loop.time())
            clients.create_task(ask(session, url, told, speed))
    return everything


def row(policy: str, everything: list[Told]) -> list[str]:
    interactive = [told for told in everything if told.request.lane is Lane.INTERACTIVE]
    times = sorted(
        PATIENCE_SECONDS if told.first_token is None else told.first_token for told in interactive
    )
    in_time = sum(time <= IN_TIME_SECONDS for time in times) / len(times)
    failed = sum(bool(told.trouble) for told in everything)
    shares = [f"{percentile(times, share):.1f}" for share in (0.5, 0.95, 0.99)]
    return [policy, f"{sum(times) / len(times):.1f}", *shares, f"{in_time:.1%}", str(failed)]


async def measure(arguments: argparse.Namespace) -> Table:
    machines = mixed_fleet()
    trace = make_trace(machines, arguments.load, arguments.seconds, arguments.seed)
    title = f"{len(trace)} requests in {arguments.seconds:.0f} s at {arguments.load:.0%} load"
    table = Table("policy", "mean", "p50", "p95", "p99", "within 10 s", "failed", title=title)
    for policy in arguments.policy or POLICIES:
        with tempfile.TemporaryDirectory() as folder:
            async with fleet(Path(folder), policy, arguments.speed) as (url, _):
                told = await play(url, trace, arguments.speed)
        table.add_row(*row(policy, told))
        if arguments.verbose:
            troubles = {one.trouble for one in told if one.trouble}
            print(policy, json.dumps(sorted(troubles)[:5]))
    return table


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="nox -s live --", description=__doc__)
    parser.add_argument("--policy", action="append", help="repeat; all if not given")
    parser.add_argument("--load", type=float, default=0.7, help="share of what the fleet can do")
    parser.add_argument("--seconds", type=float, default=300.0, help="of the trace's time")
    parser.add_argument("--speed", type=float, default=4.0, help="how much faster than that")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--verbose", action="store_true", help="tell what failed")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    # A request to stop ends the programs that were started too, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    Console().print(asyncio.run(measure(parse(sys.argv[1:]))))
