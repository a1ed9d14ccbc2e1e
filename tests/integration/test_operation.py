"""Starting and stopping the real program."""

import asyncio
import json
import socket
import sqlite3
from pathlib import Path

import aiohttp
import pytest

from support import programs
from support.coordinator import running
from support.deadline import DEADLINE_SECONDS
from support.ollama import StandIn

CHAT = {"model": "llama3.2", "messages": [{"role": "user", "content": "hello"}]}


async def start(tmp_path: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """Exit code and output of a program that is expected to end by itself."""
    async with programs.program(tmp_path / "log", *arguments, **environment) as running:
        return await running.ended(), running.output


@pytest.mark.spec("OPERATION-1")
@pytest.mark.parametrize(
    "arguments",
    [("ollama-coordinator",), ("ollama-coordinator", "serve"), ("ollama-coordinator-coordinator",)],
)
async def test_every_way_to_start_it_serves(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    port = programs.free_port()
    name, *rest = arguments
    settings = {
        "COORDINATOR_PORT": str(port),
        "DATABASE_URL": f"sqlite:///{tmp_path.as_posix()}/c.db",
    }
    log = tmp_path / "log"
    async with programs.program(log, programs.command(name), *rest, **settings) as running:
        await programs.answers(f"http://127.0.0.1:{port}", running)
        running.send(programs.TERMINATE)
        assert await running.ended() == 0


@pytest.mark.spec("OPERATION-4")
async def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, output = await start(
            tmp_path,
            programs.command("ollama-coordinator"),
            COORDINATOR_PORT=port,
            DATABASE_URL="sqlite://:memory:",
        )
    assert code == 1
    assert f"COORDINATOR_PORT={port}" in output
    assert "Traceback" not in output


def locked(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("CREATE TABLE t (x)")
    connection.execute("BEGIN EXCLUSIVE")
    return connection


@pytest.mark.spec("OPERATION-5")
@pytest.mark.parametrize("trouble", ["locked", "not a database", "a folder", "no folder"])
async def test_a_database_that_cannot_be_used_is_told(tmp_path: Path, trouble: str) -> None:
    path = tmp_path / "c.db"
    holder = None
    if trouble == "locked":
        holder = locked(path)
    elif trouble == "not a database":
        path.write_bytes(b"this is no database, it is a letter" * 100)
    elif trouble == "a folder":
        path.mkdir()
    else:
        path = tmp_path / "missing" / "c.db"
    code, output = await start(
        tmp_path,
        programs.command("ollama-coordinator"),
        COORDINATOR_PORT=str(programs.free_port()),
        DATABASE_URL=f"sqlite:///{path.as_posix()}",
    )
    if holder is not None:
        holder.close()
    assert code == 1
    error = next(line for line in output.splitlines() if line.startswith("Error: database"))
    assert str(path) in error
    assert "(" in error  # the advice
    assert "Traceback" not in output


@pytest.mark.spec("OPERATION-24")
async def test_a_second_coordinator_on_a_database_is_told(tmp_path: Path) -> None:
    database = f"sqlite:///{(tmp_path / 'c.db').as_posix()}"
    async with running(database_url=database) as coordinator:
        code, output = await start(
            tmp_path,
            programs.command("ollama-coordinator"),
            COORDINATOR_PORT=str(programs.free_port()),
            DATABASE_URL=database,
        )
        assert code == 1
        assert output.splitlines()[-1].startswith(f"Error: database {tmp_path / 'c.db'}: another")
        assert "stop that one, or give another DATABASE_URL" in output
        assert (await coordinator.get("/healthz"))["database"] == "ok"


@pytest.mark.spec("OPERATION-8")
async def test_health_counts_what_there_is() -> None:
    async with running() as coordinator, StandIn() as ollama:
        await coordinator.register(ollama)
        ollama.hold()
        asked = asyncio.create_task(coordinator.chat())
        await ollama.seen.wait_for(lambda seen: seen.held == 1)
        health = await coordinator.get("/healthz")
        counted = {key: health[key] for key in ("agents", "agents_online", "in_flight", "waiting")}
        assert counted == {"agents": 1, "agents_online": 1, "in_flight": 1, "waiting": 0}
        queued = asyncio.create_task(coordinator.chat())
        await coordinator.until(lambda: coordinator.parts.scheduler.waiting_count() == 1)
        assert (await coordinator.get("/healthz"))["waiting"] == 1
        assert (await coordinator.get("/readyz"))["status"] == "ok"
        coordinator.parts.stopping = True
        async with coordinator.session.get(f"{coordinator.url}/readyz") as response:
            assert response.status == 503
        ollama.release()
        await asyncio.gather(asked, queued)


async def register(url: str, ollama: StandIn) -> None:
    facts = {
        "machine_name": "first",
        "ip_address": "127.0.0.1",
        "ollama_version": "0.33.0",
        "ollama_port": ollama.port,
    }
    async with aiohttp.ClientSession() as session:
        async with session.post(f"{url}/api/agents", json=facts) as response:
            assert response.status == 201


@pytest.mark.spec("OPERATION-9")
async def test_a_request_to_stop_lets_answers_finish(tmp_path: Path) -> None:
    async with StandIn() as ollama:
        async with programs.coordinator(tmp_path, programs.free_port()) as (url, program):
            await register(url, ollama)
            ollama.hold(after=1)
            async with aiohttp.ClientSession() as session:
                async with session.post(f"{url}/api/chat", json=CHAT) as response:
                    await response.content.readline()
                    program.send(programs.TERMINATE)
                    async with asyncio.timeout(DEADLINE_SECONDS):
                        while "coordinator stops" not in program.output:
                            await asyncio.sleep(0.01)
                    ollama.release()
                    last = (await response.content.read()).splitlines()[-1]
            assert json.loads(last)["done"] is True
            assert await program.ended() == 0


@pytest.mark.spec("OPERATION-9")
@pytest.mark.spec("DASH-17")
@pytest.mark.parametrize("how", ["time-out", "changed time-out", "second signal"])
async def test_answers_that_do_not_finish_end_with_an_error_record(
    tmp_path: Path, how: str
) -> None:
    patience = {
        "time-out": {"COORDINATOR_DRAIN_TIMEOUT": "0.2"},
        "second signal": {"COORDINATOR_DRAIN_TIMEOUT": "300"},
    }.get(how, {})
    async with StandIn() as ollama:
        port = programs.free_port()
        async with programs.coordinator(tmp_path, port, **patience) as (url, program):
            await register(url, ollama)
            ollama.hold(after=1)
            async with aiohttp.ClientSession() as session:
                if how == "changed time-out":
                    wanted = {"drain_timeout": 0.2}
                    async with session.patch(f"{url}/api/settings", json=wanted) as changed:
                        assert changed.status == 200
                async with session.post(f"{url}/api/chat", json=CHAT) as response:
                    await response.content.readline()
                    program.send(programs.INTERRUPT)
                    if how == "second signal":
                        async with asyncio.timeout(DEADLINE_SECONDS):
                            while "coordinator stops" not in program.output:
                                await asyncio.sleep(0.01)
                        program.send(programs.INTERRUPT)
                    last = (await response.content.read()).splitlines()[-1]
            assert "shutting down" in json.loads(last)["error"]
            assert await program.ended() == 0
            assert "Traceback" not in program.output
