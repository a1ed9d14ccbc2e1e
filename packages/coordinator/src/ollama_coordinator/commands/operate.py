"""`agents …`, `requests …`, `history` and `settings …`: what an operator does from a terminal."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlencode

import msgspec
import typer
from rich.console import Group, RenderableType
from rich.text import Text

from ollama_coordinator_common.printable import all_printable

from .client import Client, Json, NoAnswer, asks
from .scheduling import decided
from .tables import (
    agents_table,
    console,
    facts,
    name_of,
    requests_table,
    settings_table,
    shown_json,
    table,
)

Agent = Annotated[str, typer.Argument(metavar="AGENT", help="An agent's name or id.")]
RequestId = Annotated[str, typer.Argument(metavar="ID", help="A request's id.")]

agents = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    help="The fleet's agents: list, show, add, drain, resume, restart, label, rename, prefer, rm.",
)
requests = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Requests: list, cancel, why.",
)
settings = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="The coordinator's settings: get, set.",
)


# ── agents ────────────────────────────────────────────────────────────────────────────────────


@agents.callback(invoke_without_command=True)
@asks
async def default(client: Client, context: typer.Context, json: Json = False) -> None:
    """The fleet's agents; without a command they are listed."""
    if context.invoked_subcommand is None:
        await _list(client, json=json)


@agents.command("list")
@asks
async def list_agents(client: Client, json: Json = False) -> None:
    """List every agent, how it is, and what it does."""
    await _list(client, json=json)


async def _list(client: Client, *, json: bool) -> None:
    listed = await client.json("GET", "/api/agents")
    if json:
        shown_json(listed)
    else:
        screen = console()
        screen.print(agents_table(listed, screen.width))


@agents.command("show")
@asks
async def show_agent(client: Client, agent: Agent, json: Json = False) -> None:
    """Show all facts of one agent."""
    row = await _agent(client, agent)
    if json:
        shown_json(row)
    else:
        console().print(facts(row))


@agents.command("add")
@asks
async def add(
    client: Client,
    addresses: Annotated[
        list[str],
        typer.Argument(metavar="URL|HOST[:PORT]...", help="Where Ollamas without agent answer."),
    ],
    name: Annotated[str, typer.Option("--name", help="What people call it.")] = "",
    api_key_file: Annotated[
        Path | None,
        typer.Option("--api-key-file", metavar="FILE", help="A file with the key they ask for."),
    ] = None,
    json: Json = False,
) -> None:
    """Add Ollamas that run without an agent; the coordinator must reach them."""
    if name and len(addresses) > 1:
        raise NoAnswer("give --name for one address at a time")
    try:
        key = "" if api_key_file is None else api_key_file.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise NoAnswer(f"{api_key_file} cannot be read: {exc}") from exc
    added, failures = [], []
    for address in addresses:
        try:
            answer = await client.json("POST", "/api/agents", _added(address, name, key))
        except NoAnswer as exc:
            failures.append(str(exc))
            continue
        row = await client.json("GET", f"/api/agents/{answer['agent_id']}")
        added.append(row)
        if not json:
            console().print(Text(f"{answer['status']}: {name_of(row)}, {_state(row)}"))
    if json and added:
        shown_json(added[0] if len(addresses) == 1 else added)
    if failures:
        raise NoAnswer("; ".join(failures))


def _added(address: str, name: str, api_key: str) -> dict[str, object]:
    """The body that adds an Ollama.

    Raises:
        NoAnswer: the text is no address.
    """
    if "://" in address:
        return {"url": address, "machine_name": name, "api_key": api_key}
    host, _, port = address.rpartition(":") if address.count(":") == 1 else (address, "", "11434")
    if not port.isdigit():
        raise NoAnswer(f"{address} is no address: give HOST, HOST:PORT or a URL")
    if api_key:
        raise NoAnswer(f"give the URL of an Ollama that asks for a key, such as http://{address}")
    facts = {"machine_name": name or host, "ip_address": host, "ollama_port": int(port)}
    return {**facts, "ollama_version": "unknown"}


@agents.command("drain")
@asks
async def drain(client: Client, agent: Agent, json: Json = False) -> None:
    """Let an agent finish what it has, and give it nothing new."""
    await _change(client, agent, json=json, draining=True, overruled=False)


