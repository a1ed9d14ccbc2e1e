"""From what clients saw to figures, and from the figures of several seeds to a table."""

from collections.abc import Callable, Sequence
from itertools import chain

from msgspec import Struct

from benchmarks.intervals import cell
from ollama_coordinator.scheduler import Lane
from ollama_coordinator.simulation.summary import IN_TIME_SECONDS, percentile

from .clients import CLIENT_TIMEOUT_SECONDS, ClientRecord

VALID_LAG_SECONDS = 0.05


class Figures(Struct, frozen=True):
    """One system under one trace, its warm-up left out; TTFT in the trace's seconds.

    `times` are those of all interactive requests, in order.
    """

    times: tuple[float, ...]
    requests: int
    mean: float
    p50: float
    p95: float
    p99: float
    in_time: float
    loads_per_hour: float
    gave_up: float
    errors: float
    batch_p95: float
    embedding_p95: float
    lag_seconds: float

    @property
    def is_valid(self) -> bool:
        """Whether clients and machines kept up, so that the seconds are the system's."""
        return self.lag_seconds <= VALID_LAG_SECONDS


def figures(
    everything: Sequence[ClientRecord],
    *,
    after: float,
    loads: int,
    seconds: float,
    lag_seconds: float,
) -> Figures:
    """Those of the requests that came `after` the warm-up; `loads` in the `seconds` since."""
    counted = [record for record in everything if record.request.at >= after]
    lanes = {lane: _times(counted, lane) for lane in Lane}
    times = lanes[Lane.INTERACTIVE]
    return Figures(
        times=tuple(times),
        requests=len(counted),
        mean=sum(times) / max(len(times), 1),
        p50=percentile(times, 0.5),
        p95=percentile(times, 0.95),
        p99=percentile(times, 0.99),
        in_time=sum(time <= IN_TIME_SECONDS for time in times) / max(len(times), 1),
        loads_per_hour=loads * 3600 / seconds,
        gave_up=sum(record.gave_up for record in counted),
        errors=sum(bool(record.error) for record in counted),
        batch_p95=percentile(lanes[Lane.BATCH], 0.95),
        embedding_p95=percentile(lanes[Lane.EMBEDDING], 0.95),
        lag_seconds=lag_seconds,
    )


def _times(counted: Sequence[ClientRecord], lane: Lane) -> list[float]:
    """In order; who got no token waited as long as anybody does."""
    return sorted(
        CLIENT_TIMEOUT_SECONDS if record.first_token is None else record.first_token
        for record in counted
        if record.request.lane is lane
    )


COLUMNS: tuple[tuple[str, Callable[[Figures], float], str], ...] = (
    ("mean TTFT s", lambda one: one.mean, ".2f"),
    ("p50", lambda one: one.p50, ".2f"),
    ("p95", lambda one: one.p95, ".1f"),
    ("p99", lambda one: one.p99, ".1f"),
    ("in 10 s %", lambda one: 100 * one.in_time, ".1f"),
    ("loads/h", lambda one: one.loads_per_hour, ".0f"),
    ("batch p95", lambda one: one.batch_p95, ".1f"),
    ("embed p95", lambda one: one.embedding_p95, ".2f"),
    ("gave up", lambda one: one.gave_up, ".1f"),
    ("errors", lambda one: one.errors, ".1f"),
    ("requests", lambda one: one.requests, ".0f"),
    ("lag p99 ms", lambda one: 1000 * one.lag_seconds, ".0f"),
)


def table(results: Sequence[tuple[str, Sequence[Figures]]]) -> str:
    """Markdown: means over the seeds ± half the width of the 95 % confidence interval."""
    lines = [
        "| system | " + " | ".join(title for title, _, _ in COLUMNS) + " |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    for name, runs in results:
        cells = [cell([value(one) for one in runs], form) for _, value, form in COLUMNS]
        mark = "" if all(one.is_valid for one in runs) else " (INVALID: lag)"
        lines.append(f"| {name}{mark} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def by_trace(seeds: Sequence[int], results: Sequence[tuple[str, Sequence[Figures]]]) -> str:
    """Markdown: the 95th percentile of each system on each trace, which all of them share.

    The last column is that of the requests of all traces taken together.
    """
    lines = ["| system | " + " | ".join(f"seed {seed}" for seed in seeds) + " | together |"]
    lines.append("|---|" + "---:|" * (len(seeds) + 1))
    for name, runs in results:
        together = percentile(sorted(chain.from_iterable(one.times for one in runs)), 0.95)
        cells = [f"{p95:.1f}" for p95 in (*(one.p95 for one in runs), together)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
