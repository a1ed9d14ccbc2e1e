"""The same traces through a real coordinator under each policy, and through other systems.

Eight unlike machines (`simulator/fleet.py`) as stand-ins of Ollama, a drawn load
(`simulator/workload.py`), and what the clients see; `nox -s live`. Several systems are measured at
once, each before machines of its own: at this load they hardly use the processor, and who is late
says so (`lag`). The machines run in real time: the coordinator's deadlines and memories are in
seconds, so at another `--speed` they mean something else.
"""

import argparse
import asyncio
import shlex
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import aiohttp
import msgspec

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.peers import litellm, nginx, olla, ollama_herd
from benchmarks.traffic.clients import ClientRecord, Target
from benchmarks.traffic.figures import Figures, table
from benchmarks.traffic.fleet import RunningFleet
from benchmarks.traffic.page import page
from benchmarks.traffic.reports import reporting
from benchmarks.traffic.run import Conditions, Serving, run
from ollama_coordinator.scheduler import POLICIES
from support import programs

COMPARED = ("predicted", "loaded-first", "least-connections", "round-robin")
PEERS = {
    "nginx": nginx.PEER,
    "litellm": litellm.PEER,
    "ollama-herd": ollama_herd.PEER,
    "olla": olla.PEER,
}


@asynccontextmanager
async def ours(policy: str, folder: Path, fleet: RunningFleet) -> AsyncIterator[Target]:
    """The coordinator under this policy; to one that counts the machines tell no slots."""
    settings = {"COORDINATOR_POLICY": policy, "COORDINATOR_MAX_QUEUE": "100000"}
    async with (
        programs.coordinator(folder, programs.free_port(), **settings) as (url, _),
        aiohttp.ClientSession() as session,
        reporting(session, url, fleet, tells_slots=policy == "predicted"),
    ):
        yield Target(url)


def systems(options: argparse.Namespace) -> dict[str, Serving]:
    """What is compared, by name; peers that are not installed are named and left out."""
    found: dict[str, Serving] = {name: partial(ours, name) for name in options.policies}
    for name in options.peers:
        peer = PEERS[name]
        if executable := shutil.which(peer.executable):
            found[peer.name] = partial(peer.serving, executable)
        else:
            print(f"{name}: no {peer.executable} on the search path ({peer.where})")
    return found


async def compare(
    found: Mapping[str, Serving], options: argparse.Namespace, conditions: Conditions
) -> list[tuple[str, list[Figures]]]:
    """Every system under every trace, so many at once."""
    places, starting = asyncio.Semaphore(options.at_once), asyncio.Lock()

    async def one(name: str, seed: int) -> tuple[str, Figures]:
        async with places:
            result, records = await run(found[name], seed, conditions, starting)
        print(f"{name}, seed {seed}: p95 {result.p95:.1f} s", file=sys.stderr, flush=True)
        if options.details:
            _write_details(options.details / f"{name}-{seed}.jsonl", records)
        return name, result

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(name, seed)) for seed in options.seeds for name in found]
    results: dict[str, list[Figures]] = {name: [] for name in found}
    for name, result in (task.result() for task in tasks):
        results[name].append(result)
    return list(results.items())


def _write_details(path: Path, records: Sequence[ClientRecord]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(msgspec.json.encode(one) + b"\n" for one in records))


def _command(arguments: Sequence[str]) -> str:
    """How to do it again; where the details went is of no interest."""
    words = list(arguments)
    if "--details" in words:
        at = words.index("--details")
        del words[at : at + 2]
    return shlex.join(["python", "tests/benchmarks/live.py", *words])


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; nothing given compares the policies for half an hour."""
    parser = argparse.ArgumentParser(prog="nox -s live --", description=__doc__)
    add = parser.add_argument
    add("--policies", nargs="*", default=COMPARED, choices=POLICIES, metavar="NAME")
    add("--peers", nargs="*", default=(), choices=PEERS, metavar="NAME", help=", ".join(PEERS))
    add("--load", type=float, default=70.0, help="per cent of what the fleet can do")
    add("--seconds", type=float, default=1200.0, help="of the trace")
    add("--warm-up", type=float, help="seconds that are not counted; a quarter if not given")
    add("--speed", type=float, default=1.0, help="how much faster than the trace")
    add("--seeds", type=int, nargs="+", default=[1])
    add("--at-once", type=int, default=8, help="runs that share the processors")
    add("--max-loaded", type=int, default=12, help="models in a machine's memory at most")
    add("--write", type=Path, metavar="FILE", help="a page with the table")
    add("--details", type=Path, metavar="FOLDER", help="what each client saw, in JSON lines")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure; print or write the table."""
    options = parse(sys.argv[1:])
    conditions = Conditions(
        load=options.load / 100,
        seconds=options.seconds,
        warm_up=options.seconds / 4 if options.warm_up is None else options.warm_up,
        speed=options.speed,
        max_loaded=options.max_loaded,
    )
    results = asyncio.run(compare(systems(options), options, conditions))
    print(table(results))
    if options.write:
        at_once = min(options.at_once, len(results) * len(options.seeds))
        written = page(_command(sys.argv[1:]), options.seeds, conditions, at_once, results)
        options.write.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    # A request to stop ends the programs that were started too, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main()
