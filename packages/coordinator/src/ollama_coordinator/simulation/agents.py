"""What a simulated machine's agent reports."""

import msgspec
from msgspec import Raw

from ollama_coordinator_common.protocol import HealthReport
from ollama_coordinator_common.types import AgentId, Gpu, RunnerSettings

from .machine import MachineSpec, ModelSpec
from .node import Node


def health_report(node: Node) -> HealthReport:
    """The heartbeat of a simulated machine's agent."""
    spec = node.spec
    busy = sum(bool(runner.running) for runner in node.runners.values())
    used = sum(runner.model.memory_bytes for runner in node.loaded())
    gpus = [Gpu("simulated", memory_total_bytes=spec.memory_bytes, memory_used_bytes=used)]
    return HealthReport(
        agent_id=AgentId(spec.name),
        cpu_usage=100.0 if busy else 3.0,
        memory_usage=100.0 * used / spec.memory_bytes,
        active_requests=sum(len(runner.running) for runner in node.runners.values()),
        memory_total_bytes=spec.memory_bytes if spec.reports_memory else None,
        gpus=gpus if spec.has_gpu and spec.reports_memory else [],
        runner=RunnerSettings(num_parallel=spec.slots) if spec.reports_slots else None,
        tags=_rows([_tag(model) for model in spec.models]),
        ps=_rows([_loaded(runner.model, spec) for runner in node.loaded()]),
    )


def _rows(rows: list[dict[str, object]]) -> Raw:
    return Raw(msgspec.json.encode({"models": rows}))


def _tag(model: ModelSpec) -> dict[str, object]:
    capabilities = ["embedding"] if model.embeds else ["completion"]
    return {
        "name": model.name,
        "digest": model.name,
        "size": model.size_bytes,
        "capabilities": capabilities,
    }


def _loaded(model: ModelSpec, spec: MachineSpec) -> dict[str, object]:
    vram = model.memory_bytes if spec.has_gpu else 0
    return {"name": model.name, "size": model.memory_bytes, "size_vram": vram}
