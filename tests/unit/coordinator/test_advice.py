"""What one more replica, or a load, would have saved of the recorded waiting."""

import asyncio
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_coordinator.aio import Slices
from ollama_coordinator.journal.advice import Asked, Gaps, Saved, played
from ollama_coordinator.scheduler import Prospect

THERE = Prospect(load=4.0, prefill=0.0, decode=0.01, is_measured=True, fits=True)
SECONDS = 10.0


def queue(count: int, *, load: float = 0.0) -> list[Asked]:
    """So many at once on one agent with one slot, ten seconds each, 100 tokens."""
    return [
        Asked(
            arrived=0.0,
            granted=SECONDS * number,
            ready=SECONDS * number + load,
            ended=SECONDS * (number + 1),
            agent_id="busy",
            served=True,
            prompt_tokens=0,
            output_tokens=100,
        )
        for number in range(count)
    ]


def saved(
    asked: list[Asked],
    busy: list[tuple[float, float]] | None = None,
    there: Prospect = THERE,
    resident_on: str | None = None,
) -> Saved:
    return asyncio.run(played(asked, Gaps(busy or []), there, Slices(), resident_on=resident_on))


@pytest.mark.spec("DASH-60")
def test_what_a_replica_takes_over_lets_the_others_move_up() -> None:
    # The first has its slot at once. The replica is loaded until 4 s and writes a second for each:
    # it begins the others at 4, 5 and 6 s, in place of 10, 20 and 30.
    assert saved(queue(4)) == Saved(60 - 15, 3)
    # A slower one ends the second at 4 + 12 s, in place of 20; the third then begins at 10.
    slow = Prospect(load=4.0, prefill=0.0, decode=0.12, is_measured=True, fits=True)
    assert saved(queue(3), there=slow) == Saved((10 - 4) + (20 - 10), 1)


@pytest.mark.spec("DASH-60")
def test_an_agent_helps_only_while_it_does_nothing_else() -> None:
    assert saved(queue(4), busy=[(0.0, 100.0)]) == Saved(0.0, 0)
    assert saved(queue(4), busy=[(0.0, 1.0), (5.5, 100.0)]) == Saved(0.0, 0)  # 4 + 1 s do not fit
    assert saved(queue(3), busy=[(0.0, 12.0)]).requests == 1  # the third, at 16 s in place of 20


@pytest.mark.spec("DASH-60")
def test_what_would_end_later_stays_and_loads_are_saved_by_a_model_in_memory() -> None:
    slow = Prospect(load=4.0, prefill=0.0, decode=10.0, is_measured=True, fits=True)
    assert saved(queue(4), there=slow) == Saved(0.0, 0)
    loaded = queue(1, load=8.0)
    assert saved(loaded, busy=[(0.0, 10.0)], resident_on="busy") == Saved(8.0, 0)
    assert saved(loaded, busy=[(0.0, 10.0)], resident_on="another") == Saved(0.0, 0)


@pytest.mark.spec("DASH-60")
def test_one_that_left_in_the_queue_would_have_been_served() -> None:
    left = Asked(0.0, 30.0, 30.0, 30.0, None, False, 0, 0)
    assert saved([left]) == Saved(26.0, 1)


REQUESTS = st.lists(
    st.tuples(st.floats(0, 1000), st.floats(0, 60), st.floats(0, 60), st.booleans()), max_size=40
)
BUSY = st.lists(st.tuples(st.floats(0, 1000), st.floats(0, 100)), max_size=20)


@pytest.mark.spec("DASH-60")
@given(REQUESTS, BUSY, st.booleans())
def test_nothing_is_saved_that_was_not_waited(
    requests: list[tuple[float, float, float, bool]],
    busy: list[tuple[float, float]],
    resident: bool,
) -> None:
    asked = sorted(
        (
            Asked(at, at + wait, at + wait, at + wait + run * served, "busy", served, 10, 10)
            for at, wait, run, served in requests
        ),
        key=lambda one: one.arrived,
    )
    intervals = [(at, at + seconds) for at, seconds in busy]
    waited = sum(one.ready - one.arrived for one in asked)
    found = saved(asked, intervals, resident_on="busy" if resident else None)
    assert -1e-6 <= found.seconds <= waited + 1e-6
    assert found.requests <= len(asked)
    if not resident:
        assert saved(asked, [(0.0, 2000.0)]).requests == 0 or waited > 1000


@given(BUSY, st.floats(0, 1200), st.floats(0, 50))
def test_a_gap_overlaps_nothing(busy: list[tuple[float, float]], at: float, seconds: float) -> None:
    intervals = [(start, start + length) for start, length in busy]
    start = Gaps(intervals).first(at, seconds)
    assert at <= start < inf
    assert not any(low < start + seconds and start < high for low, high in intervals if low < high)
