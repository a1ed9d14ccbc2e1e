"""A long steady load with the dashboard open: does anything grow?

A coordinator, three agents and their stand-ins as processes of their own, some chats a second, and
the page in Chromium on the Now view with a look at the others now and then. What could grow is
read every 30 s; after the first minutes the slope of each must stay under a limit.
`nox -s soak`; `-- --minutes 3` for a try. Exit code 1 when something grows.
"""

import argparse
import asyncio
import contextlib
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import psutil
from msgspec import Struct, structs
from playwright.async_api import CDPSession
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from support import programs
from support.browser import Visit, visiting

SAMPLE_SECONDS = 30.0
WARM_UP_MINUTES = 10.0
LEAST_MEASURED_MINUTES = 20.0
TOUR_EVERY_SECONDS = 150.0
TOUR_STOP_SECONDS = 4.0
TOUR = ("fleet", "models", "history", "try", "settings", "now")
MIB = 1024 * 1024
OPEN_FILES = "num_handles" if sys.platform == "win32" else "num_fds"
MODEL = "llama3.2"
AGENTS = {
    "gpu-fast": ("--decode-rate", "400", "--slots", "2"),
    "gpu-middle": ("--decode-rate", "200"),
    "laptop": ("--decode-rate", "100", "--cpu-only"),
}


class Sample(Struct, frozen=True):
    """What could grow, at one moment; memory in bytes."""

    seconds: float
    rss: float
    descriptors: float
    sockets: float
    heap: float
    nodes: float
    listeners: float


class Measure(Struct, frozen=True):
    """One column: how it is shown, and how much it may grow in an hour."""

    field: str
    title: str
    limit: float
    unit: float = 1.0
    places: int = 0

    def of(self, sample: Sample) -> float:
        return float(getattr(sample, self.field)) / self.unit

    def text(self, value: float) -> str:
        return f"{value:.{self.places}f}"


MEASURES = (
    Measure("rss", "coordinator MiB", 6.0, MIB, 1),
    Measure("descriptors", "descriptors", 10.0),
    Measure("sockets", "sockets", 10.0),
    Measure("heap", "page heap MiB", 1.0, MIB, 2),
    Measure("nodes", "page nodes", 300.0),
    Measure("listeners", "page listeners", 100.0),
)


class Outcomes(Struct):
    """What became of the chats."""

    served: int = 0
    left: int = 0
    refused: int = 0
    failed: int = 0


# ── what runs ─────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def fleet(folder: Path) -> AsyncIterator[tuple[str, psutil.Process]]:
    """A coordinator with three agents, ready to serve: its address and its process."""
    tests = str(Path(__file__).parents[1])
    async with AsyncExitStack() as stack:
        ports = {name: programs.free_port() for name in AGENTS}
        for name, options in AGENTS.items():
            words = ("-m", "support.ollama", "--port", str(ports[name]), "--model", f"{MODEL}=2e9")
            log = folder / f"{name}-ollama.log"
            ollama = programs.program(log, sys.executable, *words, *options, PYTHONPATH=tests)
            running = await stack.enter_async_context(ollama)
            await programs.answers(f"http://127.0.0.1:{ports[name]}", running)
        started = programs.coordinator(folder, programs.free_port())
        url, coordinator = await stack.enter_async_context(started)
        for name, port in ports.items():
            settings = {
                "COORDINATOR_URL": url,
                "OLLAMA_PORT": str(port),
                "AGENT_MACHINE_NAME": name,
                "AGENT_STATE_DIR": str(folder / name),
                "AGENT_MANAGE_OLLAMA": "false",
            }
            command = programs.command("ollama-coordinator-agent")
            agent = programs.program(folder / f"{name}.log", command, "run", **settings)
            await stack.enter_async_context(agent)
        await _all_online(url)
        yield url, psutil.Process(coordinator.pid)


async def _all_online(url: str) -> None:
    async with aiohttp.ClientSession() as session, asyncio.timeout(30):
        while True:
            async with session.get(f"{url}/api/agents") as response:
                agents = await response.json()
            if sum(1 for agent in agents if agent["models"]) == len(AGENTS):
                return
            await asyncio.sleep(0.1)


async def load(url: str, rate: float, outcomes: Outcomes) -> None:
    """Send `rate` streamed chats a second: of twenty one client leaves, one model is unknown."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session, asyncio.TaskGroup() as tasks:
        number = 0
        while True:
            tasks.create_task(_chat(session, url, number, outcomes))
            number += 1
            await asyncio.sleep(1 / rate)


async def _chat(session: aiohttp.ClientSession, url: str, number: int, outcomes: Outcomes) -> None:
    body = {
        "model": "nonesuch" if number % 20 == 7 else MODEL,
        "messages": [{"role": "user", "content": f"Question {number}"}],
        "options": {"num_predict": 12 + number % 13},
    }
    try:
        async with session.post(f"{url}/api/chat", json=body) as response:
            if response.status != 200:
                outcomes.refused += 1
            elif number % 20 == 13:
                await response.content.readline()
                outcomes.left += 1
                response.close()
            else:
                await response.read()
                outcomes.served += 1
    except aiohttp.ClientError:
        outcomes.failed += 1


async def tour(visit: Visit, calm: asyncio.Lock) -> None:
    """Stay on the Now view, and look at all the others now and then, holding the lock."""
    await visit.open("now")
    while True:
        await asyncio.sleep(TOUR_EVERY_SECONDS)
        async with calm:
            for view in TOUR:
                await visit.page.evaluate("view => { location.hash = `#/${view}`; }", view)
                await asyncio.sleep(TOUR_STOP_SECONDS)


# ── what is read ──────────────────────────────────────────────────────────────────────────────────


async def sample(process: psutil.Process, browser: CDPSession, seconds: float) -> Sample:
    """Everything that could grow, the page's garbage collected."""
    await browser.send("HeapProfiler.collectGarbage")
    metrics = (await browser.send("Performance.getMetrics"))["metrics"]
    page = {metric["name"]: metric["value"] for metric in metrics}
    return Sample(
        seconds,
        rss=process.memory_info().rss,
        descriptors=getattr(process, OPEN_FILES)(),
        sockets=len(process.net_connections()),
        heap=page["JSHeapUsedSize"],
        nodes=page["Nodes"],
        listeners=page["JSEventListeners"],
    )


