"""olla with `least-connections`: among the machines that have the model, the one with the fewest.

Its limits on requests are lifted, and it waits for a load as long as a client does: with its
default of 30 s to the first header it would fail requests that only wait for a model.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.traffic.clients import Target
from benchmarks.traffic.fleet import RunningFleet
from support import programs

from .base import Peer

LIMITS = (
    "global_requests_per_minute",
    "per_ip_requests_per_minute",
    "health_requests_per_minute",
    "burst_size",
)
MANY = 1_000_000
DISCOVERY_SECONDS = 60.0


def configuration(fleet: RunningFleet, port: int) -> dict[str, Any]:
    """What olla reads; JSON is YAML."""
    return {
        "server": {
            "host": "127.0.0.1",
            "port": port,
            "read_timeout": "0s",
            "write_timeout": "0s",
            "request_logging": False,
            "rate_limits": dict.fromkeys(LIMITS, MANY),
        },
        "proxy": {
            "engine": "olla",
            "profile": "streaming",
            "load_balancer": "least-connections",
            "response_timeout": "1h",
            "read_timeout": "1h",
            "response_header_timeout": "1h",
        },
        "discovery": {
            "type": "static",
            "model_discovery": {"enabled": True, "interval": "30s"},
            "static": {
                "endpoints": [
                    {
                        "url": machine.url,
                        "name": machine.spec.name,
                        "type": "ollama",
                        "priority": 100,
                        "model_url": "/api/tags",
                        "health_check_url": "/",
                        "check_interval": "2s",
                        "check_timeout": "1s",
                    }
                    for machine in fleet.machines
                ]
            },
        },
        "model_registry": {"type": "memory", "enable_unifier": True},
        "logging": {"level": "error", "format": "text", "output": "stdout"},
    }


@asynccontextmanager
async def serving(executable: str, folder: Path, fleet: RunningFleet) -> AsyncIterator[Target]:
    """Run olla during the block, once it knows every machine's models."""
    port = programs.free_port()
    path = folder / "olla.yaml"
    path.write_text(json.dumps(configuration(fleet, port)), encoding="utf-8")
    command = (executable, "--config", str(path))
    surroundings = {"OLLA_FILE_OUTPUT": "false"}
    async with programs.program(folder / "olla.log", *command, **surroundings) as running:
        url = f"http://127.0.0.1:{port}"
        await programs.answers(f"{url}/internal/health", running)
        target = f"{url}/olla/ollama"
        await _discovered(target, fleet)
        yield Target(target)


async def _discovered(url: str, fleet: RunningFleet) -> None:
    """Wait until olla lists the models of all machines: it asks them after it listens."""
    names = {model.name for machine in fleet.machines for model in machine.spec.models}
    async with aiohttp.ClientSession() as session, asyncio.timeout(DISCOVERY_SECONDS):
        while True:
            async with session.get(f"{url}/api/tags") as response:
                listed = await response.json() if response.status == 200 else {}
            if len(listed.get("models") or ()) >= len(names):
                return
            await asyncio.sleep(0.2)


PEER = Peer("olla", "olla", "the Go program github.com/thushan/olla", serving)
