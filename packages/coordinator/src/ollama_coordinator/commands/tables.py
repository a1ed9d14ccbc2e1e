"""How agents, models and operations look in a terminal."""

import re
from collections.abc import Collection, Iterable, Mapping
from datetime import datetime
from shutil import get_terminal_size
from typing import Any

import msgspec
import typer
from rich.console import Console, Group
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

WIDE = 120
"""Columns of a terminal that has room for everything."""

PIPED_WIDTH = 10_000
"""No row is so long."""

STATUS_COLOURS = {"online": "green", "offline": "red", "draining": "yellow"}
TARGET_COLOURS = {"done": "green", "failed": "red", "pending": "yellow", "cancelled": "red"}


def console() -> Console:
    """The terminal. Where there is none, each row is one line, for `grep` and `awk`."""
    return Console(width=get_terminal_size((PIPED_WIDTH, 0)).columns)


def shown_json(answer: object) -> None:
    """Print an answer of the API as it is."""
    typer.echo(msgspec.json.encode(answer))


def table(*columns: str, right: Collection[str] = (), is_cut: bool = False) -> Table:
    """A table without lines, as `ollama list` has none; `right` are the columns of numbers.

    `is_cut`: each row is one line, as wide as the terminal; otherwise long texts take several.
    """
    made = Table(box=None, pad_edge=False, header_style="bold", expand=is_cut)
    for column in columns:
        made.add_column(
            column,
            justify="right" if column in right else "left",
            no_wrap=is_cut,
            overflow="ellipsis" if is_cut else "fold",
        )
    return made


def agents_table(agents: Iterable[Mapping[str, Any]], width: int) -> Group:
    """Every agent, how it is, and what it does; its URL and id where `width` has room for them.

    Where it has not, what is wrong with an agent is a line of its own below the table.
    """
    is_wide = width >= WIDE
    wide = ("URL", "ID") if is_wide else ()
    made = table("NAME", "STATUS", "IN FLIGHT", "LOADED", "ON DISK", "OLLAMA", *wide)
    for column in made.columns[1:3] + made.columns[4:]:
        column.no_wrap = not is_wide
    notes = []
    for agent in agents:
        # As texts, not as markup: a machine may be called anything.
        name = Text(name_of(agent))
        status, note = _status(agent)
        whole = Text.assemble(status, ": " if note else "", note)
        if note and not is_wide:
            notes.append(Text.assemble(name, f": {note}"))
        made.add_row(
            name,
            whole if is_wide else status,
            Text(str(agent["in_flight"])),
            Text(", ".join(map(_short, agent["loaded_models"])) or "-"),
            Text(str(len(agent["models"]))),
            Text(agent["ollama_version"]),
            *(Text(agent[name.lower()]) for name in wide),
        )
    return Group(made, *notes)


def name_of(agent: Mapping[str, Any]) -> str:
    """What an agent is called, with what tells it apart; earlier coordinators do not."""
    return str(agent.get("name") or agent["display_name"] or agent["machine_name"])


def _short(model: str) -> str:
    """A model's name without the tag that goes without saying."""
    return model.removesuffix(":latest")


def aliases_table(aliases: Iterable[Mapping[str, Any]]) -> Table:
    """Every alias, what it stands for, and why it is not in use where it is not."""
    made = table("ALIAS", "MODELS", "WAIT", "NOTE")
    for row in aliases:
        wait, hidden = row["wait_seconds"], ", ".join(row["hidden_by"])
        made.add_row(
            Text(row["name"]),
            Text(", ".join(row["models"])),
            Text("-" if wait is None else f"{wait:g} s"),
            Text(f"not in use: {hidden} has a model of this name" if hidden else ""),
        )
    return made


def facts(row: Mapping[str, Any]) -> Table:
    """One row of the API as names and values; what is not known is left out."""
    made = Table(box=None, pad_edge=False, show_header=False)
    for name, value in row.items():
        if value in (None, "", [], {}):
            continue
        made.add_row(Text(name, "bold"), Text(_with_unit(name, value), overflow="fold"))
    return made


UNITS = {"_usage": " %", "_percent": " %", "_celsius": " °C", "_watts": " W"}
"""Of numbers, by the ends of their names."""


def _with_unit(name: str, value: object) -> str:
    """A fact for people: a number with its unit, the rows of a list in lines of their own."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "\n".join(_with_unit(name, part) for part in value)
    if isinstance(value, dict):
        parts = ((key, _with_unit(key, part)) for key, part in value.items() if part)
        return "; ".join(f"{key} {text}" for key, text in parts)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return readable(value)
    if name.endswith("_bytes"):
        return decimal(int(value))
    unit = next((unit for end, unit in UNITS.items() if name.endswith(end)), "")
    return f"{value:.1f}{unit}" if isinstance(value, float) or unit else str(value)


def readable(value: object) -> str:
    """A value of JSON for people: a list by its parts; yes and no as `settings set` takes them."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(readable, value))
    if isinstance(value, dict):
        return "; ".join(f"{name} {readable(part)}" for name, part in value.items() if part)
    return str(value)


def requests_table(requests: Iterable[Mapping[str, Any]]) -> Table:
    """The requests in progress."""
    made = table("ID", "STATE", "MODEL", "AGENT", "TOKENS", "SINCE", right=("TOKENS", "SINCE"))
    for one in requests:
        position = f" {one['position']}" if one.get("position") else ""
        made.add_row(
            Text(one["id"]),
            Text(one["state"] + position),
            Text(one["model"]),
            Text(f"wakes {one['waits_for']}" if one.get("waits_for") else one["agent"] or "-"),
            str(one["tokens"]),
            f"{one['elapsed_seconds']:.0f} s",
        )
    return made


