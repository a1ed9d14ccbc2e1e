"""How the fleet and its requests look in a terminal. Names are shown as they are, markup or not."""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

Row = dict[str, Any]

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
ORDER = ("writing", "reading", "loading", "waiting")
BAR_WIDTH = 12
GIBIBYTE = 2**30


def screen(state: Row, problem: str | None, now: datetime, height: int | None) -> RenderableType:
    """The whole picture; `height` lines at most are used for agents and requests together."""
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
    speed = (fleet.get("pulse") or [0, 0])[1]
    text = Text.assemble(
        (f"{online}/{fleet.get('agents', 0)}", "bold"), " online   ",
        (f"{fleet.get('in_flight', 0)}", "bold"), " in flight   ",
        (f"{fleet.get('waiting', 0)}", "bold"), " waiting   ",
        (f"{speed:.0f}", "bold"), " tokens/s",
    )  # fmt: skip
    if problem:
        text.append(f"   reconnecting: {problem}", "bold red")
    return text


def _table(*columns: str, right: Iterable[str] = ()) -> Table:
    made = Table(box=None, pad_edge=False, header_style="bold", expand=True)
    for column in columns:
        justify = "right" if column in right else "left"
        made.add_column(column, justify=justify, no_wrap=True, overflow="ellipsis")  # type: ignore[arg-type]
    return made


def _agents(agents: Iterable[Row]) -> Table:
    right = ("CPU", "GPU", "PLACES", "TOK/S")
    made = _table(
        "AGENT", "STATE", "MEMORY", "CPU", "GPU", "PLACES", "TOK/S", "LOADED", right=right
    )
    for agent in agents:
        loaded = ", ".join(_short(model["name"]) for model in agent["loaded_models"])
        made.add_row(
            Text(agent["name"]),
            _state(agent["state"]),
            _memory(agent),
            _percent(agent.get("cpu_usage")),
            _percent(_mean(gpu.get("utilization_percent") for gpu in agent["gpus"])),
            f"{agent['in_flight']}/{max(agent['slots'], agent['in_flight'])}",
            f"{agent['pulse'][1]:.0f}",
            Text(loaded),
        )
    return made


def _requests(requests: Iterable[Row], now: datetime) -> Table:
    right = ("PLACE", "TOKENS", "TOK/S", "ELAPSED")
    columns = ("MODEL", "STATE", "AGENT", "PLACE", "TOKENS", "TOK/S", "ELAPSED", "CLIENT")
    made = _table(*columns, right=right)
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
    told = f" {used / GIBIBYTE:.0f}/{total / GIBIBYTE:.0f} GiB"
    return Text.assemble(("█" * full, "blue"), ("░" * (BAR_WIDTH - full), "dim"), told)


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
