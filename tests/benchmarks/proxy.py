"""What the coordinator adds to direct access: latency, throughput, CPU, gaps in streams, memory.

Everything is measured in turns in one run, against the same stand-ins, so that a machine whose
speed drifts slows all alike. `nox -s bench` compares with direct access; `-- --against PATH` with
the coordinator of another checkout too, `-- --http auto hypercorn` the HTTP implementations,
`-- --way port link relay` the ways by which a coordinator reaches an Ollama, `-- --front` one
process with a front and its leader. The last column
compares the first coordinator with the last, or with direct access if there is one. Where ways are
compared each stand-in has its agent, and theirs are part of the CPU and the memory.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import aiohttp
import psutil
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from support import programs
from support.databases import postgres_schema

MODEL = "llama3.2"


class Exchange(asyncio.Protocol):
    """One HTTP request on a connection of its own, with the time of everything that arrives."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.arrivals: list[float] = []
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.started = 0.0
        self.good = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.started = time.perf_counter()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.arrivals.append(time.perf_counter())
        self.good = self.good or data.startswith(b"HTTP/1.1 200")
        if data.endswith(b"0\r\n\r\n"):
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


def request_bytes(url: str, tokens: int) -> bytes:
    body = json.dumps(
        {"model": MODEL, "prompt": "benchmark", "options": {"num_predict": tokens}}
    ).encode()
    host = urlsplit(url).netloc
    head = f"POST /api/generate HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def stream(url: str, tokens: int) -> Exchange:
    """One streamed answer."""
    parts = urlsplit(url)
    loop = asyncio.get_running_loop()
    request = request_bytes(url, tokens)
    _, exchange = await loop.create_connection(
        lambda: Exchange(request), parts.hostname or "", parts.port or 80
    )
    await exchange.ended
    assert exchange.good, "an answer was refused"
    return exchange


async def time_to_first_byte(urls: Sequence[str], count: int) -> list[float]:
    """Milliseconds to the first byte of `count` requests, one after the other."""
    times = []
    for number in range(count):
        exchange = await stream(urls[number % len(urls)], 1)
        times.append((exchange.arrivals[0] - exchange.started) * 1000)
    return times


async def requests_per_second(urls: Sequence[str], count: int, parallel: int) -> float:
    """How many short answers a second, with `parallel` connections kept busy."""
    left = iter(range(count))
    body = {"model": MODEL, "prompt": "x", "stream": False, "options": {"num_predict": 1}}

    async def work(session: aiohttp.ClientSession) -> None:
        for number in left:
            url = f"{urls[number % len(urls)]}/api/generate"
            async with session.post(url, json=body) as response:
                assert response.status == 200
                await response.read()

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        started = time.perf_counter()
        await asyncio.gather(*(work(session) for _ in range(parallel)))
    return count / (time.perf_counter() - started)


async def gaps(urls: Sequence[str], streams: int, tokens: int) -> list[float]:
    """Milliseconds between what arrives, over all of `streams` simultaneous streams."""
    made: list[asyncio.Task[Exchange]] = []
    for number in range(streams):
        made.append(asyncio.create_task(stream(urls[number % len(urls)], tokens)))
        await asyncio.sleep(0.1 / streams * 10)  # a second for all of them to begin
    exchanges = await asyncio.gather(*made)
    return [
        (after - before) * 1000
        for exchange in exchanges
        for before, after in zip(exchange.arrivals[1:], exchange.arrivals[2:], strict=False)
    ]


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of all are not above."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


@dataclass
class Target:
    """One way to a stand-in, and what was measured on it, by measure."""

    name: str
    urls: list[str]
    processes: list[psutil.Process] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def cpu_seconds(self) -> float:
        """What the coordinator has used so far, with its agents; 0 without one."""
        return sum(sum(process.cpu_times()[:2]) for process in self.processes)

    def memory_bytes(self) -> int:
        """What the coordinator has in memory, with its agents; 0 without one."""
        return sum(int(process.memory_info().rss) for process in self.processes)


