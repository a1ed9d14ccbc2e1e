"""One trace through one system."""

import asyncio
import tempfile
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path

import aiohttp
from msgspec import Struct

from benchmarks.simulator.fleet import mixed_fleet
from benchmarks.simulator.workload import make_trace

from .clients import ClientRecord, Clients, Target
from .figures import Figures, figures
from .fleet import RunningFleet, running_fleet
from .lag import Lag

Serving = Callable[[Path, RunningFleet], AbstractAsyncContextManager[Target]]
"""Brings a system up before the machines of a fleet; its files go into the folder."""


class Conditions(Struct, frozen=True, kw_only=True):
    """What all systems are measured under; `load` is a share, seconds are the trace's."""

    load: float
    seconds: float
    warm_up: float
    speed: float
    max_loaded: int


async def run(
    serving: Serving, seed: int, conditions: Conditions, starting: asyncio.Lock
) -> tuple[Figures, list[ClientRecord]]:
    """Play the trace of this seed; one system starts at a time."""
    trace = make_trace(mixed_fleet(), conditions.load, conditions.seconds, seed)
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        session = await stack.enter_async_context(_session())
        async with starting:
            machines = running_fleet(
                folder,
                mixed_fleet(),
                speed=conditions.speed,
                max_loaded=conditions.max_loaded,
                warm_up=conditions.warm_up / conditions.speed,
            )
            fleet = await stack.enter_async_context(machines)
            target = await stack.enter_async_context(serving(folder, fleet))
        clients = Clients(target, trace, conditions.speed)
        lag = Lag()
        with lag.measured(after=conditions.warm_up / conditions.speed):
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(clients.play(session))
                loads = tasks.create_task(_loads(fleet, session, conditions))
    counted = figures(
        clients.records,
        after=conditions.warm_up,
        loads=loads.result(),
        seconds=conditions.seconds - conditions.warm_up,
        lag_seconds=max(fleet.lag_seconds, lag.p99),
    )
    return counted, clients.records


async def _loads(
    fleet: RunningFleet, session: aiohttp.ClientSession, conditions: Conditions
) -> int:
    """How many models were loaded between the warm-up and the trace's end."""
    await asyncio.sleep(conditions.warm_up / conditions.speed)
    before = await fleet.loads(session)
    await asyncio.sleep((conditions.seconds - conditions.warm_up) / conditions.speed)
    return await fleet.loads(session) - before


def _session() -> aiohttp.ClientSession:
    """A connection for each request: some servers close idle ones just as they are used again."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=None),
    )
