"""An agent's own log, seen from the coordinator."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

from ollama_coordinator.agent_logs import LINES, LOOKING_SECONDS, AgentLogs
from ollama_coordinator_common.protocol import LogLine, LogReport
from ollama_coordinator_common.types import AgentId
from support import programs
from support.agent_world import OllamaProgram, free_port
from support.coordinator import Running, running
from support.deadline import DEADLINE_SECONDS
from support.ollama import StandIn

A = AgentId("a")
REPORT = {"cpu_usage": 1, "memory_usage": 1, "active_requests": 0}


async def seen(coordinator: Running, agent_id: str, condition: Any) -> dict[str, Any]:
    """The agent's log once it meets a condition."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while True:
            told = await coordinator.get(f"/api/agents/{agent_id}/log")
            if condition(told):
                return dict(told)
            await asyncio.sleep(0.05)


@pytest.mark.spec("DASH-34")
@pytest.mark.spec("AGENT-44")
async def test_a_look_makes_the_agent_send_its_log_and_its_servers(tmp_path: Path) -> None:
    ollama = OllamaProgram(tmp_path)
    settings = {
        "OLLAMA_PORT": str(free_port()),
        "OLLAMA_BINARY": str(ollama.file),
        "AGENT_STATE_DIR": str(tmp_path / "state"),
    }
    command = programs.command("ollama-coordinator-agent")
    async with running() as coordinator:
        settings["COORDINATOR_URL"] = coordinator.url
        async with programs.program(tmp_path / "log", command, "run", **settings) as program:
            await coordinator.until(lambda: len(coordinator.parts.registry) == 1)
            (agent,) = coordinator.parts.registry
            told = await seen(coordinator, agent.id, lambda told: told["server"])
            assert told["sends"]
            assert "listening" in told["server"]
            texts = [line["text"] for line in told["lines"]]
            assert any(text.startswith("registered agent_id=") for text in texts)
            # What happens from now on follows.
            psutil.Process(ollama.starts[-1].pid).kill()
            ended = "ollama serve ended by itself"
            await seen(
                coordinator,
                agent.id,
                lambda told: any(line["text"].startswith(ended) for line in told["lines"]),
            )
            # It takes the server it started along, which a kill would leave behind.
            program.send(programs.TERMINATE)
            assert await program.ended() == 0


async def beat(coordinator: Running, agent_id: str) -> dict[str, Any]:
    status, answer = await coordinator.post("/api/health", {"agent_id": agent_id, **REPORT})
    assert status == 200
    return dict(answer)


@pytest.mark.spec("DASH-34")
async def test_an_agent_is_asked_only_while_somebody_looks(coordinator: Running) -> None:
    async with StandIn() as ollama:
        agent = await coordinator.register(ollama, "ours", agent_version="0.1.0")
        path = f"/api/agents/{agent}/log"
        assert "log_after" not in await beat(coordinator, agent)
        line = {"number": 5, "at": "2026-01-01T00:00:00Z", "level": "info", "text": "<b>hello</b>"}
        url = coordinator.url + path
        async with coordinator.session.post(url, json={"lines": [line]}) as response:
            assert response.status == 204
        told = await coordinator.get(path)
        assert (told["reported_at"], told["lines"], told["sends"]) == (None, [], True)
        assert (await beat(coordinator, agent))["log_after"] == 0
        for _ in range(2):
            async with coordinator.session.post(url, json={"lines": [line]}) as response:
                assert response.status == 204
        assert (await coordinator.get(path))["lines"] == [line]
        assert (await beat(coordinator, agent))["log_after"] == 5
        async with coordinator.session.post(url, json={"lines": "none"}) as response:
            assert response.status == 400
        async with coordinator.session.get(f"{coordinator.url}/api/agents/none/log") as response:
            assert response.status == 404


@pytest.mark.spec("DASH-34")
async def test_a_bare_ollama_has_no_log(coordinator: Running) -> None:
    async with StandIn() as ollama:
        agent = await coordinator.register(ollama, "bare")
        assert not (await coordinator.get(f"/api/agents/{agent}/log"))["sends"]
        assert "log_after" not in await beat(coordinator, agent)


@pytest.mark.spec("DASH-34")
def test_what_is_kept_is_bounded_and_forgotten() -> None:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    logs = AgentLogs()
    logs.look(A, 0.0, sends=True)
    lines = [LogLine(number, at, "info", "x" * 5000) for number in range(1, LINES * 2)]
    logs.take(A, LogReport(lines, ["y" * 5000] * LINES * 2), 0.0, at)
    told = logs.look(A, 1.0, sends=True)
    assert len(told.lines) == len(told.server or []) == LINES
    assert {len(line.text) for line in told.lines} == {len((told.server or [""])[0])} == {2000}
    assert logs.wanted_after(A, 1.0) == LINES * 2 - 1
    later = 1.0 + LOOKING_SECONDS
    assert logs.wanted_after(A, later) is None
    assert logs.look(A, later, sends=True).lines == []


@pytest.mark.spec("DASH-34")
def test_a_log_is_forgotten_though_nobody_looks_again() -> None:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    report = LogReport([LogLine(1, at, "info", "hello")], None)
    logs = AgentLogs()
    logs.look(A, 0.0, sends=True)
    logs.take(A, report, 1.0, at)
    assert logs.wanted_after(AgentId("another"), LOOKING_SECONDS - 1.0) is None
    assert len(logs) == 1
    assert logs.wanted_after(AgentId("another"), LOOKING_SECONDS) is None
    assert len(logs) == 0


@pytest.mark.spec("DASH-34")
def test_what_comes_when_nobody_looks_any_more_is_thrown_away() -> None:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    logs = AgentLogs()
    logs.look(A, 0.0, sends=True)
    logs.take(A, LogReport([LogLine(1, at, "info", "late")], None), LOOKING_SECONDS, at)
    assert len(logs) == 0
