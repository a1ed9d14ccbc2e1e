"""`explain` and `replay`: why a request goes where it goes, and where it would have gone."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ollama_coordinator.registry import Registry
from ollama_coordinator.scheduler import POLICIES, Scheduler, create_scheduler
from ollama_coordinator.simulation import Simulation, Summary, read_trace, summarise

from .client import Client, NoAnswer, connected, finished
from .models import DEFAULT, Coordinator, Model
from .recorded import Recorded, fleet_of, trace_of
from .showing import table

TERMS = ("wait", "load", "evict", "prefill", "decode", "crowding", "failure")


def explain(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="[PROMPT]", help="What to ask.")] = "",
    num_ctx: Annotated[
        int | None, typer.Option("--num-ctx", metavar="TOKENS", help="The context to ask for.")
    ] = None,
    coordinator: Coordinator = DEFAULT,
) -> None:
    """Show where a request would go, and why; it is not sent. Times are in seconds."""
    body: dict[str, Any] = {"model": model, "prompt": prompt}
    if num_ctx is not None:
        body["options"] = {"num_ctx": num_ctx}

    async def work() -> None:
        async with connected(coordinator) as client:
            decision = await client.json("POST", "/api/explain", body)
        console = Console()
        console.print(_candidates(decision))
        console.print(_verdict(decision))

    finished(work())


def _candidates(decision: Mapping[str, Any]) -> Table:
    made = table("AGENT", "WOULD", "COST", *(term.upper() for term in TERMS), "CACHED", "")
    for column in made.columns[2:-1]:
        column.justify = "right"
    known = [one for one in decision["candidates"] if one["cost"] is not None]
    refused = [one for one in decision["candidates"] if one["cost"] is None]
    for one in (*sorted(known, key=lambda one: float(one["cost"])), *refused):
        told = [f"{one[f'{term}_seconds']:.2f}" for term in TERMS]
        is_chosen = one["agent_id"] == decision["chosen"]
        cost = "" if one["cost"] is None else f"{one['cost']:.2f}"
        made.add_row(
            Text(one["agent"]),
            one["action"],
            cost,
            *(told if cost else [""] * len(TERMS)),
            str(one["cached_tokens"] or ""),
            Text(one["refused"] or ("← chosen" if is_chosen else "")),
            style="bold" if is_chosen else "dim" if not cost else "",
        )
    return made


def _verdict(decision: Mapping[str, Any]) -> str:
    start = decision["start_in_seconds"]
    when = "when there is a place" if start is None else f"in {start:.2f} s"
    words = {"go": "It would start", "load": "It would load the model and start"}
    verdict = words.get(
        decision["action"], f"It would wait as number {decision['position']}, start"
    )
    return f"{verdict} {when}; {decision['expected_output_tokens']:.0f} tokens of answer expected."


def replay(
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
    coordinator: Coordinator = DEFAULT,
) -> None:
    """Play what was recorded again, on the fleet as it was learned, under other policies.

    Times are in seconds until the first token. Requests without counted tokens are left out.
    """
    policies = policy or list(POLICIES)
    unknown = [name for name in policies if name not in POLICIES]
    if unknown:
        raise typer.BadParameter(f"give one of {', '.join(POLICIES)}", param_hint="--policy")

    async def work() -> None:
        async with connected(coordinator) as client:
            recorded = await _recorded(client, model)
        fleet = fleet_of(recorded, add or ())
        played = trace_of(recorded) if trace is None else read_trace(trace.open("rb"))
        held = {spec.name for machine in fleet.machines for spec in machine.models}
        played = [request for request in played if request.model in held]
        if not played:
            raise NoAnswer("nothing is recorded yet that could be played; send some requests first")
        console = Console()
        console.print(f"{len(played)} requests over {played[-1].at:.0f} s")
        made = _summaries()
        for name in policies:
            simulation = Simulation(fleet, partial(_create, name))
            _add_summary(made, name, summarise(simulation.run(played), fleet))
        console.print(made)

    finished(work())


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


def _summaries() -> Table:
    made = table("POLICY", "MEAN", "P50", "P95", "P99", "WITHIN 10 s", "LOADS/h", "FAILED")
    for column in made.columns[1:]:
        column.justify = "right"
    return made


def _add_summary(made: Table, policy: str, summary: Summary) -> None:
    times = [f"{value:.2f}" for value in (summary.mean, summary.p50, summary.p95, summary.p99)]
    share, loads = f"{summary.goodput:.1%}", f"{summary.loads_per_hour:.0f}"
    made.add_row(policy, *times, share, loads, str(summary.failed))
