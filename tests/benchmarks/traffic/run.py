"""One trace through one system."""

import asyncio
import tempfile
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import aiohttp
from msgspec import Struct, structs

from benchmarks.simulator.fleet import mixed_fleet
from benchmarks.simulator.workload import make_trace

from .clients import Clients, Target, Told
from .figures import Figures, figures
from .fleet import RunningFleet, running_fleet

Serving = Callable[[Path, RunningFleet], AbstractAsyncContextManager[Target]]
"""Brings a system up before the machines of a fleet; its files go into the folder."""


class Conditions(Struct, frozen=True, kw_only=True):
    """What all systems are measured under; `load` is a share, seconds are the trace's."""

    load: float
    seconds: float
    warm_up: float
    speed: float
    max_loaded: int


async def run(serving: Serving, seed: int, conditions: Conditions) -> tuple[Figures, list[Told]]:
    """Play the trace of this seed; the lag in the figures is that of the machines."""
    trace = make_trace(mixed_fleet(), conditions.load, conditions.seconds, seed)
    speed = conditions.speed
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with (
            running_fleet(folder, mixed_fleet(), speed, conditions.max_loaded) as fleet,
            serving(folder, fleet) as target,
            _session() as session,
        ):
            clients = Clients(target, trace, speed)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(clients.play(session))
                loads = tasks.create_task(_loads(fleet, session, conditions))
    counted = figures(
        clients.told,
        after=conditions.warm_up,
        loads=loads.result(),
        seconds=conditions.seconds - conditions.warm_up,
    )
    return structs.replace(counted, lag_seconds=fleet.lag_seconds), clients.told


async def _loads(
    fleet: RunningFleet, session: aiohttp.ClientSession, conditions: Conditions
) -> int:
    """How many models were loaded between the warm-up and the trace's end."""
    await asyncio.sleep(conditions.warm_up / conditions.speed)
    before = await fleet.loads(session)
    await asyncio.sleep((conditions.seconds - conditions.warm_up) / conditions.speed)
    return await fleet.loads(session) - before


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
    )
