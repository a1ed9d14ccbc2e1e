"""When this machine serves, by the week: `mon-fri 18:00-08:00, sat-sun`.

Times are those of the wall clock, so that a change to or from summer time moves nothing: a time
that is left out begins with the next one, and one that comes twice counts twice.
"""

from datetime import datetime, timedelta
from itertools import product

from msgspec import Struct

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY_MINUTES = 24 * 60
EXAMPLE = "give days and times such as mon-fri 18:00-08:00, sat-sun"


class Window(Struct, frozen=True):
    """A time of some days, in minutes; one that ends before it begins ends on the next day."""

    days: frozenset[int]
    begins: int = 0
    ends: int = DAY_MINUTES

    def holds(self, weekday: int, minute: int) -> bool:
        """Whether a minute of a day (Monday is 0) is inside."""
        if self.begins < self.ends:
            return weekday in self.days and self.begins <= minute < self.ends
        began_today = weekday in self.days and minute >= self.begins
        return began_today or ((weekday - 1) % 7 in self.days and minute < self.ends)


class Schedule(Struct, frozen=True):
    """The times at which a machine serves."""

    windows: tuple[Window, ...]

    @classmethod
    def parse(cls, text: str) -> "Schedule":
        """The schedule of a text: days, a time, or both, split by commas.

        Raises:
            ValueError: it is none; the sentence says what to give.
        """
        return cls(tuple(_window(part.split()) for part in text.lower().split(",")))

    def is_open(self, at: datetime) -> bool:
        """Whether it serves at a time of the wall clock."""
        minute = at.hour * 60 + at.minute
        return any(window.holds(at.weekday(), minute) for window in self.windows)

    def opens(self, at: datetime) -> datetime:
        """When it serves next, where it does not at this time of the wall clock."""
        midnight = at.replace(hour=0, minute=0, second=0, microsecond=0)
        days = (midnight + timedelta(days=number) for number in range(8))
        begins = (
            day + timedelta(minutes=window.begins)
            for day, window in product(days, self.windows)
            if day.weekday() in window.days
        )
        return min(begin for begin in begins if begin > at)


def _window(words: list[str]) -> Window:
    match words:
        case [word] if ":" in word:
            return Window(frozenset(range(7)), *_times(word))
        case [word]:
            return Window(_days(word))
        case [days, times]:
            return Window(_days(days), *_times(times))
    raise ValueError(f"{' '.join(words) or 'nothing'} is no time; {EXAMPLE}")


def _days(word: str) -> frozenset[int]:
    """The days of `mon` or `fri-mon`."""
    first, _, last = word.partition("-")
    if first not in DAYS or (last or first) not in DAYS:
        raise ValueError(f"{word} is no day; {EXAMPLE}")
    begin, end = DAYS.index(first), DAYS.index(last or first)
    return frozenset((begin + number) % 7 for number in range((end - begin) % 7 + 1))


def _times(word: str) -> tuple[int, int]:
    begin, _, end = word.partition("-")
    return _minute(begin) % DAY_MINUTES, _minute(end)


def _minute(word: str) -> int:
    hour, _, minute = word.partition(":")
    if not (hour.isdecimal() and minute.isdecimal() and len(minute) == 2 and len(hour) <= 2):
        raise ValueError(f"{word or 'nothing'} is no time of day; {EXAMPLE}")
    total = int(hour) * 60 + int(minute)
    if int(minute) > 59 or total > DAY_MINUTES:
        raise ValueError(f"{word} is no time of day; {EXAMPLE}")
    return total
