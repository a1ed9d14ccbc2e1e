"""What became of the requests of a replay: felt delays, times to the first token, loads."""

from collections.abc import Sequence
from dataclasses import dataclass

from msgspec import Struct

from ollama_coordinator.scheduler.types import Form, Lane

from .machine import Fleet
from .trace import TraceRequest

CLIENT_TIMEOUT_SECONDS = 120.0  # A client that has heard nothing for so long leaves


class Record(Struct, kw_only=True):
    """What became of one request of a trace."""

    request: TraceRequest
    number: int
    agent: str | None = None
    granted_at: float | None = None
    first_token_at: float | None = None
    ended_at: float | None = None
    lag: float = 0.0
    attempts: int = 0
    left: bool = False
    error: str | None = None

    @property
    def first_token_seconds(self) -> float | None:
        """Time to the first token, from the arrival."""
        return None if self.first_token_at is None else self.first_token_at - self.request.at

    @property
    def end_seconds(self) -> float:
        """Time to the end of the answer, from the arrival; one that has none counts as 120 s."""
        return CLIENT_TIMEOUT_SECONDS if self.ended_at is None else self.ended_at - self.request.at

    @property
    def felt_seconds(self) -> float:
        """How late the answer was for its receiver.

        Of a stream the largest, over its tokens i, of (arrival of token i − i/pace), from the
        request's arrival: how far it fell behind its reader. Of every other answer its end.
        """
        reads_along = self.request.form is Form.STREAM and self.request.lane is Lane.INTERACTIVE
        if reads_along and self.ended_at is not None:
            return self.lag
        return self.end_seconds


@dataclass(slots=True)
class Replay:
    """What a replay showed; times in seconds."""

    records: list[Record]
    loads: int
    seconds: float
    busy_seconds: float
    most_in_flight: int = 0


IN_TIME_SECONDS = 10.0  # people leave a chat that shows nothing for so long


class Summary(Struct, frozen=True):
    """Interactive requests: seconds to the first token; one that never came counts as 120 s.

    `goodput` is the share of interactive requests whose first token came within 10 s, and
    `slow_down` the mean of whole time over the time on the fastest machine with nothing to wait
    for. `loads_per_hour` counts all model loads.

    `felt` is the mean of the felt delay (see `Record`), `end` the mean time to the end of
    interactive answers that are of use only when they are whole, `batch_end` that of batch.
    """

    requests: int
    mean: float
    p50: float
    p95: float
    p99: float
    goodput: float
    slow_down: float
    loads_per_hour: float
    failed: int
    batch_p95: float
    embedding_p95: float
    felt: float
    felt_p50: float
    felt_p95: float
    end: float
    batch_end: float


def summarise(replay: Replay, fleet: Fleet, *, after: float = 0.0) -> Summary:
    """The figures of one replay, of the requests that came `after` that time."""
    lanes: dict[Lane, list[Record]] = {lane: [] for lane in Lane}
    for record in replay.records:
        if record.request.at >= after:
            lanes[record.request.lane].append(record)
    times = sorted(_first_token(record) for record in lanes[Lane.INTERACTIVE])
    felt = sorted(record.felt_seconds for record in lanes[Lane.INTERACTIVE])
    wholes = [one for one in lanes[Lane.INTERACTIVE] if one.request.form is not Form.STREAM]
    return Summary(
        requests=len(replay.records),
        mean=_mean(times),
        p50=percentile(times, 0.5),
        p95=percentile(times, 0.95),
        p99=percentile(times, 0.99),
        goodput=sum(time <= IN_TIME_SECONDS for time in times) / max(len(times), 1),
        slow_down=_slow_down(lanes[Lane.INTERACTIVE], fleet),
        loads_per_hour=replay.loads * 3600 / replay.seconds,
        failed=sum(record.error is not None for record in replay.records),
        batch_p95=percentile(sorted(map(_first_token, lanes[Lane.BATCH])), 0.95),
        embedding_p95=percentile(sorted(map(_first_token, lanes[Lane.EMBEDDING])), 0.95),
        felt=_mean(felt),
        felt_p50=percentile(felt, 0.5),
        felt_p95=percentile(felt, 0.95),
        end=_mean([record.end_seconds for record in wholes]),
        batch_end=_mean([record.end_seconds for record in lanes[Lane.BATCH]]),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value that this share of an ordered sequence does not exceed."""
    if not ordered:
        return 0.0
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def _first_token(record: Record) -> float:
    seconds = record.first_token_seconds
    return CLIENT_TIMEOUT_SECONDS if seconds is None else seconds


def _slow_down(records: Sequence[Record], fleet: Fleet) -> float:
    ideal = _ideals(fleet)
    ratios = [
        (record.ended_at - record.request.at) / max(_alone(record, ideal), 1e-3)
        for record in records
        if record.ended_at is not None
    ]
    return sum(ratios) / max(len(ratios), 1)


def _ideals(fleet: Fleet) -> dict[str, tuple[float, float]]:
    """The fewest seconds per token read and written, by model."""
    best: dict[str, tuple[float, float]] = {}
    for machine in fleet.machines:
        for model in machine.models:
            read, write = machine.prefill_seconds(model, 1), machine.decode_seconds(model, 1)
            known = best.get(model.name, (read, write))
            best[model.name] = (min(known[0], read), min(known[1], write))
    return best


def _alone(record: Record, ideal: dict[str, tuple[float, float]]) -> float:
    read, write = ideal[record.request.model]
    return record.request.prompt_tokens * read + record.request.output_tokens * write
