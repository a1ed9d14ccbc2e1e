"""When this machine goes to sleep or is switched off, and that it has slept.

On Linux logind announces both, and waits for those who asked it to: systemd's own
`systemd-inhibit` asks, and `gdbus` of GLib listens; neither needs a privilege. What no program
announces is seen afterwards: a clock that runs on while the machine sleeps is ahead of one that
does not.
"""

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from shutil import which

import psutil
from msgspec import Struct

log = logging.getLogger(__name__)

SLEPT_SECONDS = 1.0
"""The two clocks drift apart by less between two looks."""

ASK_AGAIN_SECONDS = 600.0
"""Until logind is asked again where it did not answer."""

WITH_LOCK = (
    "systemd-inhibit", "--what=sleep:shutdown", "--mode=delay", "--who=Ollama Coordinator agent",
    "--why=The coordinator is told that this machine goes to sleep",
)  # fmt: skip
"""The machine sleeps once this program has ended, or after logind's `InhibitDelayMaxSec` (5 s)."""

MONITOR = (
    "gdbus", "monitor", "--system", "--dest", "org.freedesktop.login1",
    "--object-path", "/org/freedesktop/login1",
)  # fmt: skip

SYSTEMD = Path("/run/systemd/system")
"""It is there where systemd runs the machine: sd_booted(3)."""

ANNOUNCEMENTS = ("PrepareForSleep (true", "PrepareForShutdown (true")
"""Signals of org.freedesktop.login1.Manager, as `gdbus monitor` prints them."""


class WakeAddress(Struct, frozen=True):
    """Where a magic packet finds this machine: a network card, and its network's broadcast."""

    mac: str | None = None
    broadcast: str | None = None


def wake_address(address: str) -> WakeAddress:
    """The card that has one of this machine's addresses; empty where it has no number."""
    for rows in psutil.net_if_addrs().values():
        mine = next((row for row in rows if row.address == address), None)
        cards = (row.address for row in rows if row.family == psutil.AF_LINK)
        if mine is None:
            continue
        mac = next(cards, "").replace("-", ":").lower()
        if len(mac) == len("00:00:00:00:00:00") and mac.strip("0:"):
            return WakeAddress(mac, mine.broadcast)
    return WakeAddress()


def seconds_asleep() -> float | None:
    """For how long the machine has slept since it started; `None` where no clock tells it."""
    if sys.platform == "linux":
        return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
    if sys.platform == "darwin":  # there CLOCK_MONOTONIC goes on, and Python's own clock does not
        return time.clock_gettime(time.CLOCK_MONOTONIC) - time.monotonic()
    return None


class Gap:
    """Finds that the machine has slept by what `seconds_asleep` says over time."""

    def __init__(self) -> None:
        self._before: float | None = None

    def note(self, asleep: float | None) -> float:
        """The seconds that it has slept since the last look; 0 for none."""
        before, self._before = self._before, asleep
        if before is None or asleep is None or asleep - before < SLEPT_SECONDS:
            return 0.0
        return asleep - before


async def until_announced(going: Callable[[], Awaitable[None]]) -> bool:
    """Wait until logind announces that the machine sleeps or ends, then for `going`.

    logind waits for that. False where it does not answer.
    """
    if sys.platform != "linux" or not (which(WITH_LOCK[0]) and which(MONITOR[0])):
        return False
    program = await asyncio.create_subprocess_exec(
        *WITH_LOCK,
        *MONITOR,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while program.stdout is not None and (line := await program.stdout.readline()):
            if any(one in line.decode(errors="replace") for one in ANNOUNCEMENTS):
                await going()
                return True
        return False
    finally:
        with suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGTERM)
        await program.wait()


def is_ending() -> bool:
    """Whether systemd is about to switch the machine off; called in a thread."""
    if not SYSTEMD.is_dir():
        return False
    with suppress(OSError, subprocess.SubprocessError):
        command = ("systemctl", "is-system-running")
        done = subprocess.run(command, capture_output=True, timeout=1.0, check=False)  # noqa: S603
        return done.stdout.strip() == b"stopping"
    return False