@contextlib.asynccontextmanager
async def fleet(
    folder: Path, decode_rate: str, arguments: argparse.Namespace
) -> AsyncIterator[list[Target]]:
    """Stand-ins as processes and the coordinators that know them; direct access comes first."""
    async with contextlib.AsyncExitStack() as stack:
        urls = []
        for number in range(arguments.agents):
            port = programs.free_port()
            command = [sys.executable, "-m", "support.ollama", "--port", str(port)]
            command += ["--slots", "1000", "--model", f"{MODEL}=5e9", "--batch-slowdown", "0"]
            command += ["--decode-rate", decode_rate]
            path = {"PYTHONPATH": str(Path(__file__).parents[1]), "OLLAMA_NUM_PARALLEL": "1000"}
            node = programs.program(folder / f"{number}.log", *command, **path)
            running = await stack.enter_async_context(node)
            urls.append(f"http://127.0.0.1:{port}")
            await programs.answers(urls[-1], running)
        targets = [Target("direct", urls)]
        for name, way, settings in coordinators(arguments):
            where = folder / str(len(targets))
            where.mkdir()
            url, program = await stack.enter_async_context(
                programs.coordinator(where, programs.free_port(), **settings)
            )
            target = Target(name, [url], [psutil.Process(program.pid)])
            if arguments.core is not None:
                target.processes[0].cpu_affinity([arguments.core])
            async with aiohttp.ClientSession() as session:
                for node_url in urls:
                    port = int(node_url.rpartition(":")[2])
                    if len(arguments.way) == 1 and way == "port":
                        await register(session, url, port)
                    else:
                        settings["PYTHONPATH"] = settings.get("PYTHONPATH", "")
                        beside = programs.program(
                            where / f"{port}.log",
                            programs.command("ollama-coordinator-agent"),
                            **settings,
                            **agent_settings(way, url, port, where),
                        )
                        agent = await stack.enter_async_context(beside)
                        target.processes.append(psutil.Process(agent.pid))
                await all_serve(session, url, len(urls))
            targets.append(target)
        if arguments.front:
            targets.append(await fronted(stack, folder, urls))
        yield targets


async def fronted(stack: contextlib.AsyncExitStack, folder: Path, urls: list[str]) -> Target:
    """A front and its leader, whose CPU and memory count both; the front is asked."""
    space = stack.enter_context(postgres_schema())
    settings = SETTINGS | {"DATABASE_URL": space.url, "COORDINATOR_LOG_LEVEL": "INFO"}
    made = []
    for name, said in (("leader", "coordinator leads"), ("front", "stands by")):
        (folder / name).mkdir()
        serving = programs.coordinator(folder / name, programs.free_port(), **settings)
        made.append(await stack.enter_async_context(serving))
        await made[-1][1].says(said)
    async with aiohttp.ClientSession() as session:
        for url in urls:
            await register(session, made[0][0], int(url.rpartition(":")[2]))
        await all_serve(session, made[1][0], len(urls))
    return Target("front", [made[1][0]], [psutil.Process(program.pid) for _, program in made])


SETTINGS = {"COORDINATOR_MAX_QUEUE": "10000", "AGENT_TIMEOUT": "86400"}
"""Nothing reports here, however long it takes."""

WAYS = ("port", "relay", "link")
"""How a coordinator reaches an Ollama: at its port, by its agent's relay, by its agent's link."""


def agent_settings(way: str, url: str, port: int, folder: Path) -> dict[str, str]:
    """The environment of an agent by which a stand-in is reached in this way."""
    return {
        "COORDINATOR_URL": url,
        "OLLAMA_PORT": str(port),
        "AGENT_STATE_DIR": str(folder),
        "AGENT_MACHINE_NAME": f"m{port}",
        "AGENT_MANAGE_OLLAMA": "false",
        "AGENT_TRANSPORT": "link" if way == "link" else "direct",
        "AGENT_RELAY": "always" if way == "relay" else "never",
    }


