"""What the coordinator adds to direct access: latency, throughput, gaps in streams, memory.

Direct access and the way through the coordinator are measured in turns in one run, against the same
stand-ins, so that a machine whose speed drifts slows both. `nox -s bench`; `-- --streams 100` and
the like for other sizes.
"""

import argparse
import asyncio
import contextlib
import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import psutil
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from support import programs

MODEL = "llama3.2"
AGENTS = 2
ROUNDS = 5


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


@contextlib.asynccontextmanager
async def fleet(
    folder: Path, decode_rate: str, policy: str, http: str = "auto"
) -> AsyncIterator[tuple[list[str], str, int]]:
    """Stand-ins as processes, a coordinator that knows them; their URLs, its own, its pid."""
    async with contextlib.AsyncExitStack() as stack:
        urls = []
        for number in range(AGENTS):
            port = programs.free_port()
            command = [sys.executable, "-m", "support.ollama", "--port", str(port)]
            command += ["--slots", "1000", "--model", f"{MODEL}=5e9", "--batch-slowdown", "0"]
            command += ["--decode-rate", decode_rate]
            path = {"PYTHONPATH": str(Path(__file__).parents[1])}
            node = programs.program(folder / f"{number}.log", *command, **path)
            running = await stack.enter_async_context(node)
            urls.append(f"http://127.0.0.1:{port}")
            await programs.answers(urls[-1], running)
        settings = {"COORDINATOR_POLICY": policy, "COORDINATOR_MAX_QUEUE": "10000"}
        # Nothing reports here, however long it takes.
        settings |= {"COORDINATOR_HTTP": http, "AGENT_TIMEOUT": "86400"}
        url, coordinator = await stack.enter_async_context(
            programs.coordinator(folder, programs.free_port(), **settings)
        )
        async with aiohttp.ClientSession() as session:
            for node_url in urls:
                await register(session, url, int(node_url.rpartition(":")[2]))
        yield urls, url, coordinator.pid


async def register(session: aiohttp.ClientSession, url: str, port: int) -> None:
    facts = {"machine_name": f"m{port}", "ip_address": "127.0.0.1", "ollama_version": "0.33.0"}
    async with session.post(f"{url}/api/agents", json={**facts, "ollama_port": port}) as response:
        agent_id = (await response.json())["agent_id"]
    report = {"agent_id": agent_id, "cpu_usage": 1, "memory_usage": 1, "active_requests": 0}
    report["runner"] = {"num_parallel": 1000}
    async with session.post(f"{url}/api/health", json=report) as response:
        assert response.status == 200


async def measure(arguments: argparse.Namespace) -> Table:
    """Run everything; the table of results."""
    table = Table("measure", "direct", "through", "added or ratio", title="direct and through")
    with tempfile.TemporaryDirectory() as name:
        async with fleet(Path(name), "inf", arguments.policy) as (direct, through, _):
            await latency(table, direct, [through], arguments.requests)
            await throughput(table, direct, [through], arguments.requests)
    with tempfile.TemporaryDirectory() as name:
        rate = str(arguments.rate)
        async with fleet(Path(name), rate, arguments.policy) as (direct, through, pid):
            await streaming(table, direct, through, pid, arguments)
    return table


async def compare(arguments: argparse.Namespace) -> Table:
    """The coordinator's CPU with each HTTP implementation, measured in turns."""
    table = Table("HTTP", "CPU per short answer", "CPU per streamed token", title="medians")
    spent: dict[str, list[tuple[float, float]]] = {http: [] for http in arguments.http}
    async with contextlib.AsyncExitStack() as stack:
        fleets = {}
        for http in arguments.http:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            running = fleet(folder, str(arguments.rate), arguments.policy, http)
            fleets[http] = await stack.enter_async_context(running)
        for _ in range(ROUNDS):
            for http, (_, url, pid) in fleets.items():
                spent[http].append(await cpu_seconds(url, psutil.Process(pid), arguments))
    for http, rounds in spent.items():
        request, token = (statistics.median(values) for values in zip(*rounds, strict=True))
        table.add_row(http, f"{request * 1e3:.2f} ms", f"{token * 1e6:.0f} µs")
    return table


