"""The agent as its own process: signals, exit codes, what it prints."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import psutil
import pytest

from ollama_coordinator_common.settings import AgentConfig
from support.agent_world import Coordinator, OllamaProgram, eventually, free_port, is_gone, running
from support.deadline import DEADLINE_SECONDS
from support.ollama import StandIn

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals there are another matter")

Process = asyncio.subprocess.Process
Launch = Callable[..., AbstractAsyncContextManager[Process]]

PROGRAM = [sys.executable, "-c", "from ollama_coordinator_agent.main import app; app()"]


@pytest.fixture
async def coordinator() -> AsyncIterator[Coordinator]:
    async with Coordinator() as coordinator:
        yield coordinator


@pytest.fixture
async def ollama() -> AsyncIterator[StandIn]:
    async with StandIn() as ollama:
        yield ollama


@pytest.fixture
def launch(coordinator: Coordinator, tmp_path: Path) -> Launch:
    """Start the program; whatever still runs at the end of the block is killed."""

    @asynccontextmanager
    async def start(*arguments: str, **environ: object) -> AsyncIterator[Process]:
        settings = {
            "COORDINATOR_URL": coordinator.url,
            "AGENT_STATE_DIR": str(tmp_path / "state"),
            "AGENT_MANAGE_OLLAMA": "false",
            **{name: str(value) for name, value in environ.items()},
        }
        process = await asyncio.create_subprocess_exec(
            *PROGRAM,
            *arguments,
            env={**os.environ, **settings},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.communicate()

    return start


async def outcome(process: Process) -> tuple[int | None, str]:
    """The exit code and everything that was printed."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        output, _ = await process.communicate()
    return process.returncode, output.decode()


@pytest.mark.spec("AGENT-12")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_a_signal_brings_a_goodbye_and_exit_code_0(
    launch: Launch, coordinator: Coordinator, ollama: StandIn, number: signal.Signals
) -> None:
    async with launch("run", OLLAMA_PORT=ollama.port) as process:
        await coordinator.next_report(lambda report: report.ollama_running)
        process.send_signal(number)
        code, output = await outcome(process)
    assert code == 0
    assert coordinator.reports[-1].leaving
    assert "Traceback" not in output


@pytest.mark.spec("AGENT-12")
@pytest.mark.spec("AGENT-13")
async def test_a_signal_ends_it_when_the_coordinator_is_away(
    launch: Launch, coordinator: Coordinator, ollama: StandIn
) -> None:
    async with launch("run", OLLAMA_PORT=ollama.port) as process:
        await coordinator.next_report(lambda report: report.ollama_running)
        await coordinator.stop()
        process.terminate()
        code, output = await outcome(process)
    assert code == 0
    assert "without a goodbye" in output


@pytest.mark.spec("AGENT-1")
@pytest.mark.spec("AGENT-5")
async def test_the_bare_command_runs_with_plain_log_lines(
    launch: Launch, coordinator: Coordinator, ollama: StandIn
) -> None:
    async with launch(OLLAMA_PORT=ollama.port) as process:
        await coordinator.next_report(lambda report: report.ollama_running)
        process.terminate()
        code, output = await outcome(process)
    assert code == 0
    assert f"INFO    registered agent_id=agent-{ollama.port}" in output
    assert "\x1b[" not in output


@pytest.mark.spec("AGENT-5")
async def test_a_terminal_gets_a_live_table(
    coordinator: Coordinator, ollama: StandIn, launch: Launch
) -> None:
    async with launch(OLLAMA_PORT=ollama.port, FORCE_COLOR="1", COLUMNS="200") as process:
        await coordinator.next_report(lambda report: report.ollama_running)
        assert process.stdout is not None
        shown = ""
        async with asyncio.timeout(DEADLINE_SECONDS):
            while "connected" not in shown:
                shown += (await process.stdout.read(65536)).decode()
        process.terminate()
        code, rest = await outcome(process)
    assert code == 0
    assert "said goodbye" in shown + rest
    assert "\x1b[?25h" in rest  # the cursor is back