async def all_serve(session: aiohttp.ClientSession, url: str, count: int) -> None:
    """Wait until all `count` stand-ins are in rotation with their slots known."""
    async with asyncio.timeout(60 + 10 * count):
        while True:
            async with session.get(f"{url}/api/agents") as response:
                agents = await response.json()
            good = [one for one in agents if one["runner"] and not one["out_of_rotation"]]
            if len(good) == count:
                return
            await asyncio.sleep(0.1)


def coordinators(arguments: argparse.Namespace) -> list[tuple[str, str, dict[str, str]]]:
    """The coordinators to measure: their names, ways to an Ollama, and environments."""
    settings = SETTINGS | {"COORDINATOR_POLICY": arguments.policy}
    made = [
        (
            http if len(arguments.http) > 1 else way if len(arguments.way) > 1 else "through",
            way,
            settings | {"COORDINATOR_HTTP": http},
        )
        for http in arguments.http
        for way in arguments.way
    ]
    if arguments.against is not None:
        packages = arguments.against.resolve() / "packages"
        sources = [packages / name / "src" for name in ("coordinator", "agent", "common")]
        other = {"PYTHONPATH": os.pathsep.join(map(str, sources))}
        made += [(f"{name} of {arguments.against}", way, env | other) for name, way, env in made]
    return made


async def register(session: aiohttp.ClientSession, url: str, port: int) -> None:
    """Register a stand-in, and report that it has slots for everybody."""
    facts = {"machine_name": f"m{port}", "ip_address": "127.0.0.1", "ollama_version": "0.33.0"}
    async with session.post(f"{url}/api/agents", json={**facts, "ollama_port": port}) as response:
        agent_id = (await response.json())["agent_id"]
    report = {"agent_id": agent_id, "cpu_usage": 1, "memory_usage": 1, "active_requests": 0}
    report["runner"] = {"num_parallel": 1000}
    async with session.post(f"{url}/api/health", json=report) as response:
        assert response.status == 200


async def measure(arguments: argparse.Namespace) -> Table:
    """Run everything; the table of results."""
    with tempfile.TemporaryDirectory() as name:
        async with fleet(Path(name), "inf", arguments) as fast:
            await latency(fast, arguments)
            await throughput(fast, arguments)
    with tempfile.TemporaryDirectory() as name:
        async with fleet(Path(name), str(arguments.rate), arguments) as paced:
            await streaming(paced, arguments)
    names = [target.name for target in fast]
    table = Table("measure", *names, "added or ratio", title="in turns, in one run")
    for rows, targets in ((FAST_ROWS, fast), (PACED_ROWS, paced)):
        for row in rows:
            table.add_row(*row.cells(targets, arguments))
    return table


async def latency(targets: list[Target], arguments: argparse.Namespace) -> None:
    """`first byte`: milliseconds, one request at a time."""
    for target in targets:
        await time_to_first_byte(target.urls, 50)
    for _ in range(arguments.rounds):
        for target in targets:
            count = arguments.requests // arguments.rounds
            target.values["first byte"] += await time_to_first_byte(target.urls, count)


async def throughput(targets: list[Target], arguments: argparse.Namespace) -> None:
    """`a second`: short answers; `short`: a coordinator's CPU milliseconds for one of them."""
    for _ in range(arguments.rounds):
        for target in targets:
            before = target.cpu_seconds()
            rate = await requests_per_second(target.urls, arguments.requests, 64)
            spent = (target.cpu_seconds() - before) / arguments.requests * 1e3
            target.values["a second"].append(rate)
            target.values["short"].append(spent)


