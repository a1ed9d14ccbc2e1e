"""The table that a terminal shows of an agent: live while it runs, once for `status`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from msgspec import Struct, structs
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ollama_coordinator_common.printable import printable
from ollama_coordinator_common.protocol import Finding
from ollama_coordinator_common.types import Gpu

from .metrics import Readings
from .ollama import ModelList
from .pacing import forever
from .watch import Facts

GIBIBYTE = 1024**3
REFRESH_SECONDS = 0.5
"""Between two drawings of the live table."""


class StatusView(Struct, frozen=True):
    """Everything the table shows; a `trouble` is a sentence for the operator."""

    machine_name: str
    coordinator_url: str
    ollama_url: str
    facts: Facts
    readings: Readings
    agent_id: str | None = None
    machine_id: str | None = None
    ip_address: str | None = None
    relay_port: int | None = None
    is_linked: bool = False
    active_requests: int = 0
    paused: str | None = None
    coordinator_trouble: str | None = None
    ollama_trouble: str | None = None


def plain(view: StatusView) -> dict[str, object]:
    """One view for scripts, with models by their names."""
    facts, shown = view.facts, structs.asdict(view)
    del shown["facts"]
    return shown | {
        "ollama_running": facts.is_running,
        "ollama_version": facts.version,
        "models": [name for name, *_ in facts.tags.models] if facts.tags else [],
        "loaded_models": [name for name, *_ in facts.ps.models] if facts.ps else [],
        "runner": facts.runner,
        "left_behind": facts.left_behind,
    }


def render(view: StatusView) -> RenderableType:
    """The table of one view."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in (*_identity(view), *_ollama(view), *_machine(view.readings)):
        value.plain = printable(value.plain)
        table.add_row(label, value)
    return Group(Text("Ollama Coordinator agent", style="bold cyan"), table)


def _identity(view: StatusView) -> list[tuple[str, Text]]:
    address = view.ip_address or "address not known yet"
    if view.relay_port:
        address += f", relayed on port {view.relay_port}"
    if view.is_linked:
        address += ", reached by its link"
    return [
        ("machine", Text(f"{view.machine_name} ({address})")),
        ("machine id", Text(view.machine_id or "none kept yet")),
        ("agent id", Text(view.agent_id or "none yet: never registered")),
        (
            "coordinator",
            _state(view.coordinator_url, "connected", view.coordinator_trouble),
        ),
    ]


def _ollama(view: StatusView) -> list[tuple[str, Text]]:
    facts = view.facts
    trouble = view.ollama_trouble
    if trouble is None and not facts.is_running:
        trouble = facts.presence.value
    found = f"{facts.presence.value}, version {facts.version or 'unknown'}"
    rows = [
        ("Ollama", _state(view.ollama_url, found, trouble)),
        ("on disk", Text(_names(facts.tags))),
        ("in memory", Text(_names(facts.ps))),
        ("requests", Text(f"{view.active_requests} in progress")),
    ]
    if view.paused:
        rows.append(("paused", Text(view.paused, "yellow")))
    if facts.runner:
        parallel = facts.runner.num_parallel or "automatic"
        rows.append(("slots", Text(f"{parallel} per loaded model")))
    return rows


def _state(url: str, good: str, trouble: str | None) -> Text:
    if trouble is None:
        return Text.assemble((good, "green"), f" at {url}")
    return Text.assemble((trouble, "red"), f" ({url})" if url not in trouble else "")


def _names(models: ModelList | None) -> str:
    if models is None:
        return "not known"
    names = models.names
    shown = ", ".join(names[:12])
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return f"{shown}{more}" or "none"


def _machine(readings: Readings) -> list[tuple[str, Text]]:
    total = readings.memory_total_bytes
    memory = f" of {total / GIBIBYTE:.1f} GiB" if total else ""
    rows = [
        ("CPU", _meter(readings.cpu_percent)),
        ("memory", _meter(readings.memory_percent).append(memory)),
    ]
    if readings.disk_free_bytes is not None:
        rows.append(("disk", Text(f"{readings.disk_free_bytes / GIBIBYTE:.1f} GiB free")))
    rows += [(f"GPU {gpu.index}", _gpu(gpu)) for gpu in readings.gpus]
    return rows if readings.gpus else [*rows, ("GPU", Text("none found"))]


def _gpu(gpu: Gpu) -> Text:
    text = Text() if gpu.utilization_percent is None else _meter(gpu.utilization_percent)
    text.append(f"  {gpu.name}")
    if gpu.memory_used_bytes is not None and gpu.memory_total_bytes is not None:
        used, total = gpu.memory_used_bytes / GIBIBYTE, gpu.memory_total_bytes / GIBIBYTE
        text.append(f"  {used:.1f} of {total:.1f} GiB")
    if gpu.temperature_celsius is not None:
        text.append(f"  {gpu.temperature_celsius:.0f} °C")
    return text


def _meter(percent: float) -> Text:
    filled = round(min(percent, 100.0) / 5)
    style = "red" if percent >= 90 else "yellow" if percent >= 70 else "green"
    bar = Text("━" * filled, style=style)
    return bar.append("─" * (20 - filled), style="dim").append(
        f" {percent:5.1f} %", style="default"
    )


LEVELS = {"ok": "green", "note": "cyan", "warning": "yellow", "failed": "red"}


def render_finding(finding: Finding) -> RenderableType:
    """One finding of the doctor, with what to do below it."""
    table = Table.grid(padding=(0, 2))
    table.add_column(width=7, no_wrap=True)
    table.add_column(width=11, no_wrap=True)
    table.add_column(overflow="fold")
    text = Text(printable(finding.text))
    if finding.remedy:
        text.append(f"\n→ {printable(finding.remedy)}", "bold")
    table.add_row(Text(finding.level, LEVELS[finding.level]), finding.check, text)
    return table


@contextmanager
def loading() -> Iterator[Callable[[str, int, int | None], None]]:
    """Bars of downloads in a terminal; elsewhere a line for each tenth."""
    screen = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, TimeRemainingColumn(), console=screen) as progress:

        def note(name: str, here: int, total: int | None) -> None:
            if screen.is_terminal:
                task = tasks.get(name)
                if task is None:
                    task = tasks[name] = progress.add_task(name, total=total)
                progress.update(task, completed=here, total=total)
            elif total and (tenth := 10 * here // total) > tasks.get(name, 0):
                tasks[name] = TaskID(tenth)
                screen.print(f"{name}: {10 * tenth} %", highlight=False)

        yield note


async def show(console: Console, view: Callable[[], StatusView]) -> None:
    """Keep the table at the bottom of the terminal until cancelled; log lines scroll above it."""
    with Live(console=console, auto_refresh=False) as live:

        async def redraw() -> float:
            live.update(render(view()), refresh=True)
            return REFRESH_SECONDS

        await forever(redraw)
