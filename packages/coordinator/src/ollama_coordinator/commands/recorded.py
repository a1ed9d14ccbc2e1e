"""What a coordinator recorded, as a trace and a fleet that can be simulated."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from statistics import median
from typing import Any

from msgspec import Struct, structs

from ollama_coordinator.scheduler import Kind, Lane
from ollama_coordinator.simulation import Fleet, MachineSpec, ModelSpec, TraceRequest
from ollama_coordinator.simulation.machine import GIB, TYPICAL_BYTES
from ollama_coordinator_common.names import model_key

from .client import NoAnswer

Row = Mapping[str, Any]

UNKNOWN_MEMORY_BYTES = 24 * GIB
"""Of an agent that does not tell its memory."""


class Recorded(Struct, frozen=True):
    """The answers of `/api/agents`, `/api/models`, `/api/estimates` and the history's export."""

    agents: Sequence[Row]
    models: Sequence[Row]
    estimates: Sequence[Row]
    requests: Sequence[Row]


def trace_of(recorded: Recorded) -> list[TraceRequest]:
    """The recorded requests whose tokens were counted, in order of arrival."""
    names = {_key(row["name"]): str(row["name"]) for row in recorded.models}
    rows = [row for row in recorded.requests if _key(row["model"]) in names]
    rows = [row for row in rows if row["prompt_tokens"] or row["output_tokens"]]
    arrivals = [datetime.fromisoformat(row["arrived_at"]).timestamp() for row in rows]
    start = min(arrivals, default=0.0)
    trace = [
        _request(row, names[_key(row["model"])], at - start)
        for row, at in zip(rows, arrivals, strict=True)
    ]
    return sorted(trace, key=lambda request: request.at)


def _request(row: Row, model: str, at: float) -> TraceRequest:
    embeds = "embed" in row["path"]
    generates = row["path"].endswith(("/generate", "/v1/completions"))
    return TraceRequest(
        at=at,
        model=model,
        client=row["client"],
        kind=Kind.EMBED if embeds else Kind.GENERATE if generates else Kind.CHAT,
        lane=Lane.EMBEDDING if embeds else Lane.INTERACTIVE,
        prompt_tokens=row["prompt_tokens"] or 0,
        output_tokens=row["output_tokens"] or 0,
    )


def fleet_of(recorded: Recorded, doubled: Iterable[str]) -> Fleet:
    """The living agents with their learned speeds, and one more of each name in `doubled`.

    Raises:
        NoAnswer: there is no such agent.
    """
    models = {_key(row["name"]): row for row in recorded.models}
    machines = {
        str(row["machine_name"]): _machine(row, recorded.estimates, models)
        for row in recorded.agents
        if row["status"] != "offline"
    }
    more = []
    for number, name in enumerate(doubled, 2):
        if name not in machines:
            raise NoAnswer(f"no living agent is called '{name}'; see /api/agents")
        more.append(structs.replace(machines[name], name=f"{name} ({number})"))
    return Fleet(machines=(*machines.values(), *more))


def _machine(agent: Row, estimates: Sequence[Row], models: Mapping[str, Row]) -> MachineSpec:
    mine = {
        row["model"]: row
        for row in estimates
        if row["agent_id"] == agent["id"] and row["model"] in models
    }
    learned = {key: row for key, row in mine.items() if any(row["samples"])} or mine
    sizes = {key: max(int(models[key]["size"]), 1) for key in learned}
    video = sum(gpu.get("memory_total_bytes") or 0 for gpu in agent["gpus"])
    runner = agent["runner"] or {}
    return MachineSpec(
        name=agent["machine_name"],
        models=tuple(ModelSpec(str(models[key]["name"]), int(models[key]["size"])) for key in mine),
        memory_bytes=video or agent["memory_total_bytes"] or UNKNOWN_MEMORY_BYTES,
        slots=runner.get("num_parallel") or max((row["slots"] for row in mine.values()), default=1),
        prefill_tokens_per_second=_typical(learned, sizes, "prefill_tokens_per_second"),
        decode_tokens_per_second=_typical(learned, sizes, "decode_tokens_per_second"),
        load_bytes_per_second=_load_rate(learned, sizes),
        has_gpu=bool(agent["gpus"]),
    )


def _typical(learned: Mapping[str, Row], sizes: Mapping[str, int], rate: str) -> float:
    """An agent's rate for a model of typical size: rates fall as models grow."""
    rates = [float(row[rate]) * sizes[key] / TYPICAL_BYTES for key, row in learned.items()]
    return median(rates) if rates else 40.0


def _load_rate(learned: Mapping[str, Row], sizes: Mapping[str, int]) -> float:
    seconds = {key: max(float(row["load_seconds"]) - 1.0, 0.1) for key, row in learned.items()}
    rates = [sizes[key] / seconds[key] for key in seconds]
    return median(rates) if rates else 1.5e9


def _key(name: str) -> str:
    return model_key(name)
