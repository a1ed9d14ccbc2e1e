"""`explain`, `advise`, `replay`: why a request goes where it goes, and what would be better."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any
from urllib.parse import quote

import typer
from msgspec import Struct, structs
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ollama_coordinator.registry import NO_GPU, Registry
from ollama_coordinator.scheduler import POLICIES, Kind, Lane, Scheduler, create_scheduler
from ollama_coordinator.scheduler.rates import TYPICAL_BYTES
from ollama_coordinator.simulation import (
    Fleet,
    MachineSpec,
    ModelSpec,
    Record,
    Simulation,
    Summary,
    TraceRequest,
    read_trace,
    summarise,
)
from ollama_coordinator.simulation.machine import GIB
from ollama_coordinator_common.names import model_key

from .client import Client, Json, Model, NoAnswer, asks
from .tables import WIDE, console, name_of, shown_json, table

SEEN_SECONDS = 0.005
"""What is less is shown as 0.00."""

PROMPT = "Why is the sky blue?"
"""What is asked where nothing is given: a request without a prompt only loads the model."""

MOST_TERMS = 5
"""So many have room at 80 columns, beside the name of an agent."""

FEW_WAITED = 0.05
"""Where fewer requests than this share wait for a slot under every policy, none of them chooses."""

WAITED_SECONDS = 1.0
"""A request that had a slot so soon did not wait."""

TERMS = ("wait", "load", "evict", "prefill", "decode", "crowding", "failure")
"""The terms of an estimate, in the order of its table."""

Row = Mapping[str, Any]

UNKNOWN_MEMORY_BYTES = 24 * GIB
"""Of an agent that does not report its memory: that of a common large GPU."""


class Recorded(Struct, frozen=True):
    """The answers of `/api/agents`, `/api/models`, `/api/estimates` and the history's export."""

    agents: Sequence[Row]
    models: Sequence[Row]
    estimates: Sequence[Row]
    requests: Sequence[Row]


@asks
async def explain(
    client: Client,
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="[PROMPT]", help="What to ask.")] = PROMPT,
    num_ctx: Annotated[
        int | None, typer.Option("--num-ctx", metavar="TOKENS", help="The context to ask for.")
    ] = None,
    json: Json = False,
) -> None:
    """Show where a request would go, and why; it is not sent. Times are in seconds."""
    body: dict[str, Any] = {"model": model, "prompt": prompt}
    if num_ctx is not None:
        body["options"] = {"num_ctx": num_ctx}
    decision = await client.json("POST", "/api/explain", body)
    if json:
        shown_json(decision)
        return
    screen = console()
    screen.print(decided(decision, screen.width))
    screen.print(_sentence(decision))


def decided(decision: Mapping[str, Any], width: int) -> Group:
    """The candidates of a decision, the cheapest first, then why others were none.

    In a narrow terminal only terms of which something is seen are columns, the largest ones.
    """
    candidates = decision["candidates"]
    known = [one for one in candidates if one["cost"] is not None]
    most = {t: max((one[f"{t}_seconds"] for one in known), default=0.0) for t in TERMS}
    seen = [t for t in sorted(TERMS, key=lambda t: -most[t]) if most[t] >= SEEN_SECONDS]
    terms = [t for t in TERMS if width >= WIDE or t in seen[:MOST_TERMS]]
    cached = ["CACHED"] if any(one["cached_tokens"] for one in known) else []
    numbers = ("COST", *(term.upper() for term in terms), *cached)
    made = table("AGENT", "WOULD", *numbers, "", right=numbers)
    for column in made.columns[1:]:
        column.no_wrap = True
    for one in sorted(known, key=lambda one: float(one["cost"])):
        chosen = decision["chosen"], decision["action"]  # an agent may be there twice
        is_chosen = (one["agent_id"], one["action"]) == chosen
        made.add_row(
            Text(one["agent"]),
            one["action"],
            f"{one['cost']:.2f}",
            *(f"{one[f'{term}_seconds']:.2f}" for term in terms),
            *(str(one["cached_tokens"] or "") for _ in cached),
            "← chosen" if is_chosen else "",
            style="bold" if is_chosen else "",
        )
    refused = [one for one in candidates if one["cost"] is None]
    notes = [Text(f"not {one['agent']}: {one['refused']}", "dim") for one in refused]
    return Group(*([made] if known else ()), *notes)