@pytest.mark.spec("AGENT-21")
async def test_a_second_agent_for_the_same_ollama_says_so_and_ends(
    launch: Launch, coordinator: Coordinator, ollama: StandIn
) -> None:
    async with launch(OLLAMA_PORT=ollama.port):
        await coordinator.next_report(lambda report: report.ollama_running)
        async with launch(OLLAMA_PORT=ollama.port) as second:
            code, output = await outcome(second)
        assert code == 1
        assert "already looks after this Ollama" in output
        assert "Traceback" not in output
        async with StandIn() as other, launch(OLLAMA_PORT=other.port):
            await coordinator.until(lambda seen: len(seen.known) == 2)
    assert len({seen.machine_id for seen in coordinator.registrations}) == 1


@pytest.mark.spec("AGENT-26")
@pytest.mark.parametrize("kept", ["true", "false"])
async def test_ollama_ends_with_the_agent_unless_it_is_kept(
    launch: Launch, coordinator: Coordinator, tmp_path: Path, kept: str
) -> None:
    program = OllamaProgram(tmp_path)
    settings = {
        "OLLAMA_PORT": free_port(),
        "OLLAMA_BINARY": program.file,
        "AGENT_MANAGE_OLLAMA": "true",
        "AGENT_KEEP_OLLAMA": kept,
    }
    async with launch(**settings) as process:
        await coordinator.next_report(lambda report: report.ollama_running)
        process.terminate()
        await outcome(process)
    (start,) = program.starts
    assert is_gone(start.pid) is (kept == "false")
    for pid in (start.pid, start.runner):
        if not is_gone(pid):
            psutil.Process(pid).kill()


@pytest.mark.spec("AGENT-27")
async def test_the_ollama_of_an_agent_that_was_killed_is_taken_back(
    launch: Launch, coordinator: Coordinator, tmp_path: Path
) -> None:
    program = OllamaProgram(tmp_path)
    config = AgentConfig(
        coordinator_url=coordinator.url,
        ollama_port=free_port(),
        state_dir=tmp_path / "state",
        ollama_binary=program.file,
    )
    settings = {
        "OLLAMA_PORT": config.ollama_port,
        "OLLAMA_BINARY": program.file,
        "AGENT_MANAGE_OLLAMA": "true",
    }
    async with launch(**settings) as process:
        await coordinator.next_report(lambda report: report.ollama_running)
        process.kill()
        await process.wait()
    (start,) = program.starts
    assert not is_gone(start.pid)
    async with running(config):
        await coordinator.next_report(lambda report: report.ollama_running)
    assert len(program.starts) == 1
    await eventually(lambda: is_gone(start.pid) and is_gone(start.runner))


@pytest.mark.spec("AGENT-16")
async def test_a_proxy_in_the_environment_is_not_used(
    launch: Launch, coordinator: Coordinator, ollama: StandIn
) -> None:
    proxy = {"http_proxy": "http://127.0.0.1:1", "HTTP_PROXY": "http://127.0.0.1:1"}
    async with launch(OLLAMA_PORT=ollama.port, **proxy):
        await coordinator.next_report(lambda report: report.ollama_running)


@pytest.mark.spec("AGENT-4")
async def test_status_shows_what_would_be_reported(
    launch: Launch, coordinator: Coordinator, ollama: StandIn, tmp_path: Path
) -> None:
    async with launch("status", OLLAMA_PORT=ollama.port) as process:
        code, output = await outcome(process)
    assert code == 1
    assert "not registered" in " ".join(output.split())
    assert "llama3.2:latest" in output
    async with launch("status", "--json", OLLAMA_PORT=ollama.port) as process:
        code, output = await outcome(process)
    told = json.loads(output)
    assert code == 1
    assert "not registered" in told["coordinator_trouble"]
    assert told["models"] == ["llama3.2:latest"]
    assert told["ollama_version"] == ollama.settings.version
    assert told["readings"]["memory_total_bytes"] > 0
    assert not (tmp_path / "state").exists()
    async with launch(OLLAMA_PORT=ollama.port):
        await coordinator.next_report(lambda report: report.ollama_running)
        async with launch("status", OLLAMA_PORT=ollama.port) as process:
            code, output = await outcome(process)
    assert code == 0, output
    assert f"agent-{ollama.port}" in output
    assert "connected" in output
    assert f"version {ollama.settings.version}" in output


@pytest.mark.spec("AGENT-4")
async def test_status_says_what_is_wrong(launch: Launch) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    async with launch("status", OLLAMA_PORT=free_port(), COORDINATOR_URL=url) as process:
        code, output = await outcome(process)
    words = " ".join(output.split())
    assert code == 1
    assert "connection refused: nothing listens there; is the coordinator running?" in words
    assert "nothing listens at" in words