def slope(samples: Sequence[Sample], measure: Measure) -> float:
    """The growth in an hour, by least squares."""
    times = [one.seconds / 3600 for one in samples]
    values = [measure.of(one) for one in samples]
    mean_time, mean = sum(times) / len(times), sum(values) / len(values)
    spread = sum((time - mean_time) ** 2 for time in times)
    product = sum((t - mean_time) * (v - mean) for t, v in zip(times, values, strict=True))
    return product / spread if spread else 0.0


def line(one: Sample, outcomes: Outcomes) -> str:
    """A sample as a line of the log."""
    values = "  ".join(f"{m.title} {m.text(m.of(one))}" for m in MEASURES)
    counts = structs.asdict(outcomes)
    chats = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return f"{one.seconds / 60:5.1f} min  {values}  chats: {chats}"


def verdict(samples: Sequence[Sample], warm_up: float) -> tuple[Table, list[str]]:
    """The figures after the warm-up (seconds), and what grew beyond its limit."""
    measured = [one for one in samples if one.seconds >= warm_up] or list(samples[-1:])
    table = Table(title=f"{len(measured)} samples after {warm_up / 60:g} minutes of warm-up")
    table.add_column("")
    for title in ("first", "last", "least", "most", "slope/h", "limit/h"):
        table.add_column(title, justify="right")
    grown = []
    for measure in MEASURES:
        values = [measure.of(one) for one in measured]
        growth = slope(measured, measure)
        if growth > measure.limit:
            grown.append(measure.title)
        numbers = (values[0], values[-1], min(values), max(values), growth, measure.limit)
        style = "red" if growth > measure.limit else ""
        table.add_row(measure.title, *(measure.text(one) for one in numbers), style=style)
    return table, grown


# ── the run ───────────────────────────────────────────────────────────────────────────────────────


async def watch(minutes: float, rate: float, console: Console) -> list[Sample]:
    """Run it; every sample is printed as it is taken."""
    samples: list[Sample] = []
    outcomes = Outcomes()
    with tempfile.TemporaryDirectory(prefix="ollama-coordinator-") as folder:
        async with fleet(Path(folder)) as (url, process), visiting(url) as visit:
            browser = await visit.page.context.new_cdp_session(visit.page)
            await browser.send("Performance.enable")
            started = time.monotonic()
            calm = asyncio.Lock()
            work = (load(url, rate, outcomes), tour(visit, calm))
            busy = [asyncio.create_task(one) for one in work]
            try:
                while (seconds := time.monotonic() - started) < minutes * 60:
                    await asyncio.wait(
                        busy, timeout=SAMPLE_SECONDS, return_when=asyncio.FIRST_COMPLETED
                    )
                    for task in busy:
                        if task.done():
                            task.result()
                    async with calm:  # every sample is of the same view
                        seconds = time.monotonic() - started
                        samples.append(await sample(process, browser, seconds))
                    console.print(line(samples[-1], outcomes), soft_wrap=True, highlight=False)
            finally:
                for task in busy:
                    task.cancel()
                await asyncio.gather(*busy, return_exceptions=True)
        if visit.troubles:
            console.print(f"the page complained: {visit.troubles[:5]}", style="red")
        if outcomes.failed:
            console.print(f"{outcomes.failed} chats failed", style="red")
    return samples


async def main(minutes: float, rate: float) -> int:
    """The exit code."""
    console = Console()
    warm_up = min(WARM_UP_MINUTES, minutes / 3) * 60
    samples = await watch(minutes, rate, console)
    table, grown = verdict(samples, warm_up)
    console.print(table)
    if minutes - warm_up / 60 < LEAST_MEASURED_MINUTES:
        console.print(f"Too short for a verdict: measure {LEAST_MEASURED_MINUTES:g} minutes.")
        return 0
    if grown:
        console.print(f"Verdict: {', '.join(grown)} grew beyond the limit.", style="bold red")
        return 1
    console.print("Verdict: nothing grew beyond its limit.", style="bold green")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="nox -s soak --", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=3.0, help="chats a second")
    arguments = parser.parse_args()
    # A request to stop ends the programs that were started too, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        raise SystemExit(asyncio.run(main(arguments.minutes, arguments.rate)))
