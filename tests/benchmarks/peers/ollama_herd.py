"""ollama-herd: its router, and for each machine the heartbeats that its node agent would send.

The agents themselves would all report the memory and the load of the one machine that the
benchmark runs on. Another model in place of the one asked for is not an answer here, and nothing
is to be downloaded: both are switched off. Everything else is as installed; so it answers requests
for embeddings of models that it knows with errors, as it serves them by a program of its own alone.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.traffic.beside import beside
from benchmarks.traffic.clients import Target
from benchmarks.traffic.fleet import Machine, RunningFleet
from benchmarks.traffic.reports import lists_of
from support import programs

from .base import Peer

HEARTBEAT_SECONDS = 5.0
GB = 1e9
SETTINGS = {
    "FLEET_VRAM_FALLBACK": "false",
    "FLEET_AUTO_PULL": "false",
    "FLEET_FLEET_INTELLIGENCE": "false",
    "FLEET_NODE_TELEMETRY": "false",
}


async def heartbeat(session: aiohttp.ClientSession, machine: Machine, max_loaded: int) -> Any:
    """What a node agent tells of its machine."""
    tags = (await lists_of(session, machine, "tags"))["models"]
    loaded = (await lists_of(session, machine, "ps"))["models"]
    total = machine.spec.memory_bytes / GB
    used = sum(row["size"] for row in loaded) / GB
    memory = {"total_gb": total, "used_gb": used, "available_gb": max(total - used, 0.0)}
    return {
        "node_id": machine.spec.name,
        "arch": "x86_64",
        "cpu": {"cores_physical": 8, "utilization_pct": 10.0},
        "memory": memory,
        "ollama_host": machine.url,
        "lan_ip": "127.0.0.1",
        "ollama": {
            "models_loaded": [{"name": row["name"], "size_gb": row["size"] / GB} for row in loaded],
            "models_available": [row["name"] for row in tags],
            "models_available_sizes": {row["name"]: row["size"] / GB for row in tags},
            "max_loaded_models": max_loaded,
            "num_parallel": machine.spec.slots,
            "version": "0.33.0",
        },
    }


@asynccontextmanager
async def serving(executable: str, folder: Path, fleet: RunningFleet) -> AsyncIterator[Target]:
    """Run the router during the block, with heartbeats from all machines."""
    port = programs.free_port()
    command = (executable, "--host", "127.0.0.1", "--port", str(port), "--log-level", "WARNING")
    connector = aiohttp.TCPConnector(force_close=True)  # it closes idle ones after five seconds
    surroundings = {**SETTINGS, "HOME": str(folder), "FLEET_DATA_DIR": str(folder / "herd")}
    async with (
        programs.program(folder / "herd.log", *command, **surroundings) as running,
        aiohttp.ClientSession(connector=connector) as session,
    ):
        url = f"http://127.0.0.1:{port}"
        await programs.answers(f"{url}/fleet/status", running, seconds=60)
        await _beat(session, url, fleet)
        async with beside(_beat_for_ever(session, url, fleet)):
            yield Target(url)


async def _beat(session: aiohttp.ClientSession, url: str, fleet: RunningFleet) -> None:
    for machine in fleet.machines:
        told = await heartbeat(session, machine, fleet.max_loaded)
        async with session.post(f"{url}/heartbeat", json=told) as response:
            assert response.status == 200, await response.text()


async def _beat_for_ever(session: aiohttp.ClientSession, url: str, fleet: RunningFleet) -> None:
    while True:
        await asyncio.sleep(HEARTBEAT_SECONDS / fleet.speed)
        await _beat(session, url, fleet)


PEER = Peer("ollama-herd", "herd", "PyPI's ollama-herd", serving)
