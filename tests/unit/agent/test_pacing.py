"""Back-off, reminders, and loops that outlive their errors."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_coordinator_agent import pacing
from ollama_coordinator_agent.pacing import Backoff, Reminder, forever
from support.deadline import DEADLINE_SECONDS


@pytest.mark.spec("AGENT-6")
@given(
    first=st.floats(0.01, 10),
    factor=st.floats(1, 1000),
    chances=st.lists(st.floats(0, 1), min_size=1, max_size=100),
)
def test_each_delay_is_between_half_and_all_of_a_step_that_doubles_to_the_ceiling(
    first: float, factor: float, chances: list[float]
) -> None:
    ceiling = first * factor
    rolls = iter(chances)
    backoff = Backoff(first, ceiling, chance=lambda: next(rolls))
    for failure, _ in enumerate(chances):
        step = min(ceiling, first * 2.0**failure)
        assert step * 0.499 <= backoff.next() <= step * 1.001


@pytest.mark.spec("AGENT-6")
def test_a_success_starts_over() -> None:
    backoff = Backoff(1, 60, chance=lambda: 1.0)
    assert [backoff.next() for _ in range(4)] == [1, 2, 4, 8]
    backoff.reset()
    assert backoff.next() == 1


@pytest.mark.spec("AGENT-6")
def test_ten_thousand_failures_do_not_overflow() -> None:
    backoff = Backoff(1, 60, chance=lambda: 1.0)
    assert {backoff.next() for _ in range(10_000)} == {1, 2, 4, 8, 16, 32, 60}


@pytest.mark.spec("AGENT-17")
def test_a_lasting_trouble_is_told_at_doubling_distances() -> None:
    reminder = Reminder(first_seconds=10, ceiling_seconds=40)
    told = [now for now in range(200) if reminder.due("gone", now)]
    assert told == [0, 10, 30, 70, 110, 150, 190]


@pytest.mark.spec("AGENT-17")
def test_another_trouble_is_told_at_once_and_its_end_too() -> None:
    reminder = Reminder()
    assert reminder.due("refused", 0)
    assert reminder.due("timed out", 1)
    assert not reminder.due("timed out", 2)
    assert reminder.over()
    assert not reminder.over()
    assert reminder.due("timed out", 3)


@pytest.mark.spec("AGENT-18")
async def test_a_loop_outlives_its_errors(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pacing, "AFTER_A_BUG_SECONDS", 0.0)
    steps = 0
    went_on = asyncio.Event()

    async def step() -> float:
        nonlocal steps
        steps += 1
        if steps == 1:
            raise KeyError("a mistake of ours")
        went_on.set()
        return 0.0

    async with asyncio.timeout(DEADLINE_SECONDS), asyncio.TaskGroup() as tasks:
        loop = tasks.create_task(forever(step))
        await went_on.wait()
        loop.cancel()
    assert "a mistake of ours" in caplog.text
