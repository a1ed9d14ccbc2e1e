"""Whether a machine serves now: its schedule, its owner, its battery, a game."""

from datetime import datetime
from math import inf

import pytest

from ollama_coordinator_agent.availability import (
    Availability,
    Signs,
    idle_of_ioreg,
    idle_of_logind,
)
from ollama_coordinator_agent.schedule import Schedule

MONDAY = datetime(2026, 11, 30, 12, 0)
AWAY = Signs(idle_seconds=1000.0, gpu_percent=0.0)
PRESENT = Signs(idle_seconds=3.0, gpu_percent=0.0)
GAME = Signs(idle_seconds=1000.0, gpu_percent=90.0)
SERVING = Signs(idle_seconds=1000.0, gpu_percent=None)


@pytest.mark.spec("AGENT-74")
def test_the_schedule_says_until_when_it_is_over() -> None:
    availability = Availability(Schedule.parse("mon-fri 18:00-08:00"), 0)
    assert availability.reason(MONDAY, 0.0, AWAY) == "outside its schedule until Mon 18:00"
    assert availability.reason(MONDAY.replace(hour=18), 0.0, PRESENT) is None


@pytest.mark.spec("AGENT-75")
def test_an_owner_who_comes_and_goes() -> None:
    availability = Availability(None, 300)
    assert availability.reason(MONDAY, 0.0, AWAY) is None
    assert availability.reason(MONDAY, 5.0, PRESENT) == "somebody uses it"
    assert availability.reason(MONDAY, 10.0, Signs(idle_seconds=299.0)) == "somebody uses it"
    assert availability.reason(MONDAY, 15.0, Signs(idle_seconds=300.0)) is None
    assert availability.reason(MONDAY, 20.0, Signs()) is None  # the system does not tell


@pytest.mark.spec("AGENT-75")
def test_it_does_not_serve_from_its_battery() -> None:
    availability = Availability(None, 300)
    away = Signs(idle_seconds=1000.0, on_battery=True)
    assert availability.reason(MONDAY, 0.0, away) == "it runs on its battery"


@pytest.mark.spec("AGENT-75")
def test_a_game_keeps_it_until_the_gpu_was_idle_long_enough() -> None:
    availability = Availability(None, 300)
    assert availability.reason(MONDAY, 0.0, GAME) is None  # one reading may be an answer's end
    assert availability.reason(MONDAY, 5.0, GAME) == "another program uses its GPU"
    assert availability.reason(MONDAY, 304.0, AWAY) == "another program uses its GPU"
    assert availability.reason(MONDAY, 305.0, AWAY) is None


@pytest.mark.spec("AGENT-75")
def test_the_load_of_our_own_requests_is_no_game() -> None:
    availability = Availability(None, 300)
    for seconds in range(0, 100, 5):
        assert availability.reason(MONDAY, float(seconds), SERVING) is None
    assert availability.reason(MONDAY, 100.0, GAME) is None
    assert availability.reason(MONDAY, 105.0, AWAY) is None
    assert availability.reason(MONDAY, 110.0, GAME) is None


@pytest.mark.spec("AGENT-75")
def test_a_machine_that_need_not_be_idle_serves_its_owner_or_not() -> None:
    availability = Availability(None, 0)
    assert not availability.is_limited
    assert availability.reason(MONDAY, 0.0, Signs(0.0, on_battery=True)) is None


@pytest.mark.spec("AGENT-75")
def test_what_the_systems_tell_of_the_last_input() -> None:
    assert idle_of_logind("IdleHint=no\nIdleSinceHint=0\n", 100.0) == 0.0
    assert idle_of_logind("IdleHint=yes\nIdleSinceHint=40000000\n", 100.0) == 60.0
    assert idle_of_logind("IdleHint=yes\nIdleSinceHint=0\n", 100.0) == inf
    assert idle_of_logind("", 100.0) is None
    row = '  | |   "HIDIdleTime" = 2500000000\n'
    assert idle_of_ioreg(f'  | |   "HIDKind" = "x"\n{row}') == 2.5
    assert idle_of_ioreg("") is None
