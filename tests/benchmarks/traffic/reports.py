"""The machines' agents: what ours would tell the coordinator of each machine."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from .beside import beside
from .fleet import Machine, RunningFleet

REPORT_SECONDS = 2.0
"""Our agent looks at its Ollama that often, and reports when something changed."""


class Agent:
    """The reports of one machine's agent."""

    def __init__(self, machine: Machine, max_loaded: int, *, tells_slots: bool) -> None:
        self._machine = machine
        self._runner: dict[str, int] | None = None
        if tells_slots:
            slots = machine.spec.slots
            self._runner = {"num_parallel": slots, "max_loaded_models": max_loaded}
        self._agent_id = ""

    async def register(self, session: aiohttp.ClientSession, coordinator: str) -> None:
        """Once, before the first report."""
        facts = {
            "machine_name": self._machine.spec.name,
            "ip_address": "127.0.0.1",
            "ollama_version": "0.33.0",
            "ollama_port": int(self._machine.url.rpartition(":")[2]),
        }
        async with session.post(f"{coordinator}/api/agents", json=facts) as response:
            self._agent_id = (await response.json())["agent_id"]

    async def report(self, session: aiohttp.ClientSession, coordinator: str) -> None:
        """One heartbeat with everything that our agent tells."""
        lists = {name: await lists_of(session, self._machine, name) for name in ("tags", "ps")}
        spec = self._machine.spec
        used = sum(row["size"] for row in lists["ps"]["models"])
        gpu = {
            "name": "simulated",
            "memory_total_bytes": spec.memory_bytes,
            "memory_used_bytes": used,
        }
        report = {
            "agent_id": self._agent_id,
            "cpu_usage": 10,
            "memory_usage": 10,
            "active_requests": 0,
            "memory_total_bytes": spec.memory_bytes,
            "gpus": [gpu] if spec.has_gpu else [],
            "runner": self._runner,
            **lists,
        }
        async with session.post(f"{coordinator}/api/health", json=report) as response:
            assert response.status == 200, await response.text()


async def lists_of(session: aiohttp.ClientSession, machine: Machine, name: str) -> dict[str, Any]:
    """What a machine answers to `/api/tags` or `/api/ps`."""
    async with session.get(f"{machine.url}/api/{name}") as response:
        answer: dict[str, Any] = await response.json()
        return answer


@asynccontextmanager
async def reporting(
    session: aiohttp.ClientSession, coordinator: str, fleet: RunningFleet, *, tells_slots: bool
) -> AsyncIterator[None]:
    """Every machine has an agent that is registered and reports during the block."""
    agents = [
        Agent(machine, fleet.max_loaded, tells_slots=tells_slots) for machine in fleet.machines
    ]
    for agent in agents:
        await agent.register(session, coordinator)
        await agent.report(session, coordinator)
    async with beside(_report(session, coordinator, agents, fleet.speed)):
        yield


async def _report(
    session: aiohttp.ClientSession, coordinator: str, agents: Sequence[Agent], speed: float
) -> None:
    while True:
        await asyncio.sleep(REPORT_SECONDS / speed)
        await asyncio.gather(*(agent.report(session, coordinator) for agent in agents))
