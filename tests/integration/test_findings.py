"""What an agent's doctor finds is shown by its coordinator; its Ollama is restarted on request."""

import asyncio
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import UNSET

from ollama_coordinator_agent.assembly import diagnosed
from ollama_coordinator_common.protocol import HealthReport
from ollama_coordinator_common.settings import AgentConfig
from ollama_coordinator_common.types import AgentId
from support import agent_world
from support.agent_world import OllamaProgram, eventually, free_port
from support.coordinator import Running
from support.ollama import StandIn


def config(url: str, folder: Path, **more: Any) -> AgentConfig:
    given = {"ollama_port": free_port(), "machine_name": "real", **more}
    return AgentConfig(coordinator_url=url, state_dir=folder / "state", **given)


async def row(coordinator: Running) -> dict[str, Any]:
    (found,) = await coordinator.get("/api/agents")
    return dict(found)


@pytest.mark.spec("AGENT-64")
async def test_findings_are_sent_when_they_change_or_are_asked_for(tmp_path: Path) -> None:
    async with agent_world.Coordinator() as coordinator, StandIn() as ollama:
        settings = config(coordinator.url, tmp_path, ollama_port=ollama.port, manage_ollama=False)
        async with agent_world.running(settings):
            await coordinator.until(lambda seen: len(seen.reports) > 2)
            first, *others = coordinator.reports
            assert isinstance(first.findings, list)
            assert all(one.findings is UNSET for one in others)
            coordinator.asks_findings = True
            await coordinator.next_report(lambda report: report.findings is not UNSET)
            coordinator.asks_findings = False
            await ollama.stop()
            told = await coordinator.next_report(lambda report: not report.ollama_running)
            assert isinstance(told.findings, list)
            assert any("nothing listens at" in one.text for one in told.findings)


@pytest.mark.spec("AGENT-63")
async def test_the_doctor_asks_the_coordinator_what_it_makes_of_this_machine(
    coordinator: Running, tmp_path: Path
) -> None:
    async with StandIn() as ollama:
        settings = config(coordinator.url, tmp_path, ollama_port=ollama.port, manage_ollama=False)

        async def found() -> dict[str, tuple[str, str]]:
            return {one.check: (one.level, one.text) async for one in diagnosed(settings, {})}

        level, text = (await found())["transport"]
        assert (level, "this machine is not registered" in text) == ("failed", True)
        assert not (tmp_path / "state").exists()
        async with agent_world.running(settings):
            await coordinator.until(lambda: any(one.report for one in coordinator.parts.registry))
            seen = await found()
            assert {check for check, (level, _) in seen.items() if level == "failed"} == set()
            assert seen["transport"][0] == seen["key"][0] == seen["Ollama"][0] == "ok"
        level, text = (await found())["transport"]
        assert (level, "it sees this machine offline" in text) == ("failed", True)


@pytest.mark.spec("AGENT-63")
@pytest.mark.skipif(sys.platform == "win32", reason="the program is a script for sh")
async def test_an_ollama_that_dies_at_once_is_found_with_its_output(tmp_path: Path) -> None:
    program = tmp_path / "ollama"
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o755)
    async with agent_world.Coordinator() as coordinator:
        async with agent_world.running(config(coordinator.url, tmp_path, ollama_binary=program)):
            told = await coordinator.next_report(
                lambda report: (
                    isinstance(report.findings, list)
                    and any("exit code 3" in one.text for one in report.findings)
                )
            )
    assert isinstance(told.findings, list)
    (found,) = [one for one in told.findings if one.check == "Ollama"]
    assert str(tmp_path / "state") in found.text


@pytest.mark.spec("AGENT-64")
@pytest.mark.spec("FLEET-78")
async def test_why_an_ollama_does_not_answer_stands_on_its_row(
    coordinator: Running, tmp_path: Path
) -> None:
    settings = config(coordinator.url, tmp_path, manage_ollama=False)
    async with agent_world.running(settings):
        await coordinator.until(lambda: any(one.findings for one in coordinator.parts.registry))
        seen = await row(coordinator)
    assert "nothing listens at" in seen["out_of_rotation"]
    assert {"check", "level", "text", "remedy"} <= set(seen["findings"][0])


@pytest.mark.spec("FLEET-79")
async def test_an_ollama_that_the_agent_started_is_restarted(
    coordinator: Running, tmp_path: Path
) -> None:
    program = OllamaProgram(tmp_path)
    settings = config(coordinator.url, tmp_path, ollama_binary=program.file)
    async with agent_world.running(settings):
        agents = coordinator.parts.registry
        await coordinator.until(lambda: any(one.report and one.report.owned for one in agents))
        await eventually(lambda: len(program.starts) == 1)
        seen = await row(coordinator)
        await coordinator.until(lambda: next(iter(agents)).ollama_running)
        url = f"{coordinator.url}/api/agents/{seen['id']}/restart"
        async with coordinator.session.post(url) as answer:
            assert answer.status == 202
        await eventually(lambda: len(program.starts) == 2)
        await coordinator.until(lambda: next(iter(agents)).out_of_rotation() is None)


@pytest.mark.spec("FLEET-79")
async def test_a_restart_that_would_end_something_or_cannot_be_is_refused(
    coordinator: Running,
) -> None:
    async with StandIn() as ollama:
        agent_id = await coordinator.register(ollama, "gpu-1")
        url = f"{coordinator.url}/api/agents/{agent_id}/restart"

        async def refusal() -> str:
            async with coordinator.session.post(url) as answer:
                assert answer.status == 409
                return str((await answer.json())["error"])

        async def beat(**facts: Any) -> dict[str, Any]:
            report = HealthReport(AgentId(agent_id), 1.0, 1.0, facts.pop("active", 0), **facts)
            async with coordinator.session.post(
                f"{coordinator.url}/api/health", data=msgspec.json.encode(report)
            ) as answer:
                return dict(await answer.json())

        assert "it has no agent" in await refusal()
        await beat()
        assert "another program started its Ollama" in await refusal()
        await beat(owned=True, active=2)
        assert "2 requests run there" in await refusal()
        await beat(owned=True)
        ollama.hold()
        chat = asyncio.create_task(coordinator.chat())
        await ollama.seen.wait_for(lambda seen: seen.active == 1)
        assert "a request runs there" in await refusal()
        ollama.release()
        await chat
        async with coordinator.session.post(url) as answer:
            assert answer.status == 202
        assert "restart" not in await beat(owned=True, active=1)
        assert "operator" in (await beat(owned=True))["restart"]
        assert "restart" not in await beat(owned=True)
