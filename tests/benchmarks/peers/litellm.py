"""The LiteLLM proxy with `least-busy` routing: a deployment for each model on each machine."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from benchmarks.traffic.clients import Target
from benchmarks.traffic.dialects import Dialect
from benchmarks.traffic.fleet import Machine, RunningFleet
from ollama_coordinator.simulation import ModelSpec
from support import programs

from .base import Peer

KEY = "sk-benchmark"


def configuration(fleet: RunningFleet) -> dict[str, Any]:
    """What LiteLLM reads; JSON is YAML."""
    deployments = [
        _deployment(machine, model) for machine in fleet.machines for model in machine.spec.models
    ]
    return {
        "model_list": deployments,
        "router_settings": {"routing_strategy": "least-busy", "disable_cooldowns": True},
        "litellm_settings": {"telemetry": False, "request_timeout": 3600},
        "general_settings": {"master_key": KEY},
    }


def _deployment(machine: Machine, model: ModelSpec) -> dict[str, Any]:
    provider = "ollama" if model.embeds else "ollama_chat"
    return {
        "model_name": model.name,
        "litellm_params": {"model": f"{provider}/{model.name}", "api_base": machine.url},
        "model_info": {
            "id": f"{machine.spec.name} {model.name}",
            "mode": "embedding" if model.embeds else "chat",
        },
    }


@asynccontextmanager
async def serving(executable: str, folder: Path, fleet: RunningFleet) -> AsyncIterator[Target]:
    """Run the proxy during the block."""
    port = programs.free_port()
    path = folder / "litellm.yaml"
    path.write_text(json.dumps(configuration(fleet)), encoding="utf-8")
    command = [executable, "--config", str(path), "--host", "127.0.0.1", "--port", str(port)]
    surroundings = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
    async with programs.program(folder / "litellm.log", *command, **surroundings) as running:
        url = f"http://127.0.0.1:{port}"
        await programs.answers(f"{url}/health/liveliness", running, seconds=180)
        yield Target(url, Dialect.OPENAI, {"Authorization": f"Bearer {KEY}"})


PEER = Peer("LiteLLM", "litellm", "PyPI's litellm[proxy]", serving)
