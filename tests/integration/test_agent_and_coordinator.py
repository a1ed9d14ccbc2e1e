"""The real agent program and the real coordinator, with nothing between them but the network."""

import asyncio
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from support import programs
from support.coordinator import Running, running
from support.deadline import DEADLINE_SECONDS
from support.ollama import Model, StandIn


@asynccontextmanager
async def agent(
    folder: Path,
    coordinator_url: str,
    ollama: StandIn,
    command: str = "run",
    **environment: str,
) -> AsyncIterator[programs.Program]:
    settings = {
        "COORDINATOR_URL": coordinator_url,
        "OLLAMA_PORT": str(ollama.port),
        "AGENT_STATE_DIR": str(folder / "state"),
        "AGENT_MACHINE_NAME": "real",
        "AGENT_MANAGE_OLLAMA": "false",
        **environment,
    }
    program = programs.command("ollama-coordinator-agent")
    async with programs.program(folder / f"{command}.log", program, command, **settings) as started:
        yield started


async def view(coordinator: Running, condition: Any) -> dict[str, Any]:
    """The agent's view once it meets a condition."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while True:
            agents = await coordinator.get("/api/agents")
            if agents and condition(agents[0]):
                return dict(agents[0])
            await asyncio.sleep(0.02)


@pytest.mark.spec("FLEET-11")
@pytest.mark.spec("FLEET-12")
async def test_an_agent_brings_its_machine_into_the_fleet_and_takes_it_out(tmp_path: Path) -> None:
    async with running() as coordinator, StandIn() as ollama:
        async with agent(tmp_path, coordinator.url, ollama) as program:
            seen = await view(coordinator, lambda agent: agent["cpu_usage"] is not None)
            assert seen["machine_name"] == "real"
            assert seen["models"] == ["llama3.2:latest"]
            assert coordinator.agent(seen["id"]).brings_inventory
            assert (await coordinator.chat())[0] == 200
            await view(coordinator, lambda agent: agent["loaded_models"] == ["llama3.2:latest"])
            ollama.models.add(Model("fresh"))
            await view(coordinator, lambda agent: "fresh:latest" in agent["models"])
            await ollama.kill()
            await view(coordinator, lambda agent: not agent["ollama_running"])
            await ollama.start()
            await view(coordinator, lambda agent: agent["ollama_running"])
            program.send(programs.TERMINATE)
            assert await program.ended() == 0
            await view(coordinator, lambda agent: agent["status"] == "offline")


@pytest.mark.spec("FLEET-10")
async def test_an_agent_that_was_forgotten_registers_again(tmp_path: Path) -> None:
    async with running() as coordinator, StandIn() as ollama:
        async with agent(tmp_path, coordinator.url, ollama):
            seen = await view(coordinator, lambda agent: agent["cpu_usage"] is not None)
            url = f"{coordinator.url}/api/agents/{seen['id']}"
            async with coordinator.session.delete(url) as response:
                assert response.status == 204
            ollama.models.add(Model("news"))  # what it reports at once
            again = await view(coordinator, lambda agent: "news:latest" in agent["models"])
            assert again["machine_name"] == "real"


@pytest.mark.spec("AGENT-4")
@pytest.mark.spec("FLEET-28")
async def test_a_machine_that_the_coordinator_cannot_reach_learns_it(tmp_path: Path) -> None:
    elsewhere = {"AGENT_IP_ADDRESS": "127.0.0.2", "AGENT_RELAY": "never", "COLUMNS": "200"}
    elsewhere["AGENT_TRANSPORT"] = "direct"
    async with running() as coordinator, StandIn() as ollama:
        async with agent(tmp_path, coordinator.url, ollama, **elsewhere) as program:
            seen = await view(coordinator, lambda agent: agent["out_of_rotation"] is not None)
            said = f"but it sends no requests to http://127.0.0.2:{ollama.port}: "
            assert seen["ollama_running"]
            await program.says(f"connected, {said}")
            async with agent(tmp_path, coordinator.url, ollama, "status", **elsewhere) as status:
                assert await status.ended() == 1
                assert f"reachable, {said}" in " ".join(status.output.split())


@pytest.mark.spec("AGENT-4")
async def test_status_looks_at_a_coordinator_that_asks_for_keys(tmp_path: Path) -> None:
    token = "oc1.-.oc_" + "x" * 43
    async with running(access="keys", join_token=token) as coordinator, StandIn() as ollama:
        with_token = {"AGENT_JOIN_TOKEN": token}
        async with agent(tmp_path, coordinator.url, ollama, **with_token):
            await coordinator.until(lambda: any(one.heard_at for one in coordinator.parts.registry))
            # The machine's secret is enough once it has joined; the token opens it before.
            async with agent(tmp_path, coordinator.url, ollama, "status") as status:
                assert await status.ended() == 0, status.output
            elsewhere = {**with_token, "AGENT_STATE_DIR": str(tmp_path / "new")}
            async with agent(tmp_path, coordinator.url, ollama, "status", **elsewhere) as status:
                assert await status.ended() == 1
                assert "not registered" in " ".join(status.output.split())
        assert not (tmp_path / "new").exists()


@pytest.mark.spec("AGENT-4")
async def test_a_machine_that_drains_is_as_its_operator_wants_it(tmp_path: Path) -> None:
    async with running() as coordinator, StandIn() as ollama:
        async with agent(tmp_path, coordinator.url, ollama):
            seen = await view(coordinator, lambda agent: agent["cpu_usage"] is not None)
            url = f"{coordinator.url}/api/agents/{seen['id']}"
            async with coordinator.session.patch(url, json={"draining": True}) as response:
                assert response.status == 200
            async with agent(tmp_path, coordinator.url, ollama, "status") as status:
                assert await status.ended() == 0, status.output


@pytest.mark.skipif(sys.platform != "linux", reason="needs a second loopback address")
@pytest.mark.spec("FLEET-26")
@pytest.mark.spec("FLEET-28")
async def test_copies_of_one_disk_are_two_agents_and_told(tmp_path: Path) -> None:
    async with running() as coordinator, StandIn() as here:
        async with agent(tmp_path, coordinator.url, here) as program:
            await view(coordinator, lambda agent: agent["cpu_usage"] is not None)
            program.send(programs.TERMINATE)
            assert await program.ended() == 0
        other = tmp_path / "copy"
        shutil.copytree(tmp_path, other)
        async with (
            StandIn(host="127.0.0.2", port=here.port) as there,
            agent(tmp_path, coordinator.url, here, AGENT_IP_ADDRESS="127.0.0.1"),
        ):
            first = await view(coordinator, lambda agent: agent["status"] == "online")
            async with agent(
                other,
                coordinator.url,
                there,
                AGENT_IP_ADDRESS="127.0.0.2",
                OLLAMA_HOST="127.0.0.2",
            ) as second:
                await coordinator.until(lambda: len(coordinator.parts.registry) == 2)
                rows = await coordinator.get("/api/agents")
                assert {row["ip_address"] for row in rows} == {"127.0.0.1", "127.0.0.2"}
                assert all(row["machine_name"] == "real" for row in rows)
                assert all("same machine id" in row["conflict"] for row in rows)
                for _ in range(4):
                    assert (await coordinator.chat())[0] == 200
                await second.says("connected, but this machine (127.0.0.2) has the same machine id")
                async with agent(tmp_path, coordinator.url, here, "status") as status:
                    assert await status.ended() == 1
                    assert "same machine id" in " ".join(status.output.split())
                second.send(programs.TERMINATE)
                assert await second.ended() == 0
            kept = await coordinator.get(f"/api/agents/{first['id']}")
            assert kept["ip_address"] == "127.0.0.1"
            assert kept["conflict"] is None
