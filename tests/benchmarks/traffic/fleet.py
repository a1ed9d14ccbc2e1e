"""The machines as a program under our control: where they are, what they loaded, its lag."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import msgspec
from msgspec import Struct

from ollama_coordinator.simulation import Fleet, MachineSpec
from support import programs

from .machines import Farewell, Place

TESTS = Path(__file__).parents[2]


class Machine(Struct, frozen=True):
    """A simulated machine and where its stand-in listens."""

    spec: MachineSpec
    place: Place

    @property
    def url(self) -> str:
        """Its Ollama."""
        return self.place.url


class RunningFleet:
    """The stand-ins of one run."""

    def __init__(self, machines: list[Machine], max_loaded: int, speed: float) -> None:
        self.machines = machines
        self.max_loaded = max_loaded
        self.speed = speed
        self.lag_seconds = 0.0

    async def loads(self, session: aiohttp.ClientSession) -> int:
        """How many models were brought into memory so far."""
        total = 0
        for machine in self.machines:
            async with session.get(f"{machine.place.control_url}/seen") as response:
                total += (await response.json())["loads"]
        return total


@asynccontextmanager
async def running_fleet(
    folder: Path, fleet: Fleet, *, speed: float, max_loaded: int, warm_up: float
) -> AsyncIterator[RunningFleet]:
    """Stand-ins for these machines during the block; `lag_seconds` is known after it.

    `warm_up` is in wall seconds: so long their lag does not count.
    """
    specification, log = folder / "fleet.json", folder / "machines.log"
    specification.write_bytes(msgspec.json.encode(fleet))
    command = [sys.executable, "-m", "benchmarks.traffic.machines", str(specification)]
    command += ["--speed", str(speed), "--max-loaded", str(max_loaded), "--warm-up", str(warm_up)]
    async with programs.program(log, *command, PYTHONPATH=str(TESTS)) as running:
        places = msgspec.json.decode(await _line(running, 0), type=list[Place])
        machines = [
            Machine(spec, place) for spec, place in zip(fleet.machines, places, strict=True)
        ]
        found = RunningFleet(machines, max_loaded, speed)
        yield found
        running.send(programs.TERMINATE)
        farewell = msgspec.json.decode(await _line(running, 1), type=Farewell)
        found.lag_seconds = farewell.lag_p99_seconds


async def _line(running: programs.Program, number: int, seconds: float = 30.0) -> str:
    """A line of the program's output, once it is whole."""
    async with asyncio.timeout(seconds):
        while running.output.count("\n") <= number:
            await asyncio.sleep(0.05)
    return running.output.splitlines()[number]
