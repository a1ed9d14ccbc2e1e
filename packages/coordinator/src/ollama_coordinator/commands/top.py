"""`top`: the agents and requests of the dashboard in a terminal, live, and what keys do there.

It follows the dashboard's event stream: a snapshot, then its differences. Names are shown as they
are, never as markup.
"""

import asyncio
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any
from urllib.parse import quote

import aiohttp
import msgspec
import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ollama_coordinator_common.network import cause_of
from ollama_coordinator_common.printable import all_printable

from .client import CONNECT_SECONDS, Client, NoAnswer, asks
from .keyboard import Keyboard
from .operate import reasons
from .tables import table

Row = dict[str, Any]

ROOMY = 96
"""Columns in which a list has room for bars and for what is loaded."""

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
    "paused": ("‖ paused", "yellow"),
    "asleep": ("☾ asleep", "cyan"),
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

ENDED_SHOWN = 40
"""Of the requests that ended, as many as any terminal has lines."""

BAR_WIDTH = 12
"""Characters of the bar of memory."""

GIBIBYTE = 2**30

SIDE_BY_SIDE = 130
"""Columns of a terminal with room for a second column: the reasons, or what has just ended."""

HELP = "↑↓ select   w why   c cancel   s sort requests   a sort agents   / filter   q quit"

BY_AGENT: Mapping[str, Callable[[Row], Any]] = {
    "name": lambda agent: agent["name"],
    "in flight": lambda agent: -agent["in_flight"],
    "tokens/s": lambda agent: -agent["sparkline"][1],
    "CPU": lambda agent: -(agent.get("cpu_usage") or 0),
}
BY_REQUEST: Mapping[str, Callable[[Row], Any]] = {
    "state": lambda request: _by_state(request),
    "oldest first": lambda request: request["arrived_at"],
    "most tokens": lambda request: -request.get("tokens", 0),
    "model": lambda request: request["model"],
}
"""The orders, in the order in which a key goes through them."""


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
                self.problem = f"the coordinator does not answer: {cause_of(exc)}"
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
    """Show the fleet and its requests, live; q or Ctrl-C ends it."""
    console = Console()
    follower = Follower(client)
    if once or not sys.stdout.isatty():
        await _print_once(follower, console, client.url)
    else:
        await _live(follower, console, client)


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
                    view = View(width=console.width)
                    console.print(screen(state, None, datetime.now(UTC), None, view))
                    return
    except TimeoutError as exc:
        raise NoAnswer(f"the coordinator at {url} sends no snapshot") from exc


async def _live(follower: Follower, console: Console, client: Client) -> None:
    """Draw at a steady pace, and after each key, whatever the stream does."""
    view = View(footer=HELP)
    with Keyboard() as keyboard, Live(console=console, screen=True, auto_refresh=False) as live:
        following = asyncio.create_task(_keep_up(follower))
        try:
            while not view.ended:
                now, view.width = datetime.now(UTC), console.width
                live.update(
                    screen(follower.state, follower.problem, now, console.height, view),
                    refresh=True,
                )
                key = await keyboard.key(1 / DRAWS_PER_SECOND)
                if key:
                    await _do(view, view.press(key, follower.state), client)
        finally:
            following.cancel()


async def _do(view: "View", wanted: tuple[str, str] | None, client: Client) -> None:
    """Ask the coordinator for what a key means; what goes wrong is said in the last line."""
    if wanted is None:
        return
    what, request_id = wanted
    path = f"/api/requests/{quote(request_id, safe='')}"
    try:
        if what == "cancel":
            await client.json("DELETE", path)
            view.note = f"cancelled {request_id}"
        else:
            view.why = await client.json("GET", path)
    except NoAnswer as exc:
        view.note = str(exc)