@agents.command("resume")
@asks
async def resume(client: Client, agent: Agent, json: Json = False) -> None:
    """Give an agent requests again: one that was drained, or pauses by itself."""
    row = await _agent(client, agent)
    await _change(client, row["id"], json=json, draining=False, overruled=bool(row.get("paused")))


@agents.command("restart")
@asks
async def restart(client: Client, agent: Agent, json: Json = False) -> None:
    """Restart an Ollama that its agent started; refused while a request runs there."""
    row = await _agent(client, agent)
    row = await client.json("POST", f"/api/agents/{row['id']}/restart")
    if json:
        shown_json(row)
        return
    console().print(Text(f"{name_of(row)} restarts its Ollama at its next heartbeat"))


@agents.command("wake")
@asks
async def wake(client: Client, agent: Agent, json: Json = False) -> None:
    """Wake a machine that sleeps, by a magic packet (Wake-on-LAN)."""
    row = await _agent(client, agent)
    row = await client.json("POST", f"/api/agents/{row['id']}/wake")
    if json:
        shown_json(row)
    else:
        console().print(Text(f"{name_of(row)}: woken; it is there once its agent reports"))


@agents.command("label")
@asks
async def label(
    client: Client,
    agent: Agent,
    labels: Annotated[
        list[str] | None, typer.Argument(metavar="[LABEL...]", help="All of its labels.")
    ] = None,
    json: Json = False,
) -> None:
    """Set an agent's labels; none takes them away."""
    await _change(client, agent, json=json, labels=list(labels or ()))


@agents.command("rename")
@asks
async def rename(
    client: Client,
    agent: Agent,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The new name; '' for its own.")],
    json: Json = False,
) -> None:
    """Give an agent another name."""
    await _change(client, agent, json=json, display_name=name or None)


@agents.command("prefer")
@asks
async def prefer(
    client: Client,
    agent: Agent,
    preference: Annotated[
        float, typer.Argument(metavar="NUMBER", help="It counts as so many times as fast.")
    ] = 1.0,
    backup: Annotated[
        float,
        typer.Option(
            "--backup", metavar="SECONDS", help="Only if others would take so much longer."
        ),
    ] = 0.0,
    json: Json = False,
) -> None:
    """Set how an agent is preferred, or keep it as a backup."""
    await _change(client, agent, json=json, preference=preference, backup_seconds=backup)


@agents.command("rm")
@asks
async def remove(client: Client, agent: Agent, json: Json = False) -> None:
    """Forget an agent; one that still runs registers again."""
    row = await _agent(client, agent)
    await client.json("DELETE", f"/api/agents/{row['id']}")
    if json:
        shown_json({"removed": row["id"]})
        return
    console().print(Text(f"removed {name_of(row)}"))


async def _agent(client: Client, wanted: str) -> Mapping[str, Any]:
    """The agent of this id or name.

    Raises:
        NoAnswer: there is none, or several have the name.
    """
    listed: Sequence[Mapping[str, Any]] = await client.json("GET", "/api/agents")
    ids = [row for row in listed if row["id"] == wanted]
    exact = [row for row in listed if wanted == name_of(row)]
    named = [row for row in listed if wanted in (row["display_name"], row["machine_name"])]
    found = ids or exact or named
    if len(found) == 1:
        return found[0]
    if found:
        same = ", ".join(f"'{name_of(row)}', {row['id']}" for row in found)
        raise NoAnswer(f"several agents are called {wanted}; give a whole name or an id: {same}")
    names = ", ".join(sorted(name_of(row) for row in listed)) or "none"
    raise NoAnswer(f"no agent is called {wanted}; there are: {names}")


async def _change(client: Client, wanted: str, *, json: bool, **changes: object) -> None:
    row = await _agent(client, wanted)
    row = await client.json("PATCH", f"/api/agents/{row['id']}", changes)
    if json:
        shown_json(row)
        return
    console().print(Text(f"{name_of(row)}: {_state(row)}"))


