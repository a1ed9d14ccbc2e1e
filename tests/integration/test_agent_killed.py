"""An agent is killed while it writes a model: the write goes on, and no file stays behind."""

import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from integration.test_models_move import Machines, machines
from ollama_coordinator_agent import model_server
from ollama_coordinator_agent.daemon import Daemon
from support import programs
from support.coordinator import Running
from support.deadline import DEADLINE_SECONDS
from support.ollama import Model

__all__ = ["machines"]

LARGE = Model("large", size_bytes=4_000_000)


class Target:
    """A machine whose Ollama and agent are processes; the agent is killed and started again."""

    def __init__(self, coordinator: Running, folder: Path) -> None:
        self.coordinator = coordinator
        self.models = folder / "models"
        self.port = programs.free_port()
        self._folder = folder

    @asynccontextmanager
    async def ollama(self) -> AsyncIterator[None]:
        command = [sys.executable, "-m", "support.ollama", "--port", str(self.port)]
        command += ["--models-path", str(self.models)]
        environment = {
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "OLLAMA_MODELS": str(self.models),
        }
        log = self._folder / "ollama.log"
        async with programs.program(log, *command, **environment) as running:
            await programs.answers(f"http://127.0.0.1:{self.port}", running)
            yield

    @asynccontextmanager
    async def agent(self) -> AsyncIterator[programs.Program]:
        environment = {
            "COORDINATOR_URL": self.coordinator.url,
            "COORDINATOR_CERTIFICATE": self.coordinator.parts.tls.shown,
            "OLLAMA_PORT": str(self.port),
            "AGENT_MACHINE_NAME": "target",
            "AGENT_IP_ADDRESS": "127.0.0.1",
            "AGENT_STATE_DIR": str(self._folder / "state"),
            "AGENT_MANAGE_OLLAMA": "false",
        }
        log = self._folder / "agent.log"
        command = programs.command("ollama-coordinator-agent")
        async with programs.program(log, command, **environment) as running:
            yield running

    def parts(self) -> list[Path]:
        return sorted(self.models.glob("blobs/*.part"))

    def has_bytes(self) -> bool:
        return any(one.stat().st_size for one in self.parts())

    def is_ready(self) -> bool:
        for agent in self.coordinator.parts.registry:
            if agent.name == "target":
                return agent.store is not None and agent.store.writable
        return False


@pytest.fixture
async def cut(
    machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Target, str]]:
    """A machine whose agent was killed while it wrote a model, and the id of that operation."""
    busy = [1]  # the giver stops after a piece, as long as its Ollama answers requests
    monkeypatch.setattr(Daemon, "_active_requests", lambda self: busy[0])
    monkeypatch.setattr(model_server, "YIELD_SECONDS", DEADLINE_SECONDS)
    url, folder = f"sqlite://{tmp_path}/db", tmp_path / "target"
    folder.mkdir()
    # A stock Ollama takes no certificate of the coordinator's own: the agent writes.
    async with machines([LARGE], tls="self", database_url=url) as (coordinator, _):
        target = Target(coordinator, folder)
        async with target.ollama():
            async with target.agent() as agent:
                await coordinator.until(target.is_ready)
                order = {"kind": "pull", "model": "large", "from": "fleet"}
                placed = {**order, "placement": "agents:target"}
                status, started = await coordinator.post("/api/operations", placed)
                assert status == 202, started
                await coordinator.until(target.has_bytes)
                await agent.kill()
            busy[0] = 0
            assert target.parts()
            yield target, started["id"]


@pytest.mark.spec("AGENT-83")
@pytest.mark.spec("SURFACE-20")
async def test_a_write_goes_on_after_its_agent_was_killed(cut: tuple[Target, str]) -> None:
    target, number = cut
    async with target.agent():
        await target.coordinator.parts.operations.get(number).feed.over()
        ended = await target.coordinator.get(f"/api/operations/{number}")
        assert ended["state"] == "done", json.dumps(ended)
        assert target.parts() == []
        tags = await target.coordinator.get("/api/tags")
        assert [model["name"] for model in tags["models"]] == ["large:latest"]


@pytest.mark.spec("AGENT-83")
async def test_what_a_killed_agent_left_does_not_stay(cut: tuple[Target, str]) -> None:
    target, number = cut
    operations = target.coordinator.parts.operations
    operations.cancel(operations.get(number))
    of_ollama = target.models / "blobs" / f"sha256-{'0' * 64}-partial"
    for file in (target.models / "blobs" / "manifest-1.part", of_ollama):
        file.write_bytes(b"{")
    for file in (*target.parts(), of_ollama):
        os.utime(file, (0, 0))
    async with target.agent():
        await target.coordinator.until(lambda: not target.parts())
    assert of_ollama.exists()
