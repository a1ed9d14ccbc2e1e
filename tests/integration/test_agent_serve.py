"""An agent that starts Ollama itself, and one that finds it."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import psutil
import pytest

from ollama_coordinator_agent.process import Child, ServeCommand
from ollama_coordinator_agent.state import StateFolder
from ollama_coordinator_common.settings import AgentConfig
from ollama_coordinator_common.types import RunnerSettings
from support.agent_world import Coordinator, OllamaProgram, eventually, free_port, is_gone, running
from support.ollama import StandIn

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the program is a script")


@pytest.fixture
def program(tmp_path: Path) -> OllamaProgram:
    return OllamaProgram(tmp_path)


@pytest.fixture
async def coordinator() -> AsyncIterator[Coordinator]:
    async with Coordinator() as coordinator:
        yield coordinator


@pytest.fixture
def config(coordinator: Coordinator, program: OllamaProgram, tmp_path: Path) -> AgentConfig:
    return AgentConfig(
        coordinator_url=coordinator.url,
        ollama_port=free_port(),
        state_dir=tmp_path / "state",
        ollama_binary=program.file,
    )


async def die(config: AgentConfig) -> None:
    """Let the program end with an error, as a crash would."""
    async with aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.ClientError):
            await session.post(f"http://127.0.0.1:{config.ollama_port}/die")


@pytest.mark.spec("AGENT-23")
async def test_ollama_is_started_and_started_again_when_it_dies(
    coordinator: Coordinator,
    program: OllamaProgram,
    config: AgentConfig,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with running(config):
        await coordinator.next_report(lambda report: report.ollama_running)
        assert [start.argv for start in program.starts] == [["serve"]]
        await die(config)
        await coordinator.next_report(lambda report: not report.ollama_running)
        await coordinator.next_report(lambda report: report.ollama_running)
        assert len(program.starts) == 2
        await eventually(lambda: is_gone(program.starts[0].runner))
    assert "ended by itself" in caplog.text


@pytest.mark.spec("AGENT-26")
async def test_what_the_agent_started_ends_with_it_runners_too(
    coordinator: Coordinator, program: OllamaProgram, config: AgentConfig
) -> None:
    async with running(config):
        await coordinator.next_report(lambda report: report.ollama_running)
    start = program.starts[0]
    assert is_gone(start.pid)
    await eventually(lambda: is_gone(start.runner))  # killed; the system buries it when it can
    assert coordinator.reports[-1].leaving
    assert StateFolder(tmp_state(config), config.ollama_port).last_run.child is None


def tmp_state(config: AgentConfig) -> Path:
    assert config.state_dir is not None
    return config.state_dir


@pytest.mark.spec("AGENT-26")
async def test_a_server_that_ignores_the_request_to_end_is_killed(tmp_path: Path) -> None:
    stubborn = tmp_path / "ollama"
    stubborn.write_text(
        f"#!{sys.executable}\nimport signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('deaf', flush=True)\ntime.sleep(600)\n"
    )
    stubborn.chmod(0o755)
    log_file = tmp_path / "ollama.log"
    child = ServeCommand(stubborn, dict(os.environ), free_port(), log_file).start()
    await eventually(lambda: "deaf" in log_file.read_text())
    await child.stop(grace_seconds=0.1)
    assert is_gone(child.pid)
    assert child.exit_code == -signal.SIGKILL


@pytest.mark.spec("AGENT-27")
def test_a_process_that_only_has_the_same_number_is_not_ours() -> None:
    assert Child.reclaim(os.getpid(), created=1.0) is None
    assert Child.reclaim(2**22 + 7, created=1.0) is None


@pytest.mark.spec("AGENT-28")
async def test_the_server_gets_our_environment_and_loopback(
    coordinator: Coordinator, program: OllamaProgram, config: AgentConfig
) -> None:
    environ = {"OLLAMA_HOST": "coordinator:8080", "OLLAMA_KEEP_ALIVE": "9m"}
    async with running(config, environ):
        await coordinator.next_report(lambda report: report.ollama_running)
    assert program.starts[0].host == f"127.0.0.1:{config.ollama_port}"
    assert program.starts[0].kept == "9m"


@pytest.mark.spec("AGENT-34")
async def test_the_runner_settings_are_those_it_was_started_with(
    coordinator: Coordinator, config: AgentConfig
) -> None:
    environ = {"OLLAMA_NUM_PARALLEL": "3", "OLLAMA_CONTEXT_LENGTH": "8192"}
    async with running(config, environ):
        report = await coordinator.next_report(lambda report: report.runner is not None)
    assert report.runner == RunnerSettings(num_parallel=3, max_queue=512, context_length=8192)


@pytest.mark.spec("AGENT-29")
async def test_the_output_is_kept_for_this_start_and_the_one_before(
    coordinator: Coordinator, config: AgentConfig
) -> None:
    async with running(config):
        await coordinator.next_report(lambda report: report.ollama_running)
        await die(config)
        await coordinator.next_report(lambda report: not report.ollama_running)
        await coordinator.next_report(lambda report: report.ollama_running)
    logs = sorted(file.name for file in tmp_state(config).glob("ollama-*"))
    assert logs == [f"ollama-{config.ollama_port}.log", f"ollama-{config.ollama_port}.log.1"]
    assert all("listening" in (tmp_state(config) / name).read_text() for name in logs)


@pytest.mark.spec("AGENT-22")
async def test_an_ollama_that_is_there_is_adopted_and_left_alone(
    coordinator: Coordinator, program: OllamaProgram, tmp_path: Path
) -> None:
    async with StandIn() as ollama, aiohttp.ClientSession() as session:
        config = AgentConfig(
            coordinator_url=coordinator.url,
            ollama_port=ollama.port,
            state_dir=tmp_path / "state",
            ollama_binary=program.file,
        )
        async with running(config):
            await coordinator.next_report(lambda report: report.ollama_running)
        async with session.get(ollama.url + "/api/version") as response:
            assert response.status == 200
    assert program.starts == []


@pytest.mark.spec("AGENT-34")
async def test_the_settings_of_an_adopted_server_are_read_from_its_process(
    coordinator: Coordinator, program: OllamaProgram, config: AgentConfig
) -> None:
    environ = {
        **os.environ,
        "OLLAMA_HOST": f"127.0.0.1:{config.ollama_port}",
        "OLLAMA_NUM_PARALLEL": "5",
    }
    server = await asyncio.create_subprocess_exec(program.file, "serve", env=environ)
    try:
        patient = AgentConfig(
            coordinator_url=config.coordinator_url,
            ollama_port=config.ollama_port,
            state_dir=config.state_dir,
            manage_ollama=False,
        )
        async with running(patient):
            report = await coordinator.next_report(lambda report: report.runner is not None)
        assert report.runner == RunnerSettings(num_parallel=5, max_queue=512)
        assert server.returncode is None
    finally:
        psutil.Process(program.starts[0].runner).kill()
        server.kill()
        await server.wait()


@pytest.mark.spec("AGENT-33")
async def test_the_weights_of_each_model_are_reported(
    coordinator: Coordinator, config: AgentConfig, tmp_path: Path
) -> None:
    weights = "sha256:" + "ab" * 32
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": weights}
    file = tmp_path / "models/manifests/registry.ollama.ai/library/m/latest"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"layers": [layer]}))
    async with running(config, {"OLLAMA_MODELS": str(tmp_path / "models")}):
        report = await coordinator.next_report(lambda report: bool(report.model_blobs))
    assert report.model_blobs == {"m:latest": weights}


@pytest.mark.spec("AGENT-61")
async def test_a_runner_that_a_killed_ollama_left_is_reported(
    coordinator: Coordinator, program: OllamaProgram, config: AgentConfig, tmp_path: Path
) -> None:
    """An `ollama runner` whose parent has ended, which the agent has not started."""
    (tmp_path / "elsewhere").mkdir()
    other = tmp_path / "elsewhere" / "ollama"
    other.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(600)\n")
    other.chmod(0o755)
    shell = await asyncio.create_subprocess_exec(
        "sh",
        "-c",
        f"'{other}' runner --port 1 >/dev/null & echo $!",
        stdout=asyncio.subprocess.PIPE,
    )
    said, _ = await shell.communicate()
    pid = int(said)
    try:
        async with running(config):
            await coordinator.next_report(
                lambda report: bool(report.left_behind and str(pid) in report.left_behind)
            )
            assert "that still hold" in str(coordinator.reports[-1].left_behind)
            os.kill(pid, signal.SIGKILL)
            await coordinator.next_report(lambda report: str(pid) not in (report.left_behind or ""))
    finally:
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGKILL)
