"""A disk that is really full: nothing ends, requests are served, and it is said once."""

import asyncio
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from support import programs
from support.deadline import DEADLINE_SECONDS
from support.disks import disk, fill
from support.ollama import StandIn

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

CHAT = {
    "model": "llama3.2",
    "messages": [{"role": "user", "content": "hello"}],
    "stream": False,
}


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A disk of two mebibytes."""
    with disk(tmp_path / "disk", 2048) as folder:
        yield folder


class Client:
    """What an operator and a client ask a coordinator for."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.session = session
        self.url = url

    async def register(self, ollama: StandIn, name: str) -> int:
        facts = {
            "machine_name": name,
            "ip_address": "127.0.0.1",
            "ollama_version": "0.33.0",
            "ollama_port": ollama.port,
        }
        async with self.session.post(f"{self.url}/api/agents", json=facts) as response:
            return response.status

    async def chat(self) -> int:
        async with self.session.post(f"{self.url}/api/chat", json=CHAT) as response:
            await response.read()
            return response.status

    async def get(self, path: str) -> Any:
        async with self.session.get(self.url + path) as response:
            return await response.json()

    async def until_database(self, told: str) -> None:
        """Wait until the coordinator says this of its database."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            while told not in (await self.get("/healthz"))["database"]:
                await self.chat()

    async def upload(self, content: bytes) -> tuple[int, str]:
        digest = hashlib.sha256(content).hexdigest()
        url = f"{self.url}/api/blobs/sha256:{digest}"
        async with self.session.post(url, data=io.BytesIO(content)) as response:
            return response.status, await response.text()


def complaints(program: programs.Program) -> list[str]:
    return [line for line in program.output.splitlines() if " WARNING " in line or "ERROR" in line]


@pytest.mark.spec("OPERATION-6")
async def test_a_coordinator_outlives_a_full_disk(tiny: Path, tmp_path: Path) -> None:
    settings = {"DATABASE_URL": f"sqlite:///{tiny.as_posix()}/c.db"}
    port = programs.free_port()
    async with (
        StandIn(slots=4) as one,
        StandIn(slots=4) as other,
        aiohttp.ClientSession() as session,
    ):
        async with programs.coordinator(tmp_path, port, **settings) as (url, program):
            client = Client(session, url)
            assert await client.register(one, "one") == 201
            filler = fill(tiny)
            await client.until_database("the disk is full; free some space")
            assert await client.register(other, "other") == 201
            assert {await client.chat() for _ in range(20)} == {200}
            assert (await client.get("/api/history"))["requests"] is not None
            told = complaints(program)
            assert len(told) == 1, told
            assert "database not writable; going on from memory" in told[0]
            filler.unlink()
            await client.until_database("ok")
            await program.says("database writable again")
            fill(tiny)
            await client.until_database("full")
            program.send(programs.TERMINATE)
            assert await program.ended() == 0
            assert "Traceback" not in program.output
        (tiny / "filler").unlink()
        async with programs.coordinator(tmp_path, port, **settings) as (url, _):
            names = {
                agent["machine_name"] for agent in await Client(session, url).get("/api/agents")
            }
            assert names == {"one", "other"}


@pytest.mark.spec("OPERATION-5")
async def test_a_start_on_a_full_disk_is_an_error_that_says_what_to_do(
    tiny: Path, tmp_path: Path
) -> None:
    fill(tiny)
    settings = {"DATABASE_URL": f"sqlite:///{tiny.as_posix()}/c.db", "COORDINATOR_PORT": "0"}
    command = programs.command("ollama-coordinator")
    async with programs.program(tmp_path / "log", command, **settings) as program:
        assert await program.ended() == 1
        assert "the disk is full; free some space" in program.output
        assert "Traceback" not in program.output


@pytest.mark.spec("OPERATION-6")
async def test_an_upload_that_fills_the_disk_is_refused(tiny: Path, tmp_path: Path) -> None:
    settings = {"DATABASE_URL": f"sqlite:///{tiny.as_posix()}/c.db"}
    async with StandIn() as ollama, aiohttp.ClientSession() as session:
        port = programs.free_port()
        async with programs.coordinator(tmp_path, port, **settings) as (url, program):
            client = Client(session, url)
            assert await client.register(ollama, "one") == 201
            status, text = await client.upload(bytes(8 * 1024 * 1024))
            assert status == 507
            assert "free some disk" in text
            assert await client.chat() == 200
            # What came of it is gone, so that what fits is taken.
            assert (await client.upload(bytes(100_000)))[0] == 201
            assert "Traceback" not in program.output


@pytest.mark.spec("AGENT-20")
async def test_an_agent_outlives_a_full_disk(tiny: Path, tmp_path: Path) -> None:
    fill(tiny)
    async with StandIn() as ollama, aiohttp.ClientSession() as session:
        port = programs.free_port()
        async with programs.coordinator(tmp_path, port) as (url, _):
            settings = {
                "COORDINATOR_URL": url,
                "OLLAMA_PORT": str(ollama.port),
                "AGENT_STATE_DIR": str(tiny / "state"),
                "AGENT_MANAGE_OLLAMA": "false",
                "AGENT_RELAY": "always",
            }
            command = (programs.command("ollama-coordinator-agent"), "run")
            async with programs.program(tmp_path / "agent.log", *command, **settings) as agent:
                client = Client(session, url)
                async with asyncio.timeout(DEADLINE_SECONDS):
                    while await client.chat() != 200:
                        await asyncio.sleep(0.05)
                told = complaints(agent)
                assert len(told) == 1, told
                assert "the machine id cannot be kept" in told[0]
                agent.send(programs.TERMINATE)
                assert await agent.ended() == 0
                assert "Traceback" not in agent.output