def _sentence(decision: Mapping[str, Any]) -> str:
    start = decision["start_in_seconds"]
    when = "when there is a place" if start is None else f"in {start:.2f} s"
    words = {"go": "It would start", "load": "It would load the model and start"}
    waits = f"It would wait as number {decision['position']}, start"
    tokens = f"{decision['expected_output_tokens']:.0f} tokens of answer expected"
    return f"{words.get(decision['action'], waits)} {when}; {tokens}."


@asks
async def advise(
    client: Client,
    hours: Annotated[
        float, typer.Option("--hours", metavar="HOURS", help="How far back to look.")
    ] = 24.0,
    apply: Annotated[
        bool, typer.Option("--apply", help="Do it, by copies from machine to machine.")
    ] = False,
    json: Json = False,
) -> None:
    """Show which replica or load would have cut waiting most. Without --apply nothing is done."""
    if apply:
        done = await client.json("POST", "/api/advice", {"hours": hours})
        if json:
            shown_json(done)
        for move in () if json else done["moves"]:
            console().print(Text(move["text"]))
        if not json and not done["moves"]:
            typer.echo("There is no advice to follow.")
        return
    answer = await client.json("GET", f"/api/advice?hours={hours:g}")
    if json:
        shown_json(answer)
        return
    out = console()
    for piece in answer["advice"]:
        share = piece["saved_seconds"] / piece["waited_seconds"]
        moved = f"{share:.0%} of what it was waited for; {piece['requests']} requests go there"
        out.print(Text(piece["text"], "bold"))
        for line in (moved, *piece["doubts"]):
            out.print(Padding(Text(line), (0, 0, 0, 2)))
    for note in answer["notes"]:
        out.print(Text(note))
    waited = answer["waited_seconds"] / 60
    count = answer["requests"]
    out.print(Text(f"{count} requests were looked at; they waited {waited:.0f} minutes in all."))