def _state(row: Mapping[str, Any]) -> str:
    reason = row["out_of_rotation"]
    if row["status"] == "draining" and row.get("paused"):
        reason = row["paused"]
    return f"{row['status']}, gets no requests: {reason}" if reason else str(row["status"])


# ── requests ──────────────────────────────────────────────────────────────────────────────────


@requests.command("list")
@asks
async def list_requests(client: Client, json: Json = False) -> None:
    """List the requests in progress, the oldest first."""
    listed = await client.json("GET", "/api/requests")
    if json:
        shown_json(listed)
    elif listed:
        console().print(requests_table(listed))
    else:
        typer.echo("Nothing runs and nothing waits.")


@requests.command("cancel")
@asks
async def cancel(client: Client, request: RequestId, json: Json = False) -> None:
    """End a request: its client gets an error, its agent stops working on it."""
    await client.json("DELETE", f"/api/requests/{quote(request, safe='')}")
    if json:
        shown_json({"cancelled": request})
        return
    typer.echo(f"cancelled {request}")


@requests.command("why")
@asks
async def why(client: Client, request: RequestId, json: Json = False) -> None:
    """Show why a request went where it went, live or finished. Times are in seconds."""
    row = await client.json("GET", f"/api/requests/{quote(request, safe='')}")
    if json:
        shown_json(row)
        return
    screen = console()
    screen.print(reasons(row, screen.width))


def reasons(row: Mapping[str, Any], width: int) -> Group:
    """Why a request is where it is: each attempt with what decided it, or what would decide now."""
    parts: list[RenderableType] = []
    for number, attempt in enumerate(row["attempts"], 1):
        ended = attempt.get("result") or "in progress"
        reason = f": {attempt['reason']}" if attempt.get("reason") else ""
        parts.append(Text(f"{number}. {attempt['agent']}: {ended}{reason}"))
        if attempt.get("continues"):
            parts.append(Text(f"   went on after {attempt['continues']} tokens of the answer"))
        if attempt.get("rule"):
            parts.append(Text(f"   decided by {attempt['rule']}"))
        refused = attempt.get("refused", {})
        parts += [Text(f"   not {name}: {why}") for name, why in refused.items()]
        if attempt.get("decision"):
            parts.append(decided(attempt["decision"], width))
    if row.get("now") and not row["attempts"]:
        parts.append(decided(row["now"], width))
    return Group(*parts)


@asks
async def history(
    client: Client,
    model: Annotated[str, typer.Option("--model", metavar="MODEL")] = "",
    agent: Annotated[str, typer.Option("--agent", metavar="AGENT")] = "",
    of_client: Annotated[str, typer.Option("--client", metavar="CLIENT")] = "",
    status: Annotated[
        str, typer.Option("--status", metavar="served|refused|failed|cancelled")
    ] = "",
    since: Annotated[str, typer.Option("--since", metavar="TIME", help="2026-01-31T08:00Z")] = "",
    limit: Annotated[int, typer.Option("--limit", metavar="NUMBER", min=1, max=500)] = 20,
    json: Json = False,
) -> None:
    """List the requests that ended last, the newest first."""
    wanted = {"model": model, "agent": agent, "client": of_client, "status": status}
    wanted |= {"since": since, "limit": str(limit)}
    query = urlencode({name: value for name, value in wanted.items() if value})
    listed = (await client.json("GET", f"/api/history?{query}"))["requests"]
    if json:
        shown_json(listed)
        return
    made = table("ENDED", "MODEL", "RESULT", "AGENT", "WAITED", "TOOK", right=("WAITED", "TOOK"))
    for row in listed:
        ended = datetime.fromisoformat(row["finished_at"]).astimezone()
        made.add_row(
            f"{ended:%d %b %H:%M:%S}",
            Text(row["model"]),
            Text(_result(row)),
            Text(row["agent"] or "-"),
            f"{row['waited_seconds']:.1f} s",
            f"{row['total_seconds']:.1f} s",
        )
    console().print(made)


