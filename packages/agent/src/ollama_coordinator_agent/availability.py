"""Whether this machine serves now: by its schedule, and only while nobody else needs it.

What the system tells without privileges counts: the last input, the battery, and the load of a GPU
while no request runs. `Availability` decides, and is given the time; `signs` asks the system.
"""

import platform
import subprocess
import sys
import time
from contextlib import suppress
from datetime import datetime
from math import inf

import psutil
from msgspec import Struct

from .schedule import Schedule

FOREIGN_LOAD_PERCENT = 25.0
"""A GPU's load by other programs: a game or a render takes more, a desktop with a film less."""

FOREIGN_READINGS = 2
"""So many in a row: the last tokens of an answer that has just ended are still in one."""

ASK_SECONDS = 2.0
"""How long a program of the system may take to answer."""


class Signs(Struct, frozen=True):
    """What the machine shows of its owner.

    `idle_seconds` is the time since the last input; `None` where the system does not tell it.
    `gpu_percent` is the load of the busiest GPU while no request runs, else `None`.
    """

    idle_seconds: float | None = None
    on_battery: bool = False
    gpu_percent: float | None = None


class Availability:
    """Why the machine does not serve now. `idle_after` is in seconds; 0: it need not be idle."""

    def __init__(self, schedule: Schedule | None, idle_after: float) -> None:
        self.is_limited = schedule is not None or idle_after > 0
        self._schedule = schedule
        self._idle_after = idle_after
        self._busy_readings = 0
        self._used_until = -inf

    def reason(self, wall: datetime, now: float, signs: Signs) -> str | None:
        """A clause for people at a time of the wall clock and in monotonic seconds.

        `None`: it serves.
        """
        self._note_gpu(signs.gpu_percent, now)
        if self._schedule is not None and not self._schedule.is_open(wall):
            return f"outside its schedule until {self._schedule.opens(wall):%a %H:%M}"
        if not self._idle_after:
            return None
        if signs.on_battery:
            return "it runs on its battery"
        if signs.idle_seconds is not None and signs.idle_seconds < self._idle_after:
            return "somebody uses it"
        if now < self._used_until:
            return "another program uses its GPU"
        return None

    def _note_gpu(self, percent: float | None, now: float) -> None:
        """A GPU's load while our requests run says nothing about others."""
        if percent is None:
            return
        self._busy_readings = self._busy_readings + 1 if percent >= FOREIGN_LOAD_PERCENT else 0
        if self._busy_readings >= FOREIGN_READINGS:
            self._used_until = now + self._idle_after


def signs(gpu_percent: float | None) -> Signs:
    """What the system shows now, with a GPU's load; it may take `ASK_SECONDS`."""
    return Signs(idle_seconds(), on_battery(), gpu_percent)


def on_battery() -> bool:
    """Whether the machine has a battery and runs on it."""
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    return battery is not None and battery.power_plugged is False


def idle_seconds() -> float | None:
    """The seconds since the last input; `None` where the system does not tell them."""
    match platform.system():
        case "Linux":
            return idle_of_logind(_output("loginctl", "show-session", *LOGIND), time.time())
        case "Darwin":
            return idle_of_ioreg(_output("ioreg", "-c", "IOHIDSystem", "-d", "4"))
        case "Windows":
            return _idle_of_windows()
    return None


LOGIND = ("--property=IdleHint", "--property=IdleSinceHint")


def idle_of_logind(text: str, now: float) -> float | None:
    """By `loginctl show-session` without a session: whether all are idle, and since when.

    The time is in microseconds since 1970. A desktop says that it is idle after its own delay, a
    terminal is idle since its last key.
    """
    facts = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    if "IdleHint" not in facts:
        return None
    if facts["IdleHint"] != "yes":
        return 0.0
    since = facts.get("IdleSinceHint", "")
    return max(now - int(since) / 1e6, 0.0) if since.isdecimal() and int(since) else inf


def idle_of_ioreg(text: str) -> float | None:
    """By the line `"HIDIdleTime" = NANOSECONDS` of macOS' registry of devices."""
    for line in text.splitlines():
        name, _, value = line.strip(" |").partition(" = ")
        if name == '"HIDIdleTime"' and value.isdecimal():
            return int(value) / 1e9
    return None


def _output(*command: str) -> str:
    """What a program prints; empty where it cannot be asked."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, timeout=ASK_SECONDS, check=True)  # noqa: S603
        return done.stdout.decode(errors="replace")
    return ""


if sys.platform == "win32":
    import ctypes

    class _LastInput(ctypes.Structure):
        _fields_ = [("size", ctypes.c_uint), ("at", ctypes.c_uint)]

    def _idle_of_windows() -> float | None:
        """By GetLastInputInfo: milliseconds since the start, in 32 bits."""
        last = _LastInput(ctypes.sizeof(_LastInput), 0)
        if not ctypes.windll.user32.GetLastInputInfo(ctypes.byref(last)):
            return None
        return float((ctypes.windll.kernel32.GetTickCount() - last.at) & 0xFFFFFFFF) / 1000
else:

    def _idle_of_windows() -> float | None:
        return None
