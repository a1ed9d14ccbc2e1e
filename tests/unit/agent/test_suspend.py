"""That a machine sleeps, and that it has slept."""

import asyncio
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from ollama_coordinator_agent import suspend
from ollama_coordinator_agent.suspend import Gap, seconds_asleep, until_announced, wake_address
from support.agent_world import is_gone


@pytest.mark.spec("AGENT-76")
def test_a_clock_that_ran_on_shows_for_how_long_it_slept() -> None:
    gap = Gap()
    looks = [0.0, 0.2, 0.4, 3600.4, 3600.4, None, 3600.5]
    assert [gap.note(asleep) for asleep in looks] == [0, 0, 0, 3600.0, 0, 0, 0]


@pytest.mark.spec("AGENT-76")
@pytest.mark.skipif(sys.platform != "linux", reason="Linux' own clocks")
def test_a_machine_that_runs_does_not_sleep() -> None:
    first, second = seconds_asleep(), seconds_asleep()
    assert first is not None
    assert second is not None
    assert abs(second - first) < 1.0


SYSTEM = """#!/bin/sh
echo $$ >> {folder}/pids
echo "$@" > {folder}/arguments
echo "Monitoring signals on object /org/freedesktop/login1 owned by org.freedesktop.login1"
while ! [ -e {folder}/signal ]; do sleep 0.02; done
cat {folder}/signal
sleep 600
"""


@pytest.fixture
def logind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder: what is written to its `signal` is what logind announces."""
    for name in ("systemd-inhibit", "gdbus"):
        program = tmp_path / name
        program.write_text(SYSTEM.format(folder=tmp_path))
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path


@pytest.mark.spec("AGENT-76")
@pytest.mark.skipif(sys.platform != "linux", reason="logind is Linux'")
@pytest.mark.parametrize("name", ["PrepareForSleep", "PrepareForShutdown"])
async def test_logind_waits_for_the_goodbye_and_no_longer(logind: Path, name: str) -> None:
    said: list[bool] = []

    async def goodbye() -> None:
        pid = int((logind / "pids").read_text())
        said.append(psutil.pid_exists(pid))

    waiting = asyncio.create_task(until_announced(goodbye))
    signal = f"/org/freedesktop/login1: org.freedesktop.login1.Manager.{name}"
    (logind / "draft").write_text(
        "/org/freedesktop/login1: org.freedesktop.login1.Manager.UserNew (uint32 0,)\n"
        f"{signal} (false,)\n{signal} (true,)\n"
    )
    (logind / "draft").rename(logind / "signal")
    assert await waiting
    assert said == [True]
    assert is_gone(int((logind / "pids").read_text()))
    assert "--mode=delay" in (logind / "arguments").read_text()


@pytest.mark.spec("AGENT-76")
@pytest.mark.skipif(sys.platform != "linux", reason="logind is Linux'")
async def test_nothing_stays_behind_where_nothing_is_announced(logind: Path) -> None:
    async def goodbye() -> None:
        raise AssertionError

    waiting = asyncio.create_task(until_announced(goodbye))
    while not (logind / "arguments").exists():
        await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert is_gone(int((logind / "pids").read_text()))


@pytest.mark.spec("AGENT-77")
def test_the_card_is_that_of_the_address_and_loopback_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def row(family: int, address: str, broadcast: str | None = None) -> object:
        return SimpleNamespace(family=family, address=address, broadcast=broadcast)

    cards = {
        "lo": [row(2, "127.0.0.1"), row(psutil.AF_LINK, "00:00:00:00:00:00")],
        "wlan0": [row(2, "10.1.0.7", "10.1.255.255"), row(psutil.AF_LINK, "aa:aa:aa:aa:aa:aa")],
        "Ethernet": [
            row(psutil.AF_LINK, "00-1A-2B-3C-4D-5E"),
            row(2, "192.168.1.20", "192.168.1.255"),
        ],
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: cards)
    found = wake_address("192.168.1.20")
    assert (found.mac, found.broadcast) == ("00:1a:2b:3c:4d:5e", "192.168.1.255")
    assert wake_address("127.0.0.1") == wake_address("203.0.113.5")
    assert wake_address("127.0.0.1").mac is None


@pytest.mark.spec("AGENT-76")
def test_a_machine_that_systemd_switches_off_is_told_from_an_agent_that_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "systemctl"
    program.write_text(f"#!/bin/sh\ncat {tmp_path}/state\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(suspend, "SYSTEMD", tmp_path)
    found = []
    for state in ("running", "degraded", "stopping"):
        (tmp_path / "state").write_text(f"{state}\n")
        found.append(suspend.is_ending())
    assert found == [False, False, True]