@asks
async def replay(
    client: Client,
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", metavar="|".join(POLICIES), help="Repeat to compare; all."),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="FILE", help="A trace, not the history.", exists=True),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="Only requests for this one.")
    ] = None,
    add: Annotated[
        list[str] | None,
        typer.Option("--add", metavar="AGENT", help="One more agent like this one; repeat."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print what it found as JSON.")] = False,
) -> None:
    """Play what was recorded again, on the fleet as it was learned, under other policies.

    Times are in seconds until the first token. Requests without counted tokens are left out.
    """
    policies = policy or list(POLICIES)
    unknown = [name for name in policies if name not in POLICIES]
    if unknown:
        raise typer.BadParameter(f"give one of {', '.join(POLICIES)}", param_hint="--policy")
    recorded = await _recorded(client, model)
    fleet = fleet_of(recorded, add or ())
    played = trace_of(recorded) if trace is None else read_trace(trace.open("rb"))
    held = {spec.name for machine in fleet.machines for spec in machine.models}
    played = [request for request in played if request.model in held]
    if not played:
        raise NoAnswer("nothing is recorded yet that could be played; send some requests first")
    summaries, most = {}, 0
    for number, name in enumerate(policies, 1):
        with Console(stderr=True).status(f"{name}, {number} of {len(policies)} policies"):
            run = Simulation(fleet, partial(_create, name)).run(played)
        most = max(most, sum(_waited(record) for record in run.records))
        summaries[name] = summarise(run, fleet)
    if json:
        facts = {"requests": len(played), "seconds": played[-1].at, "most_waited": most}
        shown_json({**facts, "policies": summaries})
        return
    screen = console()
    screen.print(f"{len(played)} requests over {played[-1].at:.0f} s")
    figures = ("MEAN", "P50", "P95", "P99", "WITHIN 10 s", "LOADS/h", "FAILED")
    made = table("POLICY", *figures, right=figures)
    for name, summary in summaries.items():
        _add_summary(made, name, summary)
    screen.print(made)
    if most < FEW_WAITED * len(played):
        screen.print(
            f"The load was too low to tell: at most {most} of {len(played)} requests waited more "
            f"than {WAITED_SECONDS:.0f} s for a slot under any policy.",
            highlight=False,
        )


def _waited(record: Record) -> bool:
    granted = record.granted_at
    return granted is None or granted - record.request.at > WAITED_SECONDS


def _create(policy: str, registry: Registry) -> Scheduler:
    return create_scheduler(policy, registry, max_queue=1_000_000)


async def _recorded(client: Client, model: str | None) -> Recorded:
    wanted = "" if model is None else f"&model={quote(model)}"
    return Recorded(
        agents=await client.json("GET", "/api/agents"),
        models=(await client.json("GET", "/api/models"))["models"],
        estimates=await client.json("GET", "/api/estimates"),
        requests=await client.json("GET", f"/api/history/export?format=json{wanted}"),
    )


def _add_summary(made: Table, policy: str, summary: Summary) -> None:
    times = [f"{value:.2f}" for value in (summary.mean, summary.p50, summary.p95, summary.p99)]
    share, loads = f"{summary.goodput:.1%}", f"{summary.loads_per_hour:.0f}"
    made.add_row(policy, *times, share, loads, str(summary.failed))


def trace_of(recorded: Recorded) -> list[TraceRequest]:
    """The recorded requests whose tokens were counted, in order of arrival."""
    names = {model_key(row["name"]): str(row["name"]) for row in recorded.models}
    rows = [row for row in recorded.requests if model_key(row["model"]) in names]
    rows = [row for row in rows if row["prompt_tokens"] or row["output_tokens"]]
    arrivals = [datetime.fromisoformat(row["arrived_at"]).timestamp() for row in rows]
    start = min(arrivals, default=0.0)
    trace = [
        _request(row, names[model_key(row["model"])], at - start)
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
    """The online agents with their learned speeds, and one more of each name in `doubled`.

    Raises:
        NoAnswer: there is no such agent.
    """
    models = {model_key(row["name"]): row for row in recorded.models}
    machines = {
        name_of(row): _machine(row, recorded.estimates, models)
        for row in recorded.agents
        if row["status"] != "offline"
    }
    more = []
    for number, name in enumerate(doubled, 2):
        if name not in machines:
            raise NoAnswer(f"no online agent is called '{name}'; see /api/agents")
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
    runner, by_hand = agent["runner"] or {}, agent.get("by_hand") or {}
    memory = by_hand.get("memory_bytes") or video or agent["memory_total_bytes"]
    gpus = [gpu for gpu in agent["gpus"] if not gpu.get("integrated")]
    return MachineSpec(
        name=name_of(agent),
        models=tuple(ModelSpec(str(models[key]["name"]), int(models[key]["size"])) for key in mine),
        memory_bytes=memory or UNKNOWN_MEMORY_BYTES,
        slots=runner.get("num_parallel") or max((row["slots"] for row in mine.values()), default=1),
        prefill_tokens_per_second=_typical(learned, sizes, "prefill_tokens_per_second"),
        decode_tokens_per_second=_typical(learned, sizes, "decode_tokens_per_second"),
        load_bytes_per_second=_load_rate(learned, sizes),
        has_gpu=by_hand["gpu"] != NO_GPU if "gpu" in by_hand else bool(gpus),
    )


def _typical(learned: Mapping[str, Row], sizes: Mapping[str, int], rate: str) -> float:
    """An agent's rate for a model of typical size: rates fall as models grow."""
    rates = [float(row[rate]) * sizes[key] / TYPICAL_BYTES for key, row in learned.items()]
    return median(rates) if rates else 40.0


def _load_rate(learned: Mapping[str, Row], sizes: Mapping[str, int]) -> float:
    seconds = {key: max(float(row["load_seconds"]) - 1.0, 0.1) for key, row in learned.items()}
    rates = [sizes[key] / seconds[key] for key in seconds]
    return median(rates) if rates else 1.5e9