async def streaming(targets: list[Target], arguments: argparse.Namespace) -> None:
    """`gap`: milliseconds; `token`: a coordinator's CPU microseconds; `stream`: its KiB."""
    tokens = int(arguments.rate * arguments.seconds)
    at_rest = {target.name: target.memory_bytes() for target in targets}
    for _ in range(arguments.rounds):
        for target in targets:
            before = target.cpu_seconds()
            async with peak_memory(target) as peak:
                target.values["gap"] += await gaps(target.urls, arguments.streams, tokens)
            spent = (target.cpu_seconds() - before) / (arguments.streams * tokens)
            target.values["token"].append(spent * 1e6)
            grown = (peak[0] - at_rest[target.name]) / arguments.streams / 1024
            target.values["stream"].append(grown)


@contextlib.asynccontextmanager
async def peak_memory(target: Target) -> AsyncIterator[list[int]]:
    """The most that the coordinator has in memory during the block, in a list of one."""
    peak = [0]

    async def watch() -> None:
        while True:
            peak[0] = max(peak[0], target.memory_bytes())
            await asyncio.sleep(0.2)

    watching = asyncio.create_task(watch())
    try:
        yield peak
    finally:
        watching.cancel()


class Row(NamedTuple):
    """A row of the table: the `share` percentile of a measure, in a unit.

    `adds`: with direct access it is compared by what is added, not by the ratio.
    """

    label: str
    measure: str
    share: float
    unit: str
    adds: bool = False

    def cells(self, targets: list[Target], arguments: argparse.Namespace) -> list[str]:
        """The label, each target's value, and the comparison."""
        values = [percentile(target.values[self.measure], self.share) for target in targets]
        shown = [self.unit % value if value else "" for value in values]
        return [self.label % vars(arguments), *shown, self._compared(values)]

    def _compared(self, values: list[float]) -> str:
        through, other = values[1], values[-1] if len(values) > 2 else values[0]
        if self.adds and len(values) == 2:
            return "+" + self.unit % (through - other)
        return f"{through / other:.2f} x" if other else ""


FAST_ROWS = (
    Row("first byte, one at a time, p50", "first byte", 0.5, "%.2f ms", adds=True),
    Row("first byte, one at a time, p99", "first byte", 0.99, "%.2f ms", adds=True),
    Row("short answers, 64 connections, median", "a second", 0.5, "%.0f/s"),
    Row("coordinator's CPU per short answer, median", "short", 0.5, "%.3f ms"),
)
PACED_ROWS = (
    Row("gap in %(streams)d streams at %(rate)g/s, p50", "gap", 0.5, "%.1f ms", adds=True),
    Row("gap in %(streams)d streams at %(rate)g/s, p99", "gap", 0.99, "%.1f ms", adds=True),
    Row("coordinator's CPU per streamed token, median", "token", 0.5, "%.1f µs"),
    Row("coordinator's memory per open stream, most", "stream", 1.0, "%.0f KiB"),
)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="nox -s bench --", description=__doc__)
    parser.add_argument("--requests", type=int, default=1000, help="for latency and throughput")
    parser.add_argument("--streams", type=int, default=500, help="open at the same time")
    parser.add_argument("--rate", type=float, default=10.0, help="tokens a second in each stream")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long each stream is")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each measure")
    parser.add_argument("--agents", type=int, default=2, help="stand-ins, with an agent each")
    parser.add_argument("--policy", default="predicted", help="the coordinator's policy")
    parser.add_argument("--http", nargs="+", default=["auto"], help="compare these with each other")
    parser.add_argument("--way", nargs="+", default=["port"], choices=WAYS, help="and these")
    parser.add_argument("--against", type=Path, help="another checkout, to compare with it too")
    parser.add_argument("--front", action="store_true", help="and a front, on TEST_DATABASE_URL")
    parser.add_argument("--core", type=int, help="the processor for the coordinators, and no other")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    # A request to stop ends the programs that were started too, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    chosen = parse(sys.argv[1:])
    Console(width=max(100, Console().width)).print(asyncio.run(measure(chosen)))