async def cpu_seconds(
    url: str, coordinator: psutil.Process, arguments: argparse.Namespace
) -> tuple[float, float]:
    """CPU seconds for a short answer, and for a token."""
    before = sum(coordinator.cpu_times()[:2])
    await requests_per_second([url], arguments.requests, 64)
    between = sum(coordinator.cpu_times()[:2])
    tokens = int(arguments.rate * arguments.seconds)
    await gaps([url], arguments.streams, tokens)
    after = sum(coordinator.cpu_times()[:2])
    short = (between - before) / arguments.requests
    return short, (after - between) / (arguments.streams * tokens)


async def latency(table: Table, direct: list[str], through: list[str], count: int) -> None:
    times: tuple[list[float], list[float]] = ([], [])
    await time_to_first_byte(through, 50)
    for _ in range(ROUNDS):
        for urls, into in ((direct, times[0]), (through, times[1])):
            into += await time_to_first_byte(urls, count // ROUNDS)
    for share in (0.5, 0.99):
        one, two = (percentile(values, share) for values in times)
        what = f"first byte, one at a time, p{share * 100:g}"
        table.add_row(what, f"{one:.2f} ms", f"{two:.2f} ms", f"+{two - one:.2f} ms")


async def throughput(table: Table, direct: list[str], through: list[str], count: int) -> None:
    rates: tuple[list[float], list[float]] = ([], [])
    for _ in range(3):
        for urls, into in ((direct, rates[0]), (through, rates[1])):
            into.append(await requests_per_second(urls, count, 64))
    one, two = (statistics.median(values) for values in rates)
    what = "short answers, 64 connections, median of 3"
    table.add_row(what, f"{one:.0f}/s", f"{two:.0f}/s", f"{two / one:.2f} x")


async def streaming(
    table: Table, direct: list[str], through: str, pid: int, arguments: argparse.Namespace
) -> None:
    tokens = int(arguments.rate * arguments.seconds)
    one = await gaps(direct, arguments.streams, tokens)
    coordinator = psutil.Process(pid)
    at_rest = coordinator.memory_info().rss
    before = sum(coordinator.cpu_times()[:2])
    watched = asyncio.create_task(peak_memory(coordinator))
    two = await gaps([through], arguments.streams, tokens)
    watched.cancel()
    cpu = sum(coordinator.cpu_times()[:2]) - before
    for share in (0.5, 0.99):
        values = percentile(one, share), percentile(two, share)
        what = f"gap in {arguments.streams} streams at {arguments.rate:g}/s, p{share * 100:g}"
        added = f"+{values[1] - values[0]:.1f} ms"
        table.add_row(what, f"{values[0]:.1f} ms", f"{values[1]:.1f} ms", added)
    per_token = cpu / (arguments.streams * tokens) * 1e6
    table.add_row("coordinator's CPU per streamed token", "", f"{per_token:.0f} µs", "")
    grown = (PEAK[0] - at_rest) / arguments.streams / 1024
    table.add_row("coordinator's memory per open stream", "", f"{grown:.0f} KiB", "")


PEAK = [0]


async def peak_memory(process: psutil.Process) -> None:
    while True:
        PEAK[0] = max(PEAK[0], process.memory_info().rss)
        await asyncio.sleep(0.2)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="nox -s bench --", description=__doc__)
    parser.add_argument("--requests", type=int, default=1000, help="for latency and throughput")
    parser.add_argument("--streams", type=int, default=500, help="open at the same time")
    parser.add_argument("--rate", type=float, default=10.0, help="tokens a second in each stream")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long each stream is")
    parser.add_argument("--policy", default="predicted", help="the coordinator's policy")
    parser.add_argument("--http", nargs="+", default=["auto"], help="compare these with each other")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    # A request to stop ends the programs that were started too, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    chosen = parse(sys.argv[1:])
    Console().print(asyncio.run((compare if len(chosen.http) > 1 else measure)(chosen)))
