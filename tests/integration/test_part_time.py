"""Machines that serve part of the time: they pause by themselves, and an operator overrules it."""

import asyncio
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from ollama_coordinator_agent.schedule import DAYS
from ollama_coordinator_common.settings import AgentConfig
from support.agent_world import running as running_agent
from support.coordinator import Running, running
from support.deadline import DEADLINE_SECONDS
from support.ollama import StandIn


class Seat:
    """A machine's owner, as its `loginctl` tells of them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._hint = folder / "hint"
        program = folder / "loginctl"
        program.write_text(f"#!/bin/sh\nexec cat {self._hint}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder), prepend=":")
        self.leave()

    def come(self) -> None:
        self._hint.write_text("IdleHint=no\nIdleSinceHint=0\n")

    def leave(self) -> None:
        self._hint.write_text("IdleHint=yes\nIdleSinceHint=1000000\n")


@pytest.fixture
def seat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Seat:
    monkeypatch.setattr("platform.system", lambda: "Linux")
    return Seat(tmp_path, monkeypatch)


def config_of(coordinator: Running, ollama: StandIn, folder: Path, **more: Any) -> AgentConfig:
    return AgentConfig(
        coordinator_url=coordinator.url, ollama_port=ollama.port, machine_name="desk",
        state_dir=folder, manage_ollama=False, **more,
    )  # fmt: skip


async def row(coordinator: Running, paused: str | None) -> dict[str, Any]:
    """The agent's row once it pauses for this reason."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while True:
            agents = await coordinator.get("/api/agents")
            if agents and agents[0]["cpu_usage"] is not None and agents[0]["paused"] == paused:
                return dict(agents[0])
            await asyncio.sleep(0.02)


@pytest.mark.spec("AGENT-75")
@pytest.mark.spec("FLEET-80")
async def test_an_owner_who_comes_ends_no_stream_and_gets_no_new_one(
    tmp_path: Path, seat: Seat
) -> None:
    async with running() as coordinator, StandIn() as ollama:
        async with running_agent(config_of(coordinator, ollama, tmp_path, idle_after=60.0)):
            assert (await row(coordinator, None))["status"] == "online"
            ollama.hold()
            begun = asyncio.create_task(coordinator.chat())
            await coordinator.until(lambda: ollama.seen.held == 1)
            seat.come()
            seen = await row(coordinator, "somebody uses it")
            assert (seen["status"], seen["in_flight"]) == ("draining", 1)
            status, answer = await coordinator.chat()
            assert status == 503
            assert "desk: paused: somebody uses it" in answer["error"]
            ollama.release()
            assert (await begun)[0] == 200
            seat.leave()
            assert (await row(coordinator, None))["status"] == "online"
            assert (await coordinator.chat())[0] == 200


@pytest.mark.spec("FLEET-80")
async def test_an_operator_overrules_a_pause_until_it_is_over(tmp_path: Path, seat: Seat) -> None:
    async with running() as coordinator, StandIn() as ollama:
        seat.come()
        async with running_agent(config_of(coordinator, ollama, tmp_path, idle_after=60.0)):
            url = f"/api/agents/{(await row(coordinator, 'somebody uses it'))['id']}"
            async with coordinator.session.patch(
                coordinator.url + url, json={"overruled": True}
            ) as response:
                assert (await response.json())["status"] == "online"
            assert (await coordinator.chat())[0] == 200
            seat.leave()
            assert (await row(coordinator, None))["overruled"] is False
            seat.come()
            assert (await row(coordinator, "somebody uses it"))["status"] == "draining"


@pytest.mark.spec("AGENT-74")
async def test_a_machine_outside_its_schedule_says_so_from_its_first_report(tmp_path: Path) -> None:
    async with running() as coordinator, StandIn() as ollama:
        day = DAYS[(datetime.now().weekday() + 3) % 7]
        config = config_of(coordinator, ollama, tmp_path, schedule=f"{day} 00:00-00:01")
        async with running_agent(config):
            async with asyncio.timeout(DEADLINE_SECONDS):
                while not (agents := await coordinator.get("/api/agents")) or (
                    agents[0]["cpu_usage"] is None
                ):
                    await asyncio.sleep(0.01)
            assert agents[0]["paused"] == f"outside its schedule until {day.title()} 00:00"