@dataclass
class View:
    """What keys have set: the order, the filter, the selected request, and what is asked.

    `why` is the answer about a request whose reasons are shown, `asking` the request that is
    cancelled if the next key is y. `footer` is the last line, if there is nothing to say.
    """

    width: int = 80
    footer: str = ""
    agents_by: str = "name"
    requests_by: str = "state"
    filter: str = ""
    typing: bool = False
    selected: str = ""
    asking: str = ""
    note: str = ""
    why: Row = field(default_factory=dict)
    ended: bool = False

    @property
    def list_width(self) -> int:
        """The columns that the lists have, where something stands beside them or not."""
        is_alone = self.width < SIDE_BY_SIDE or not (self.why or self.footer)
        return self.width if is_alone else self.width * 3 // 5

    def requests(self, state: Row) -> list[Row]:
        """The requests that the filter lets through, in order."""
        words = ("model", "client", "agent", "state")
        shown = [
            one
            for one in state.get("requests", {}).values()
            if any(self.filter in str(one.get(word, "")).lower() for word in words)
        ]
        return sorted(shown, key=lambda one: (BY_REQUEST[self.requests_by](one), one["id"]))

    def agents(self, state: Row) -> list[Row]:
        """The agents that the filter lets through, in order."""
        shown = [
            one
            for one in state.get("agents", {}).values()
            if self.filter in one["name"].lower()
            or any(self.filter in model["name"] for model in one["loaded_models"])
        ]
        return sorted(shown, key=lambda one: (BY_AGENT[self.agents_by](one), one["name"]))

    def press(self, key: str, state: Row) -> tuple[str, str] | None:
        """What a key means: a change of the view, or what to ask of which request."""
        self.note = ""
        if self.typing:
            self._typed(key)
            return None
        if self.asking:
            asked, self.asking = self.asking, ""
            return ("cancel", asked) if key in ("y", "Y") else None
        if key not in ("w", "enter", "c"):
            self._changed(key, state)
        elif not self.selected:
            self.note = "select a request with ↑ or ↓ first"
        elif key == "c":
            self.asking = self.selected
        else:
            return "why", self.selected
        return None

    def _changed(self, key: str, state: Row) -> None:
        match key:
            case "q" | "Q":
                self.ended = True
            case "s":
                self.requests_by = _next(BY_REQUEST, self.requests_by)
            case "a":
                self.agents_by = _next(BY_AGENT, self.agents_by)
            case "/":
                self.typing = True
            case "escape":
                self.why, self.selected, self.filter = {}, "", self.filter if self.why else ""
            case "up" | "k" | "down" | "j":
                self._select(1 if key in ("down", "j") else -1, state)

    def _typed(self, key: str) -> None:
        if key in ("enter", "escape"):
            self.typing = False
            self.filter = "" if key == "escape" else self.filter
        elif key == "backspace":
            self.filter = self.filter[:-1]
        elif len(key) == 1 and key.isprintable():
            self.filter += key.lower()

    def _select(self, step: int, state: Row) -> None:
        ids = [one["id"] for one in self.requests(state)]
        if not ids:
            self.selected = ""
        elif self.selected in ids:
            self.selected = ids[max(0, min(ids.index(self.selected) + step, len(ids) - 1))]
        else:
            self.selected = ids[0 if step > 0 else -1]

    def last_line(self) -> Text:
        """What is asked, typed or said; else what keys do."""
        if self.typing:
            return Text(f"filter: {self.filter}▏  Enter keeps it, Esc clears it", "yellow")
        if self.asking:
            return Text(f"Cancel request {self.asking}? y cancels it, any other key not", "red")
        kept = f"filter: {self.filter}   " if self.filter else ""
        return Text(self.note or kept + self.footer, "yellow" if self.note else "dim")


def _next(orders: Mapping[str, object], now: str) -> str:
    names = list(orders)
    return names[(names.index(now) + 1) % len(names)]


async def _keep_up(follower: Follower) -> None:
    async for _ in follower.follow():
        pass


def screen(
    state: Row,
    problem: str | None,
    now: datetime,
    height: int | None,
    view: View | None = None,
) -> RenderableType:
    """Agents and requests, together in at most `height` lines; `None` is no limit.

    A wide terminal has a second column: the reasons of a request, or what has just ended.
    """
    view = view or View(width=140)
    side = _side(state, view)
    if side is not None and view.width < SIDE_BY_SIDE and view.why:
        return Group(_summary(state.get("fleet", {}), problem), Text(), side, view.last_line())
    left = _lists(state, problem, now, height, view)
    if side is None or view.width < SIDE_BY_SIDE:
        return left
    grid = Table.grid(padding=(0, 2), expand=True)
    grid.add_column(ratio=3)
    grid.add_column(ratio=2)
    grid.add_row(left, side)
    return grid


def _side(state: Row, view: View) -> RenderableType | None:
    """What stands beside the lists, where there is room."""
    width = view.width if view.width < SIDE_BY_SIDE else view.width * 2 // 5 - 2
    if view.why:
        row = view.why
        head = Text(f"Request {row['id']}: {_short(row['model'])}, Esc closes this", "bold")
        return Group(head, Text(), reasons(row, width))
    over = sorted(state.get("finished", {}).values(), key=lambda one: one["finished_at"])
    if not over or not view.footer:
        return None
    right = ("FIRST", "TOK/S", "TOOK")
    made = table("JUST ENDED", "RESULT", "AGENT", *right, right=right, is_cut=True)
    _give_way(made, {"JUST ENDED": 1, "AGENT": 1})
    for one in reversed(over[-ENDED_SHOWN:]):
        first, speed = one.get("first_token_seconds"), one.get("tokens_per_second")
        made.add_row(
            Text(_short(one["model"])),
            Text(one["status"], "" if one["status"] == "served" else "red"),
            Text(one.get("agent") or "–"),
            "" if first is None else f"{first:.1f} s",
            "" if speed is None else f"{speed:.0f}",
            f"{one['total_seconds']:.1f} s",
        )
    return made


