"""When a machine serves: windows over midnight, days that change, summer time."""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from ollama_coordinator_agent.schedule import Schedule

BERLIN = ZoneInfo("Europe/Berlin")
NIGHTS = Schedule.parse("mon-fri 18:00-08:00, sat-sun")
MONDAY = datetime(2026, 11, 30)


def at(day: int, clock: str) -> datetime:
    """A time of the week that begins on a Monday."""
    hour, minute = map(int, clock.split(":"))
    return MONDAY + timedelta(days=day, hours=hour, minutes=minute)


@pytest.mark.spec("AGENT-74")
@pytest.mark.parametrize(
    ("day", "clock", "is_open"),
    [
        (0, "00:00", False),  # Sunday's window ended with Sunday
        (0, "17:59", False),
        (0, "18:00", True),
        (1, "07:59", True),
        (1, "08:00", False),
        (4, "23:59", True),
        (5, "00:00", True),
        (5, "12:00", True),
        (6, "23:59", True),
    ],
)
def test_a_window_over_midnight_belongs_to_the_day_on_which_it_begins(
    day: int, clock: str, is_open: bool
) -> None:
    assert NIGHTS.is_open(at(day, clock)) is is_open


@pytest.mark.spec("AGENT-74")
def test_fridays_night_goes_on_into_a_saturday_without_a_window_of_its_own() -> None:
    schedule = Schedule.parse("mon-fri 18:00-08:00")
    assert schedule.is_open(at(5, "07:59"))
    assert not schedule.is_open(at(5, "08:00"))
    assert schedule.opens(at(5, "08:00")) == at(7, "18:00")


@pytest.mark.spec("AGENT-74")
def test_days_and_times_stand_alone_and_ranges_go_over_the_end_of_the_week() -> None:
    daily = Schedule.parse("22:00-06:00")
    assert [daily.is_open(at(day, "23:00")) for day in range(7)] == [True] * 7
    assert daily.opens(at(3, "06:00")) == at(3, "22:00")
    weekend = Schedule.parse("FRI-MON 12:00-24:00")
    assert [weekend.is_open(at(day, "12:00")) for day in range(7)] == [
        True, False, False, False, True, True, True,
    ]  # fmt: skip
    whole = Schedule.parse("sun 08:00-08:00")
    assert whole.is_open(at(6, "08:00"))
    assert whole.is_open(at(7, "07:59"))
    assert not whole.is_open(at(7, "08:00"))


@pytest.mark.spec("AGENT-74")
def test_when_it_opens_is_found_a_week_away() -> None:
    weekly = Schedule.parse("mon 09:00-10:00")
    assert weekly.opens(at(0, "10:00")) == at(7, "09:00")
    assert weekly.opens(at(0, "08:59")) == at(0, "09:00")


@pytest.mark.spec("AGENT-74")
def test_summer_time_moves_no_window() -> None:
    schedule = Schedule.parse("sun 02:30-03:30")
    spring = datetime(2026, 3, 29, 0, 55, tzinfo=UTC)  # 01:55 there; at 01:00 UTC it is 03:00
    walls = [(spring + timedelta(minutes=number)).astimezone(BERLIN) for number in (0, 5, 34, 35)]
    assert [f"{wall:%H:%M}" for wall in walls] == ["01:55", "03:00", "03:29", "03:30"]
    assert [schedule.is_open(wall) for wall in walls] == [False, True, True, False]
    autumn = datetime(2026, 10, 25, 0, 0, tzinfo=UTC)  # 02:00 there; 02:00 comes twice
    walls = [(autumn + timedelta(minutes=number)).astimezone(BERLIN) for number in (29, 30, 60, 90)]
    assert [f"{wall:%H:%M}" for wall in walls] == ["02:29", "02:30", "02:00", "02:30"]
    assert [schedule.is_open(wall) for wall in walls] == [False, True, False, True]


@pytest.mark.spec("AGENT-74")
@pytest.mark.parametrize(
    "text",
    [
        "", "mon-fre", "mon 8-18", "mon 08:00", "mon 08:00-25:00", "mon 08:60-09:00",
        "08:00-18:00 mon", "mon,,tue", "mon 08:00-18:00 UTC", "mon 24:30-01:00",
    ],
)  # fmt: skip
def test_what_is_no_schedule_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="mon-fri 18:00-08:00"):
        Schedule.parse(text)
