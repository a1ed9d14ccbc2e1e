"""`agents`: the fleet's machines from the command line."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .client import connected, finished
from .models import DEFAULT, Coordinator
from .showing import table

COLOURS = {"online": "green", "offline": "red", "draining": "yellow"}


def agents(coordinator: Coordinator = DEFAULT) -> None:
    """List every agent, how it is, and what it does."""

    async def work() -> None:
        async with connected(coordinator) as client:
            listed = await client.json("GET", "/api/agents")
        Console().print(_table(listed))

    finished(work())


def _table(listed: Iterable[Mapping[str, Any]]) -> Table:
    made = table("NAME", "STATUS", "IN FLIGHT", "LOADED", "ON DISK", "OLLAMA", "URL", "ID")
    for agent in listed:
        # As texts, not as markup: a machine may be called anything.
        told = (
            Text(agent["display_name"] or agent["machine_name"]),
            _status(agent),
            Text(str(agent["in_flight"])),
            Text(", ".join(agent["loaded_models"]) or "-"),
            Text(str(len(agent["models"]))),
            Text(agent["ollama_version"]),
            Text(agent["url"]),
            Text(agent["id"]),
        )
        made.add_row(*told)
    return made


def _status(agent: Mapping[str, Any]) -> Text:
    status = str(agent["status"])
    if agent.get("conflict"):
        return Text(f"{status}; {agent['conflict']}", "red")
    if status != "offline" and agent["out_of_rotation"]:
        return Text(f"out of rotation: {agent['out_of_rotation']}", "red")
    return Text(status, COLOURS[status])