def _lists(
    state: Row, problem: str | None, now: datetime, height: int | None, view: View
) -> RenderableType:
    agents, requests = view.agents(state), view.requests(state)
    room = max(4, (height or 10_000) - 8 - bool(view.footer))
    shown = min(len(agents), max(2, room - min(len(requests), room // 2)))
    parts: list[RenderableType] = [_summary(state.get("fleet", {}), problem)]
    if agents:
        parts += [_agents(agents[:shown], view), _more(len(agents) - shown)]
    elif view.filter:
        parts.append(Text(f"No agent matches {view.filter}.", "yellow"))
    elif not problem:
        command = "COORDINATOR_URL=http://THIS-HOST:PORT ollama-coordinator-agent run"
        parts.append(Text(f"No agent yet. On a machine with Ollama: {command}", "yellow"))
    rest = max(2, room - shown)
    more = _more(len(requests) - rest)
    parts += [Text(), _requests(requests[:rest], now, view), more]
    return Group(*parts, *([view.last_line()] if view.footer else ()))


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


def _agents(agents: Iterable[Row], view: View) -> Table:
    right = ("CPU", "GPU", "SLOTS", "TOK/S")
    is_narrow = view.list_width < ROOMY
    last = () if is_narrow else ("LOADED",)
    made = table("AGENT", "STATE", "MEMORY", *right, *last, right=right, is_cut=True)
    made.caption, made.caption_justify = _ordered(view.agents_by, "name"), "left"
    _give_way(made, {"AGENT": 3, "LOADED": 2})
    for agent in agents:
        loaded = ", ".join(_short(model["name"]) for model in agent["loaded_models"])
        made.add_row(
            Text(agent["name"]),
            _state(agent["state"]),
            _memory(agent, 0 if is_narrow else BAR_WIDTH),
            _percent(agent.get("cpu_usage")),
            _percent(_mean(gpu.get("utilization_percent") for gpu in agent["gpus"])),
            f"{agent['in_flight']}/{max(agent['slots'], agent['in_flight'])}",
            f"{agent['sparkline'][1]:.0f}",
            *(Text(loaded) for _ in last),
        )
    return made


def _give_way(made: Table, shares: Mapping[str, int]) -> None:
    """Columns of names share what the others leave: no number is cut for a long name."""
    for column in made.columns:
        column.ratio = shares.get(str(column.header))


def _ordered(by: str, usual: str) -> str | None:
    return None if by == usual else f"sorted by {by}"


def _requests(requests: Iterable[Row], now: datetime, view: View) -> Table:
    right = ("NEXT", "TOKENS", "TOK/S", "ELAPSED")
    made = table("MODEL", "STATE", "AGENT", *right, "CLIENT", right=right, is_cut=True)
    made.caption, made.caption_justify = _ordered(view.requests_by, "state"), "left"
    _give_way(made, {"MODEL": 3, "AGENT": 3, "CLIENT": 2})
    for request in requests:
        began = request.get("first_byte_at")
        tokens = request.get("tokens", 0)
        speed = tokens / max(_since(began, now), 0.2) if began and tokens else None
        made.add_row(
            Text(_short(request["model"])),
            _state(request["state"]),
            Text(request.get("agent", "")),
            _next_step(request, now),
            str(tokens or ""),
            "" if speed is None else f"{speed:.0f}",
            f"{_since(request['arrived_at'], now):.0f} s",
            Text(request["client"]),
            style="reverse" if request["id"] == view.selected else "",
        )
    return made


def _next_step(request: Row, now: datetime) -> str:
    """Its place in the queue, or when an answer in one piece is expected to end."""
    if request.get("waits_for"):
        return f"wakes {request['waits_for']}"
    if request["state"] == "waiting" and request.get("position"):
        return f"#{request['position']}"
    if request["state"] != "writing" or not request.get("ends_at"):
        return ""
    ends_at = datetime.fromisoformat(request["ends_at"]).astimezone(UTC)
    return f"~{max(0.0, (ends_at - now).total_seconds()):.0f} s"


def _memory(agent: Row, bar: int) -> Text:
    gpus = [gpu for gpu in agent["gpus"] if gpu.get("memory_total_bytes")]
    total = sum(gpu["memory_total_bytes"] for gpu in gpus) or agent.get("memory_total_bytes", 0)
    total = agent.get("by_hand", {}).get("memory_bytes") or total
    if not total:
        return Text("–", "dim")
    used = sum(gpu.get("memory_used_bytes", 0) for gpu in gpus)
    if not gpus:
        used = agent.get("memory_usage", 0) / 100 * total
    full = min(bar, round(bar * used / total))
    figures = f"{' ' if bar else ''}{used / GIBIBYTE:.0f}/{total / GIBIBYTE:.0f} GiB"
    return Text.assemble(("█" * full, "blue"), ("░" * (bar - full), "dim"), figures)


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
