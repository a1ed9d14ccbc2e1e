"""`top`: the agents and requests of the dashboard in a terminal, live.

It follows the dashboard's event stream: a snapshot, then its differences. Names are shown as they
are, never as markup.
"""

import asyncio
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Annotated, Any

import aiohttp
import msgspec
import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ollama_coordinator_common.printable import all_printable

from .client import CONNECT_SECONDS, Client, NoAnswer, asks
from .tables import table

Row = dict[str, Any]

DRAWS_PER_SECOND = 4
"""Enough for a terminal, and little work over SSH."""

FIRST_SNAPSHOT_SECONDS = 5.0
"""How long `--once` waits for it."""

AGAIN_SECONDS = 1.0
"""The pause before a lost stream is asked for again."""

SILENCE_SECONDS = 40.0
"""The coordinator sends a beat every 15 seconds at least."""

LONGEST_LINE_BYTES = 64 * 1024 * 1024
"""A snapshot is one line: that of thousands of agents and requests has a few MiB."""

STATES = {
    "online": ("● online", "green"),
    "draining": ("▼ draining", "yellow"),
    "resting": ("▲ resting", "red"),
    "offline": ("○ offline", "dim"),
    "writing": ("writing", "green"),
    "reading": ("reading", "cyan"),
    "loading": ("loading", "cyan"),
    "waiting": ("waiting", "yellow"),
}
"""How the state of an agent or a request is written, and its colour."""

ORDER = ("writing", "reading", "loading", "waiting")
"""Requests in these states come first, in this order."""

BAR_WIDTH = 12
"""Characters of the bar of memory."""

GIBIBYTE = 2**30


