"""`models …`, `ps` and `attention`: the fleet from the command line."""

import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.text import Text

from ollama_coordinator_common.names import ModelName, model_key

from .client import Client, Json, Model, NoAnswer, asks
from .tables import (
    Bars,
    aliases_table,
    attention_table,
    console,
    holders_table,
    loaded_table,
    models_table,
    name_of,
    readable,
    shown_json,
    table,
    targets_table,
)

models = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="The fleet's models: list, pull, remove, show, copy, alias, load, unload.",
)

Replicas = Annotated[
    int | None,
    typer.Option("--replicas", metavar="NUMBER", min=1, help="On how many agents."),
]
On = Annotated[
    str | None,
    typer.Option(
        "--on",
        metavar="all|NUMBER|label:NAME|agents:NAME,...",
        help="On which agents; the coordinator's own setting if not given.",
    ),
]
Origin = Annotated[
    str,
    typer.Option(
        "--from", metavar="AGENT|fleet", help="Take it from this machine, or from any that has it."
    ),
]
Detach = Annotated[bool, typer.Option("--detach", help="Do not wait for the end.")]


@asks
async def attention(client: Client, json: Json = False) -> None:
    """List what needs a person, the worst first; the exit code is 1 if there is anything."""
    listed = (await client.json("GET", "/api/attention"))["attention"]
    if json:
        shown_json(listed)
    elif listed:
        console().print(attention_table(listed))
    else:
        typer.echo("Nothing needs attention.")
    if listed:
        raise typer.Exit(1)


@models.command("list")
@asks
async def list_models(client: Client, json: Json = False) -> None:
    """List every model, the agents that have it, and where it is in memory."""
    listed = (await client.json("GET", "/api/models"))["models"]
    if json:
        shown_json(listed)
        return
    console().print(models_table(listed, await _names(client)))


@models.command()
@asks
async def pull(
    client: Client,
    model: Model,
    replicas: Replicas = None,
    on: On = None,
    origin: Origin = "",
    detach: Detach = False,
    json: Json = False,
) -> None:
    """Pull a model onto agents. It goes on when this command is interrupted."""
    given = {"from": origin} if origin else {}
    wanted = {"kind": "pull", "model": model, **given, **_placement(replicas, on)}
    await _operation(client, wanted, detach=detach, json=json)


@models.command("copy")
@asks
async def copy_to(
    client: Client,
    model: Model,
    agents: Annotated[
        list[str] | None, typer.Argument(metavar="[AGENT...]", help="To which; those that fit.")
    ] = None,
    origin: Origin = "fleet",
    detach: Detach = False,
    json: Json = False,
) -> None:
    """Copy a model to other machines, from those that have it; the internet is not asked."""
    where = {"placement": f"agents:{','.join(agents)}"} if agents else {}
    wanted = {"kind": "pull", "model": model, "from": origin, **where}
    await _operation(client, wanted, detach=detach, json=json)


@models.command()
@asks
async def load(
    client: Client,
    model: Model,
    replicas: Replicas = None,
    on: On = None,
    keep_alive: Annotated[
        str | None, typer.Option("--keep-alive", metavar="DURATION", help="Such as 30m or -1s.")
    ] = None,
    json: Json = False,
) -> None:
    """Bring a model into memory, on one agent if not said otherwise."""
    kept = {} if keep_alive is None else {"keep_alive": keep_alive}
    wanted = {"kind": "load", "model": model, **kept, **_placement(replicas, on)}
    await _operation(client, wanted, json=json)


@models.command()
@asks
async def unload(client: Client, model: Model, json: Json = False) -> None:
    """Drop a model from memory on every agent."""
    await _operation(client, {"kind": "unload", "model": model}, json=json)


@models.command()
@asks
async def cp(
    client: Client,
    source: Model,
    destination: Annotated[str, typer.Argument(metavar="NAME", help="The new name.")],
    json: Json = False,
) -> None:
    """Give a model a second name on every agent that has it."""
    wanted = {"kind": "copy", "model": source, "destination": destination}
    await _operation(client, wanted, json=json)


