"""Traces, and the simulated fleet on which they are played."""

import pytest

from ollama_coordinator.registry import Registry
from ollama_coordinator.scheduler import POLICIES, Kind, Lane, RunnerOptions, create_scheduler
from ollama_coordinator.simulation import (
    Fleet,
    MachineSpec,
    ModelSpec,
    Replay,
    Simulation,
    TraceRequest,
    read_trace,
    summarise,
    write_trace,
)

SMALL, LARGE = ModelSpec("small", 2_000_000_000), ModelSpec("large", 9_000_000_000)
FLEET = Fleet(
    machines=tuple(
        MachineSpec(name=f"agent-{number}", models=(SMALL, LARGE), memory_bytes=13_000_000_000)
        for number in range(2)
    )
)
TRACE = [
    TraceRequest(
        at=0.7 * number,
        model=("small", "large")[number % 3 == 0],
        client=f"client-{number % 4}",
        prompt_tokens=50 + 10 * (number % 7),
        output_tokens=20 + 5 * (number % 11),
        prefix=(number % 5,),
    )
    for number in range(60)
]


def play(policy: str) -> Replay:
    def create(registry: Registry) -> object:
        return create_scheduler(policy, registry, max_queue=1000)

    return Simulation(FLEET, create).run(TRACE)  # type: ignore[arg-type]


@pytest.mark.spec("SCHED-72")
def test_a_trace_reads_back_as_it_was_written() -> None:
    special = TraceRequest(
        at=0.1, model="m", kind=Kind.EMBED, lane=Lane.BATCH, output_limit=7,
        options=RunnerOptions(num_ctx=8192), deadline_seconds=3.0, prefix=(1, 2),
    )  # fmt: skip
    written = write_trace([*TRACE, special])
    assert read_trace(written.splitlines()) == sorted(
        [*TRACE, special], key=lambda request: request.at
    )


@pytest.mark.spec("SCHED-73")
@pytest.mark.parametrize("policy", POLICIES)
def test_a_replay_repeats_itself_under_every_policy(policy: str) -> None:
    one, two = play(policy), play(policy)
    assert one.records == two.records
    assert one.loads == two.loads
    assert all(record.ended_at is not None for record in one.records)


@pytest.mark.spec("SCHED-73")
def test_a_summary_counts_what_came_after_the_warm_up() -> None:
    replay = play("predicted")
    whole, later = summarise(replay, FLEET), summarise(replay, FLEET, after=20.0)
    assert whole.p50 <= whole.p95 <= whole.p99
    assert 0.0 <= later.goodput <= 1.0
    assert whole.slow_down >= 1.0
    assert whole.loads_per_hour == pytest.approx(replay.loads * 3600 / replay.seconds)
