"""Two clocks and the way between them, and the lag of the event loop."""

import asyncio
import time
from datetime import UTC, datetime, timedelta
from math import inf

import pytest

from ollama_coordinator import clock as module
from ollama_coordinator.clock import Clock
from ollama_coordinator.link import LinkDown, Links
from ollama_coordinator_common.types import AgentId
from support.deadline import DEADLINE_SECONDS


class Machine:
    """The clocks of a machine, as a test sets them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.up = 1000.0
        self.wall = 1_790_000_000.0
        self.slept = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.up)
        monkeypatch.setattr(module, "uptime", lambda: self.up + self.slept)
        monkeypatch.setattr(time, "time", lambda: self.wall)

    def run(self, seconds: float) -> None:
        self.up += seconds
        self.wall += seconds


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_now_is_the_clock_of_the_event_loop() -> None:
    before = time.monotonic()
    assert before <= Clock().now() <= time.monotonic()


def test_a_reading_and_its_utc_time_are_translated_both_ways() -> None:
    clock = Clock()
    now = clock.now()
    assert abs(clock.utc(now) - datetime.now(UTC)) < timedelta(seconds=1)
    assert abs(clock.monotonic(clock.utc(now)) - now) < 0.001
    assert clock.utc(now).tzinfo is UTC


def test_the_translation_keeps_distances() -> None:
    clock = Clock()
    later = clock.utc(100.0) - clock.utc(40.0)
    assert abs(later - timedelta(seconds=60)) < timedelta(milliseconds=1)
    assert clock.monotonic(datetime(1990, 1, 1, tzinfo=UTC)) < 0


@pytest.mark.spec("FLEET-75")
def test_a_time_in_which_the_process_did_not_run_is_left_out(machine: Machine) -> None:
    clock = Clock()
    before = clock.now()
    machine.run(1.0)
    assert clock.now() == before + 1.0
    machine.run(70.0)
    assert clock.now() == before + 1.0
    assert clock.gaps == 1
    assert clock.has_lagged_since(before + 1.0)
    machine.run(1.5)
    assert clock.now() == before + 2.5
    assert not clock.has_lagged_since(before + 2.5)
    assert clock.utc(clock.now()).timestamp() == machine.wall
    assert clock.monotonic(clock.utc(clock.now())) == clock.now()
    assert clock.gaps == 1


@pytest.mark.spec("FLEET-75")
def test_a_sleep_that_the_monotonic_clock_does_not_show_is_a_gap(machine: Machine) -> None:
    clock = Clock()
    before = clock.now()
    machine.wall += 3600.0
    machine.slept += 3600.0
    assert clock.utc(before).timestamp() == machine.wall
    assert (clock.gaps, clock.now()) == (1, before)
    assert (clock.stepped_by, clock.stepped_at) == (0.0, -inf)


@pytest.mark.spec("OPERATION-50")
def test_a_wall_clock_that_is_set_counts_at_once_and_small_steps_do_not(machine: Machine) -> None:
    clock = Clock()
    now = clock.now()
    before = clock.utc(now)
    machine.wall += 0.4
    assert clock.utc(now) == before
    machine.wall += 86_400.0
    assert clock.utc(now).timestamp() == machine.wall
    assert clock.stepped_at == now
    assert clock.stepped_by == pytest.approx(86_400.4)
    assert clock.monotonic(before) == pytest.approx(now - 86_400.4)
    machine.wall -= 10 * 86_400.0
    assert clock.utc(now).timestamp() == machine.wall
    assert clock.stepped_by == pytest.approx(0.4 - 9 * 86_400.0)


@pytest.mark.spec("FLEET-76")
async def test_the_lag_of_the_event_loop_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(module, "LAG_SECONDS", 0.1)
    clock = Clock()
    with clock.watching():
        began = clock.now()
        time.sleep(0.2)  # noqa: ASYNC251 (it is what holds the loop up)
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not clock.has_lagged_since(began):
                await asyncio.sleep(0)
        now = clock.now()
    assert not clock.has_lagged_since(now + 0.001)


@pytest.mark.spec("OPERATION-35")
async def test_a_time_out_waits_for_what_came_while_the_process_did_not_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "GAP_SECONDS", 0.4)
    links = Links(clock := Clock())
    with clock.watching(), pytest.raises(LinkDown):
        await links.take(AgentId("a"), 0.1)
    with clock.watching():
        taken = asyncio.create_task(links.take(AgentId("a"), 1.0))
        await asyncio.sleep(0.1)
        time.sleep(2.0)  # noqa: ASYNC251 (it is what holds the loop up)
        await asyncio.sleep(0.2)
        assert not taken.done()
        with pytest.raises(LinkDown):
            await taken