@asks
async def audit(
    client: Client,
    by: Annotated[str, typer.Option("--by", metavar="NAME", help="A client, or a key.")] = "",
    limit: Annotated[int, typer.Option("--limit", metavar="NUMBER", min=1, max=500)] = 20,
    json: Json = False,
) -> None:
    """Show who changed what from where, the newest first."""
    wanted = {"by": by, "limit": str(limit)}
    query = urlencode({name: value for name, value in wanted.items() if value})
    listed = (await client.json("GET", f"/api/audit?{query}"))["changes"]
    if json:
        shown_json(listed)
        return
    made = table("WHEN", "WHO", "FROM", "WHAT", "ABOUT")
    for row in listed:
        at = datetime.fromisoformat(row["at"]).astimezone()
        texts = (row["by"], row["address"], row["action"], row["subject"] or "-")
        made.add_row(f"{at:%d %b %H:%M:%S}", *map(Text, texts))
    console().print(made)


@asks
async def usage(
    client: Client,
    by: Annotated[
        str, typer.Option("--by", metavar="PARTS", help="day, person, key and model, or some.")
    ] = "person,key,model",
    since: Annotated[str, typer.Option("--since", metavar="DAY", help="2026-01-31")] = "",
    until: Annotated[str, typer.Option("--until", metavar="DAY", help="Included.")] = "",
    as_csv: Annotated[bool, typer.Option("--csv", help="Print every day as CSV.")] = False,
    json: Json = False,
) -> None:
    """Show what people, keys and models used, within 30 days unless days are given."""
    wanted = {"by": "day,person,key,model" if as_csv else by, "since": since, "until": until}
    query = urlencode({name: value for name, value in wanted.items() if value})
    if as_csv:
        async with client.answer("GET", f"/api/usage?{query}&format=csv") as answer:
            typer.echo(all_printable(await answer.text()).replace("\r\n", "\n"), nl=False)
        return
    listed = await client.json("GET", f"/api/usage?{query}")
    if json:
        shown_json(listed)
        return
    sums = ("REQUESTS", "READ", "WRITTEN", "GPU TIME")
    made = table(*(name.upper() for name in listed["by"]), *sums, right=sums)
    for row in listed["usage"]:
        made.add_row(
            *(Text(row[name] or "-") for name in listed["by"]),
            *(f"{row[name]:,}" for name in ("requests", "prompt_tokens", "output_tokens")),
            f"{timedelta(seconds=round(row['gpu_seconds']))}",
        )
    console().print(made)


def _result(row: Mapping[str, Any]) -> str:
    status, code = str(row["status"]), row["http_status"]
    return status if code == 200 else f"{status} {code}"


# ── settings ──────────────────────────────────────────────────────────────────────────────────


@settings.command("get")
@asks
async def get(
    client: Client,
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="All of them if not given.")] = "",
    json: Json = False,
) -> None:
    """Show settings, and where each comes from."""
    listed = (await client.json("GET", "/api/settings"))["settings"]
    if name:
        listed = [_setting(listed, name)]
    if json:
        shown_json(listed[0] if name else listed)
    elif name:
        typer.echo(_text(listed[0]["value"]))
    else:
        console().print(settings_table(listed))


@settings.command("set")
@asks
async def change(
    client: Client,
    name: Annotated[str, typer.Argument(metavar="NAME")],
    value: Annotated[
        str | None, typer.Argument(metavar="[VALUE]", help="The default if not given.")
    ] = None,
    json: Json = False,
) -> None:
    """Change a setting, at once and for later starts."""
    listed = (await client.json("GET", "/api/settings"))["settings"]
    known = _setting(listed, name)
    taken = _value(known, value) if value is not None else None
    listed = (await client.json("PATCH", "/api/settings", {known["name"]: taken}))["settings"]
    row = _setting(listed, known["name"])
    if json:
        shown_json(row)
    else:
        typer.echo(f"{row['name']} = {_text(row['value'])}")


def _setting(listed: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    """The setting of this name or variable."""
    for setting in listed:
        if name in (setting["name"], setting["variable"]):
            return setting
    names = ", ".join(setting["name"] for setting in listed)
    raise NoAnswer(f"there is no setting {name}; there are: {names}")


def _value(setting: Mapping[str, Any], text: str) -> object:
    """A text as the JSON that the setting takes; one that is none is sent, and refused."""
    if isinstance(setting["default"], str | None):
        return text
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text


def _text(value: object) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