class Follower:
    """Follows the event stream for ever; `state` is empty until the first snapshot.

    `problem` says why there is no stream just now.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._last_id = ""
        self.state: Row = {}
        self.problem: str | None = None

    async def follow(self) -> AsyncGenerator[Row, None]:
        """The state each time it changed, and when the stream is lost."""
        while True:
            try:
                async for _ in self._events():
                    self.problem = None
                    yield self.state
                self.problem = "the coordinator has stopped"
            except (aiohttp.ClientError, TimeoutError, ValueError) as exc:
                self.problem = str(exc) or "the coordinator does not answer"
            except NoAnswer as exc:
                self.problem = str(exc)
            yield self.state
            await asyncio.sleep(AGAIN_SECONDS)

    async def _events(self) -> AsyncIterator[None]:
        more: dict[str, Any] = {
            "headers": {"last-event-id": self._last_id} if self._last_id else {},
            "timeout": aiohttp.ClientTimeout(
                total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENCE_SECONDS
            ),
            "read_bufsize": LONGEST_LINE_BYTES,
        }
        async with self._client.answer("GET", "/dashboard/events", **more) as response:
            fields: dict[bytes, bytes] = {}
            async for line in response.content:
                name, _, value = line.rstrip(b"\r\n").partition(b": ")
                if name:
                    fields[name] = value
                    continue
                if b"event" in fields:
                    self._take(fields)
                    yield
                fields = {}

    def _take(self, fields: dict[bytes, bytes]) -> None:
        self._last_id = fields.get(b"id", self._last_id.encode()).decode()
        data = all_printable(msgspec.json.decode(fields.get(b"data", b"{}")))
        if fields.get(b"event") == b"snapshot":
            self.state = data["state"]
        elif fields.get(b"event") == b"patch":
            self.state = merged(self.state, data["patch"])


def merged(target: Any, change: Any) -> Any:
    """A state after a difference (a JSON merge patch, RFC 7396)."""
    if not isinstance(change, dict):
        return change
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in change.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result


Once = Annotated[bool, typer.Option("--once", help="Print one snapshot and end.")]


@asks
async def top(client: Client, once: Once = False) -> None:
    """Show the fleet and its requests, live; Ctrl-C ends it."""
    console = Console()
    follower = Follower(client)
    if once or not sys.stdout.isatty():
        await _print_once(follower, console, client.url)
    else:
        await _live(follower, console)


async def _print_once(follower: Follower, console: Console, url: str) -> None:
    try:
        async with (
            asyncio.timeout(FIRST_SNAPSHOT_SECONDS),
            aclosing(follower.follow()) as states,
        ):
            async for state in states:
                if follower.problem:
                    raise NoAnswer(follower.problem)
                if state:
                    console.print(screen(state, None, datetime.now(UTC), None))
                    return
    except TimeoutError as exc:
        raise NoAnswer(f"the coordinator at {url} sends no snapshot") from exc


async def _live(follower: Follower, console: Console) -> None:
    """Draw at a steady pace, whatever the stream does."""
    with Live(console=console, screen=True, auto_refresh=False) as live:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_keep_up(follower))
            while True:
                now = datetime.now(UTC)
                live.update(
                    screen(follower.state, follower.problem, now, console.height), refresh=True
                )
                await asyncio.sleep(1 / DRAWS_PER_SECOND)


async def _keep_up(follower: Follower) -> None:
    async for _ in follower.follow():
        pass


def screen(state: Row, problem: str | None, now: datetime, height: int | None) -> RenderableType:
    """Agents and requests, together in at most `height` lines; `None` is no limit."""
    agents = sorted(state.get("agents", {}).values(), key=lambda agent: agent["name"])
    requests = sorted(state.get("requests", {}).values(), key=_by_state)
    room = max(4, (height or 10_000) - 8)
    shown = min(len(agents), max(2, room - min(len(requests), room // 2)))
    parts: list[RenderableType] = [_summary(state.get("fleet", {}), problem)]
    if agents:
        parts += [_agents(agents[:shown]), _more(len(agents) - shown)]
    elif not problem:
        command = "COORDINATOR_URL=http://THIS-HOST:PORT ollama-coordinator-agent run"
        parts.append(Text(f"No agent yet. On a machine with Ollama: {command}", "yellow"))
    rest = max(2, room - shown)
    parts += [Text(), _requests(requests[:rest], now), _more(len(requests) - rest)]
    return Group(*parts)


def _summary(fleet: Row, problem: str | None) -> Text:
    online = fleet.get("states", {}).get("online", 0)
    speed = (fleet.get("sparkline") or [0, 0])[1]
    text = Text.assemble(
        (f"{online}/{fleet.get('agents', 0)}", "bold"), " online   ",
        (f"{fleet.get('in_flight', 0)}", "bold"), " in flight   ",
        (f"{fleet.get('waiting', 0)}", "bold"), " waiting   ",
        (f"{speed:.0f}", "bold"), " tokens/s",
    )  # fmt: skip
    if problem:
        text.append(f"   reconnecting: {problem}", "bold red")
    return text


def _agents(agents: Iterable[Row]) -> Table:
    right = ("CPU", "GPU", "PLACES", "TOK/S")
    made = table("AGENT", "STATE", "MEMORY", *right, "LOADED", right=right, is_cut=True)
    for agent in agents:
        loaded = ", ".join(_short(model["name"]) for model in agent["loaded_models"])
        made.add_row(
            Text(agent["name"]),
            _state(agent["state"]),
            _memory(agent),
            _percent(agent.get("cpu_usage")),
            _percent(_mean(gpu.get("utilization_percent") for gpu in agent["gpus"])),
            f"{agent['in_flight']}/{max(agent['slots'], agent['in_flight'])}",
            f"{agent['sparkline'][1]:.0f}",
            Text(loaded),
        )
    return made


def _requests(requests: Iterable[Row], now: datetime) -> Table:
    right = ("PLACE", "TOKENS", "TOK/S", "ELAPSED")
    made = table("MODEL", "STATE", "AGENT", *right, "CLIENT", right=right, is_cut=True)
    for request in requests:
        began = request.get("first_byte_at")
        tokens = request.get("tokens", 0)
        speed = tokens / max(_since(began, now), 0.2) if began and tokens else None
        made.add_row(
            Text(_short(request["model"])),
            _state(request["state"]),
            Text(request.get("agent", "")),
            str(request.get("position", "")),
            str(tokens or ""),
            "" if speed is None else f"{speed:.0f}",
            f"{_since(request['arrived_at'], now):.0f} s",
            Text(request["client"]),
        )
    return made


def _memory(agent: Row) -> Text:
    gpus = [gpu for gpu in agent["gpus"] if gpu.get("memory_total_bytes")]
    total = sum(gpu["memory_total_bytes"] for gpu in gpus) or agent.get("memory_total_bytes", 0)
    if not total:
        return Text("–", "dim")
    used = sum(gpu.get("memory_used_bytes", 0) for gpu in gpus)
    if not gpus:
        used = agent.get("memory_usage", 0) / 100 * total
    full = min(BAR_WIDTH, round(BAR_WIDTH * used / total))
    figures = f" {used / GIBIBYTE:.0f}/{total / GIBIBYTE:.0f} GiB"
    return Text.assemble(("█" * full, "blue"), ("░" * (BAR_WIDTH - full), "dim"), figures)


def _more(hidden: int) -> Text:
    return Text(f"and {hidden} more" if hidden > 0 else "", "dim")


def _state(state: str) -> Text:
    return Text(*STATES.get(state, (state, "")))


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f} %"


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _since(at: str, now: datetime) -> float:
    return max(0.0, (now - datetime.fromisoformat(at).astimezone(UTC)).total_seconds())


def _short(model: str) -> str:
    return model.removesuffix(":latest")


def _by_state(request: Row) -> tuple[int, int, str]:
    state = request["state"]
    rank = ORDER.index(state) if state in ORDER else len(ORDER)
    return rank, request.get("position", 0), request["arrived_at"]