def settings_table(settings: Iterable[Mapping[str, Any]]) -> Table:
    """Settings, and where each comes from."""
    made = table("NAME", "VALUE", "FROM", "VARIABLE")
    for one in settings:
        value = readable(one["value"]) or "-"
        made.add_row(one["name"], Text(value), one["source"], one["variable"])
    return made


SEVERITY_COLOURS = {"critical": "red", "warning": "yellow", "note": "cyan"}


def attention_table(listed: Iterable[Mapping[str, Any]]) -> Table:
    """What needs a person: how bad it is, what it is about, since when, what to do."""
    made = table("SEVERITY", "ABOUT", "SINCE", "WHAT")
    for one in listed:
        concern = one["concern"]
        since = datetime.fromisoformat(one["since"]).astimezone()
        made.add_row(
            Text(concern["severity"], SEVERITY_COLOURS.get(concern["severity"], "")),
            Text(concern["subject"]),
            Text(f"{since:%d %b %H:%M}"),
            Text(concern["text"]),
        )
    return made


def _status(agent: Mapping[str, Any]) -> tuple[Text, str]:
    """An agent's state in a word or three, and what is wrong with it."""
    status = str(agent["status"])
    if agent.get("conflict"):
        return Text(status, "red"), agent["conflict"]
    if status != "offline" and agent["out_of_rotation"]:
        return Text("out of rotation", "red"), agent["out_of_rotation"]
    if status == "offline" and agent.get("asleep"):
        return Text("asleep", "cyan"), "it is woken" if agent.get("waking") else ""
    if status == "draining" and agent.get("paused"):
        return Text("paused", "yellow"), agent["paused"]
    if status != "offline" and agent["avoided_models"]:
        avoided = "; ".join(f"{name}: {why}" for name, why in agent["avoided_models"].items())
        return Text(status, "yellow"), f"others are asked first for {avoided}"
    if status != "offline" and agent.get("left_behind"):
        return Text(status, "yellow"), agent["left_behind"]
    return Text(status, STATUS_COLOURS[status]), ""


def models_table(models: Iterable[Mapping[str, Any]], names: Mapping[str, str]) -> Table:
    """Every model, its holders, and where it is in memory."""
    made = table("NAME", "ID", "SIZE", "AGENTS", "LOADED ON", "")
    for model in models:
        made.add_row(
            model["name"],
            model["digest"][:12],
            decimal(model["size"]),
            _named(model["holders"], names),
            _named(model["loaded_on"], names),
            Text("other content elsewhere" if model["conflict"] else "", "red"),
        )
    return made


def holders_table(models: Iterable[Mapping[str, Any]], names: Mapping[str, str]) -> Table:
    """The holders of a model, and which of them have it in memory."""
    made = table("AGENT", "IN MEMORY", "")
    for model in models:
        for content in model["contents"]:
            other = "" if content["is_preferred"] else "other content, gets no requests"
            for agent_id in content["holders"]:
                loaded = "yes" if agent_id in model["loaded_on"] else "no"
                made.add_row(_named([agent_id], names), loaded, Text(other, "red"))
    return made


def loaded_table(
    rows: Iterable[Mapping[str, Any]], where: Mapping[str, Iterable[str]], names: Mapping[str, str]
) -> Table:
    """What is in memory anywhere."""
    made = table("NAME", "ID", "SIZE", "CONTEXT", "UNTIL", "AGENTS")
    for row in rows:
        made.add_row(
            row["name"],
            row["digest"][:12],
            decimal(row["size"]),
            str(row.get("context_length", "")),
            _until(row["expires_at"]),
            _named(where.get(row["name"], ()), names),
        )
    return made


def _until(text: str) -> str:
    """A time of Ollama's in this machine's zone, without the nanoseconds that Go writes."""
    try:
        at = datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", text)).astimezone()
    except ValueError:
        return text
    return f"{at:%d %b %H:%M %Z}"


def targets_table(operation: Mapping[str, Any]) -> Table:
    """An operation's agents and how far each one is."""
    made = table("AGENT", "STATE", "DETAIL")
    for target in operation["targets"]:
        state = target["state"]
        colour = TARGET_COLOURS.get(state, "cyan")
        detail = target["error"] or target["status"]
        made.add_row(Text(target["agent"]), Text(state, colour), Text(detail))
    return made


def _named(ids: Iterable[str], names: Mapping[str, str]) -> Text:
    """Names as they are: a machine may be called anything, markup too."""
    return Text(", ".join(sorted(names.get(agent_id, agent_id) for agent_id in ids)))


class Bars:
    """Ollama's progress lines as bars: one a layer, the other steps as text above them."""

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), DownloadColumn(), console=console
        )
        self._layers: dict[str, TaskID] = {}

    def show(self, line: Mapping[str, Any]) -> None:
        """Show one line."""
        digest, status = line.get("digest"), str(line.get("status", ""))
        if digest is None:
            self.progress.console.print(Text(status))
            return
        if digest not in self._layers:
            self._layers[digest] = self.progress.add_task(status, total=line.get("total"))
        self.progress.update(self._layers[digest], completed=line.get("completed", 0))
