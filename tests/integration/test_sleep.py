"""Machines that sleep: they are not broken, and a request that only they can serve wakes one."""

import asyncio
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from integration.test_agent_and_coordinator import view
from integration.test_operate import answer, run
from ollama_coordinator import wake
from ollama_coordinator.wake import magic_packet
from ollama_coordinator_agent import daemon
from ollama_coordinator_common.settings import AgentConfig
from support import agent_world, programs
from support.coordinator import Running, running
from support.deadline import DEADLINE_SECONDS
from support.ollama import StandIn

MAC = "00:1a:2b:3c:4d:5e"


@pytest.fixture
def card() -> Iterator[socket.socket]:
    """The network card of a machine that sleeps."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.setblocking(False)
        yield receiver


def place(card: socket.socket) -> str:
    return f"127.0.0.1:{card.getsockname()[1]}"


async def heard(card: socket.socket) -> bytes:
    async with asyncio.timeout(DEADLINE_SECONDS):
        return await asyncio.get_running_loop().sock_recv(card, 2000)


async def asleep(coordinator: Running, ollama: StandIn, name: str, **more: Any) -> str:
    """The id of an agent whose machine went to sleep."""
    agent_id = await coordinator.register(ollama, name, **more)
    tags = {"models": [{"name": "llama3.2:latest", "digest": "d" * 64}]}
    assert await coordinator.heartbeat(agent_id, tags=tags) == 200
    assert await coordinator.heartbeat(agent_id, leaving=True, asleep=True) == 200
    return agent_id


@pytest.mark.spec("FLEET-82")
async def test_a_request_that_only_a_sleeper_can_serve_wakes_it_and_is_served(
    card: socket.socket,
) -> None:
    async with running(wake_to=(place(card),)) as coordinator, StandIn() as ollama:
        agent_id = await asleep(coordinator, ollama, "desk", mac=MAC)
        row = await coordinator.get(f"/api/agents/{agent_id}")
        assert (row["status"], row["asleep"]) == ("offline", True)
        assert await coordinator.get("/api/attention") == {"attention": []}
        chat = asyncio.create_task(coordinator.chat())
        assert await heard(card) == magic_packet(MAC)
        assert (await coordinator.get(f"/api/agents/{agent_id}"))["waking"]
        (waiting,) = await coordinator.get("/api/requests")
        assert (waiting["state"], waiting["waits_for"]) == ("waiting", "desk")
        body = {"model": "llama3.2", "messages": []}
        status, explained = await coordinator.post("/api/explain", body)
        assert status == 200
        assert "magic packet" in explained["candidates"][0]["refused"]
        assert await coordinator.heartbeat(agent_id) == 200
        assert (await chat)[0] == 200
        row = await coordinator.get(f"/api/agents/{agent_id}")
        assert (row["asleep"], row["waking"]) == (False, False)


@pytest.mark.spec("FLEET-82")
async def test_a_machine_that_does_not_come_is_given_up_and_then_left_alone(
    card: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wake, "AGAIN_SECONDS", 0.1)
    settings: dict[str, Any] = {"wake_patience": 1.0, "wake_to": (place(card),)}
    async with running(**settings) as coordinator, StandIn() as ollama:
        await asleep(coordinator, ollama, "desk", mac=MAC)
        status, error = await coordinator.chat()
        assert status == 503
        assert "desk: asleep" in error["error"]
        assert await heard(card) == await heard(card) == magic_packet(MAC)  # one may be lost
        await coordinator.until(lambda: not any(a.woken_at for a in coordinator.parts.registry))
        while True:
            try:
                card.recv(2000)
            except BlockingIOError:
                break
        assert (await coordinator.chat())[0] == 503
        with pytest.raises(BlockingIOError):
            card.recv(2000)


@pytest.mark.spec("FLEET-82")
async def test_nobody_waits_for_a_sleeper_where_another_serves_or_no_card_is_known(
    card: socket.socket,
) -> None:
    async with running(wake_to=(place(card),)) as coordinator, StandIn() as ollama:
        agent_id = await asleep(coordinator, ollama, "no-card")
        assert (await coordinator.chat())[0] == 503
        await coordinator.parts.agent_store.forget(coordinator.agent(agent_id).id)
        coordinator.parts.registry.remove(coordinator.agent(agent_id).id)
        async with StandIn() as spare:
            await asleep(coordinator, ollama, "desk", mac=MAC)
            await coordinator.register(spare, "awake")
            assert (await coordinator.chat())[0] == 200
        with pytest.raises(BlockingIOError):
            card.recv(2000)


@pytest.mark.spec("FLEET-83")
async def test_an_operator_wakes_a_machine_by_the_api_and_the_command_line(
    card: socket.socket,
) -> None:
    async with running(wake_to=(place(card),)) as coordinator, StandIn() as ollama:
        agent_id = await asleep(coordinator, ollama, "desk", mac=MAC)
        assert "asleep" in (await run(coordinator, "agents"))[1]
        said = (0, "desk: woken; it is there once its agent reports\n")
        assert await run(coordinator, "agents", "wake", "desk") == said
        assert await heard(card) == magic_packet(MAC)
        assert (await answer(coordinator, "agents", "wake", "desk"))["waking"]
        assert await heard(card) == magic_packet(MAC)
        status, row = await coordinator.post(f"/api/agents/{agent_id}/wake", {})
        assert (status, row["waking"]) == (202, True)
        assert await heard(card) == magic_packet(MAC)
        assert await coordinator.heartbeat(agent_id) == 200
        status, error = await coordinator.post(f"/api/agents/{agent_id}/wake", {})
        assert (status, error["error"]) == (409, "desk is awake")
        assert (await coordinator.post("/api/agents/nobody/wake", {}))[0] == 404
        async with StandIn() as other:
            plain = await asleep(coordinator, other, "plain")
            status, error = await coordinator.post(f"/api/agents/{plain}/wake", {})
        assert status == 409
        assert "network card is not known" in error["error"]


@pytest.mark.spec("FLEET-81")
async def test_who_slept_when_the_coordinator_ended_still_sleeps_afterwards(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/c.db"
    async with StandIn() as ollama, StandIn() as other:
        async with running(database_url=url) as coordinator:
            await asleep(coordinator, ollama, "desk", mac=MAC)
            stopped = await coordinator.register(other, "stopped", sleeps=True)
            assert await coordinator.heartbeat(stopped, leaving=True) == 200
        async with running(database_url=url) as coordinator:
            rows = await coordinator.get("/api/agents")
            assert {row["machine_name"]: row["asleep"] for row in rows} == {
                "desk": True,
                "stopped": False,
            }


@pytest.mark.spec("FLEET-81")
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="Windows stops no process")
async def test_an_agent_that_is_stopped_while_its_machine_runs_is_not_asleep(
    tmp_path: Path,
) -> None:
    async with running(agent_timeout=2.0) as coordinator, StandIn() as ollama:
        (tmp_path / f"agent-{ollama.port}.json").write_text('{"slept": true}')
        command = (sys.executable, "-m", "support.agent_world")
        facts = (coordinator.url, str(ollama.port), str(tmp_path))
        path = {"PYTHONPATH": str(Path(__file__).parents[1])}
        async with programs.program(tmp_path / "log", *command, *facts, **path) as program:
            row = await view(coordinator, lambda agent: agent["cpu_usage"] is not None)
            assert coordinator.agent(row["id"]).registration.sleeps
            program.send(signal.SIGSTOP)
            try:
                await view(coordinator, lambda agent: agent["status"] == "offline")
                await asyncio.sleep(0.2)  # a connection to this machine is made in less
                assert not (await coordinator.get(f"/api/agents/{row['id']}"))["asleep"]
            finally:
                program.send(signal.SIGCONT)
            await view(coordinator, lambda agent: agent["status"] == "online")


INHIBIT = """#!/bin/sh
while ! [ -e {folder}/sleeps ]; do sleep 0.02; done
rm {folder}/sleeps
echo "/org/freedesktop/login1: org.freedesktop.login1.Manager.PrepareForSleep (true,)"
sleep 600
"""


@pytest.mark.spec("AGENT-76")
@pytest.mark.skipif(sys.platform != "linux", reason="logind is Linux'")
async def test_an_agent_says_goodbye_before_its_machine_sleeps_and_is_back_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("systemd-inhibit", "gdbus"):
        (tmp_path / name).write_text(INHIBIT.format(folder=tmp_path))
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    clock = [0.0]
    monkeypatch.setattr(daemon, "seconds_asleep", lambda: clock[0])
    async with running() as coordinator, StandIn() as ollama:
        config = AgentConfig(
            coordinator_url=coordinator.url, ollama_port=ollama.port, machine_name="desk",
            state_dir=tmp_path / "state", manage_ollama=False,
        )  # fmt: skip
        async with agent_world.running(config):
            await view(coordinator, lambda agent: agent["cpu_usage"] is not None)
            (tmp_path / "sleeps").touch()
            await view(coordinator, lambda agent: agent["asleep"])
            await asyncio.sleep(0.3)  # three heartbeats
            row = await view(coordinator, lambda agent: agent["asleep"])
            clock[0] += 3600.0
            await view(coordinator, lambda agent: agent["status"] == "online")
            known = coordinator.agent(row["id"])
            await coordinator.until(lambda: known.registration.sleeps)
        await view(coordinator, lambda agent: agent["status"] == "offline")
        assert not known.asleep  # it was stopped, and said so