@models.command()
@asks
async def rm(
    client: Client,
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Names of models.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """Delete models on every agent; those that are away do it when they return.

    In a terminal the agents are listed first.
    """
    if sys.stdin.isatty() and not yes and not json:
        await _confirm(client, models)
    done = []
    for model in models:
        wanted = {"kind": "delete", "model": model}
        operation = await client.json("POST", "/api/operations", wanted)
        done.append(operation)
        if not json:
            console().print(targets_table(operation))
    if json:
        shown_json(done[0] if len(models) == 1 else done)


async def _confirm(client: Client, models: Sequence[str]) -> None:
    """List the agents that have models, and ask whether these are deleted there."""
    made = table("MODEL", "AGENT", "")
    agents = await client.json("GET", "/api/agents")
    for model in models:
        key = model_key(model)
        for agent in agents:
            if any(model_key(name) == key for name in agent["models"]):
                away = "away: when it returns" if agent["status"] == "offline" else ""
                made.add_row(Text(model), Text(name_of(agent)), away)
    if not made.row_count:
        return  # the coordinator says what is wrong
    console().print(made)
    # Ctrl-C ends the question, not just the task that asks it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    typer.confirm("Delete what is listed?", abort=True)


@models.command()
@asks
async def alias(
    client: Client,
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", help="The alias; all are listed without it.")
    ] = "",
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL...]", help="What it stands for, the preferred one first."),
    ] = None,
    wait: Annotated[
        float | None,
        typer.Option("--wait", metavar="SECONDS", help="After so long the next model serves."),
    ] = None,
    rm: Annotated[bool, typer.Option("--rm", help="Delete it.")] = False,
    json: Json = False,
) -> None:
    """Give one or several models a name: `models alias fast llama3.2 qwen3:4b --wait 10`."""
    if not name:
        listed = (await client.json("GET", "/api/aliases"))["aliases"]
        if json:
            shown_json(listed)
        elif listed:
            console().print(aliases_table(listed))
        else:
            typer.echo("No alias is set.")
    elif rm:
        await client.json("DELETE", f"/api/aliases/{quote(name)}")
        if json:
            shown_json({"deleted": name})
        else:
            typer.echo(f"deleted {name}")
    elif not models:
        raise NoAnswer(f"say what {name} stands for: models alias {name} MODEL...")
    else:
        wanted = {"name": name, "models": models, "wait_seconds": wait}
        made = await client.json("POST", "/api/aliases", wanted)
        if json:
            shown_json(made)
        else:
            typer.echo(f"{name} → {', '.join(made['resolved'])}")


@models.command()
@asks
async def show(client: Client, model: Model, json: Json = False) -> None:
    """Show what a model is and which agents have it."""
    shown = await client.json("POST", "/api/show", {"model": model})
    listed = (await client.json("GET", "/api/models"))["models"]
    key = ModelName.parse(model).key
    same = [one for one in listed if ModelName.parse(one["name"]).key == key]
    if json:
        shown_json({"show": shown, "models": same})
        return
    screen = console()
    for name, value in shown.get("details", {}).items():
        screen.print(f"{name:<20} {readable(value)}", highlight=False, markup=False)
    capabilities = ", ".join(shown.get("capabilities") or ())
    screen.print(f"{'capabilities':<20} {capabilities}", highlight=False, markup=False)
    screen.print(shown.get("parameters", ""), highlight=False, markup=False)
    screen.print(holders_table(same, await _names(client)))


@asks
async def ps(client: Client, json: Json = False) -> None:
    """List the models in memory and the agents they are on."""
    rows = (await client.json("GET", "/api/ps"))["models"] or ()
    listed = (await client.json("GET", "/api/models"))["models"]
    where = {model["name"]: model["loaded_on"] for model in listed}
    if json:
        shown_json([{**row, "agents": where.get(row["name"], ())} for row in rows])
        return
    console().print(loaded_table(rows, where, await _names(client)))


def _placement(replicas: int | None, on: str | None) -> dict[str, str]:
    if replicas is not None:
        return {"placement": str(replicas)}
    return {} if on is None else {"placement": on}


async def _names(client: Client) -> dict[str, str]:
    agents = await client.json("GET", "/api/agents")
    return {agent["id"]: name_of(agent) for agent in agents}


async def _operation(
    client: Client, wanted: Mapping[str, Any], *, detach: bool = False, json: bool = False
) -> None:
    """Start an operation, show its progress until its end, then the outcome on every agent."""
    screen = console()
    operation = await client.json("POST", "/api/operations", wanted)
    path = f"/api/operations/{operation['id']}"
    if detach and json:
        shown_json(operation)
        return
    if detach:
        screen.print(f"operation {operation['id']} goes on by itself", highlight=False)
        return
    bars = Bars(screen)
    failure: NoAnswer | None = None
    try:
        with nullcontext() if json else bars.progress:
            async for line in client.lines(f"{path}/progress"):
                if not json:
                    bars.show(line)
    except NoAnswer as exc:
        failure = exc
    outcome = await client.json("GET", path)
    if json:
        shown_json(outcome)
        if failure is not None:
            raise typer.Exit(1)
        return
    screen.print(targets_table(outcome))
    if failure is not None:
        raise failure
