"""Several coordinators with one PostgreSQL: one leads, all answer, each may die."""

import asyncio
import io
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from ollama_coordinator_common.settings import AgentConfig
from support import agent_world, programs
from support.databases import PostgresSchema
from support.deadline import DEADLINE_SECONDS
from support.line import Line
from support.ollama import StandIn

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals there are another matter")

CHAT = {"model": "llama3.2", "messages": [{"role": "user", "content": "hello"}]}


class Coordinator:
    """One of the programs."""

    def __init__(self, url: str, program: programs.Program, session: aiohttp.ClientSession) -> None:
        self.url = url
        self.program = program
        self.session = session

    async def get(self, path: str, **headers: str) -> Any:
        async with self.session.get(self.url + path, headers=headers) as response:
            assert response.status == 200, await response.text()
            return await response.json()

    async def chat(self, **more: Any) -> tuple[int, Any]:
        body = {**CHAT, "stream": False, **more}
        async with self.session.post(f"{self.url}/api/chat", json=body) as response:
            return response.status, await response.json()

    async def register(self, ollama: StandIn, name: str) -> str:
        facts = {
            "machine_name": name,
            "ip_address": "127.0.0.1",
            "ollama_version": ollama.settings.version,
            "ollama_port": ollama.port,
        }
        async with self.session.post(f"{self.url}/api/agents", json=facts) as response:
            assert response.status == 201, await response.text()
            return str((await response.json())["agent_id"])

    async def leads(self, *, epoch: int) -> None:
        """Wait until it leads."""
        await self.program.says(f"epoch={epoch}")
        async with asyncio.timeout(DEADLINE_SECONDS):
            while True:
                async with self.session.get(f"{self.url}/readyz") as response:
                    if response.status == 200:
                        return
                await asyncio.sleep(0.01)


@asynccontextmanager
async def started(folder: Path, url: str, **settings: str) -> AsyncIterator[Coordinator]:
    folder.mkdir()
    settings = {"DATABASE_URL": url, "COORDINATOR_LOG_LEVEL": "INFO", **settings}
    port = programs.free_port()
    async with (
        programs.coordinator(folder, port, **settings) as (base, program),
        aiohttp.ClientSession() as session,
    ):
        yield Coordinator(base, program, session)


@asynccontextmanager
async def cluster(folder: Path, url: str, count: int = 2) -> AsyncIterator[list[Coordinator]]:
    """So many coordinators; the first one leads."""
    async with AsyncExitStack() as stack:
        made = []
        for number in range(count):
            coordinator = await stack.enter_async_context(started(folder / str(number), url))
            await coordinator.program.says("stands by" if number else "coordinator leads")
            made.append(coordinator)
        yield made


@pytest.fixture
async def pair(tmp_path: Path, postgres: PostgresSchema) -> AsyncIterator[list[Coordinator]]:
    async with cluster(tmp_path, postgres.url) as made:
        yield made


@pytest.fixture
async def ollama() -> AsyncIterator[StandIn]:
    async with StandIn() as ollama:
        yield ollama


@pytest.mark.spec("CLUSTER-1")
@pytest.mark.spec("CLUSTER-2")
async def test_any_coordinator_answers_anything(pair: list[Coordinator], ollama: StandIn) -> None:
    first, second = pair
    agent_id = await second.register(ollama, "by-the-second")
    assert [agent["machine_name"] for agent in await first.get("/api/agents")] == ["by-the-second"]
    for one in pair:
        assert (await one.chat())[0] == 200
        health = await one.get("/healthz")
        assert health["leader"]["url"] == first.url
        assert health["leader"]["epoch"] == 1
    async with asyncio.timeout(DEADLINE_SECONDS):
        while len(health["coordinators"]) < 2:
            await asyncio.sleep(0.01)
            health = await second.get("/healthz")
    assert {each["url"] for each in health["coordinators"]} == {each.url for each in pair}
    async with second.session.post(f"{second.url}/api/chat", json=CHAT) as response:
        assert response.content_type == "application/x-ndjson"
        assert (await response.read()).endswith(b"}\n")
    async with second.session.head(second.url) as response:
        assert (response.status, await response.read()) == (200, b"")
    async with second.session.get(f"{second.url}/api/none") as response:
        assert (response.status, await response.text()) == (404, "404 page not found")
    async with second.session.delete(f"{second.url}/api/agents/{agent_id}") as response:
        assert response.status == 204
    assert await first.get("/api/agents") == []


@pytest.mark.spec("CLUSTER-2")
async def test_a_large_body_passes_whole(pair: list[Coordinator], ollama: StandIn) -> None:
    _, second = pair
    await second.register(ollama, "one")
    text = "long " * 300_000
    body = {**CHAT, "messages": [{"role": "user", "content": text}], "stream": False}
    sent = json.dumps(body).encode()
    async with second.session.post(f"{second.url}/api/chat", data=io.BytesIO(sent)) as response:
        assert response.status == 200, await response.text()
    assert json.loads(ollama.seen.last.body) == body


@pytest.mark.spec("CLUSTER-2")
async def test_a_client_that_leaves_a_front_ends_its_request(
    pair: list[Coordinator], ollama: StandIn
) -> None:
    first, second = pair
    await second.register(ollama, "one")
    ollama.hold(after=1)
    async with second.session.post(f"{second.url}/api/chat", json=CHAT) as response:
        await response.content.readline()
        assert (await first.get("/healthz"))["in_flight"] == 1
        response.close()
    async with asyncio.timeout(DEADLINE_SECONDS):
        while (await first.get("/healthz"))["in_flight"]:
            await asyncio.sleep(0.01)


@pytest.mark.spec("CLUSTER-3")
async def test_a_request_has_its_own_clients_address_and_nobody_else_may_name_one(
    pair: list[Coordinator], ollama: StandIn
) -> None:
    first, second = pair
    await second.register(ollama, "one")
    connector = aiohttp.TCPConnector(local_addr=("127.0.0.9", 0))
    async with aiohttp.ClientSession(connector=connector) as session:
        for one in pair:
            headers = {"X-Ollama-Coordinator-Front": "guessed 10.1.2.3 4567"}
            async with session.post(
                f"{one.url}/api/chat", json={**CHAT, "stream": False}, headers=headers
            ) as response:
                # A front takes it for another one's, and says that it does not lead.
                assert response.status == (200 if one is first else 503)
        async with session.post(f"{second.url}/api/chat", json=CHAT) as response:
            await response.read()
    async with asyncio.timeout(DEADLINE_SECONDS):
        while len(rows := (await first.get("/api/history"))["requests"]) < 2:
            await asyncio.sleep(0.01)
    assert {row["client"] for row in rows} == {"127.0.0.9"}


@pytest.mark.spec("CLUSTER-4")
async def test_when_the_leader_is_killed_another_one_leads_and_knows_all(
    tmp_path: Path, postgres: PostgresSchema, ollama: StandIn
) -> None:
    async with cluster(tmp_path, postgres.url, 3) as [first, *others]:
        await others[0].register(ollama, "kept")
        async with others[0].session.post(
            f"{others[0].url}/api/keys", json={"name": "anna"}
        ) as response:
            assert response.status == 201
        first.program.send(signal.SIGKILL)
        # Those that come meanwhile wait.
        answers = await asyncio.gather(*(one.chat() for one in others for _ in range(5)))
        assert [status for status, _ in answers] == [200] * 10
        health = await others[0].get("/healthz")
        assert health["leader"]["epoch"] == 2
        assert health["leader"]["url"] in [one.url for one in others]
        assert (await others[1].get("/api/agents"))[0]["machine_name"] == "kept"
        assert [key["name"] for key in (await others[1].get("/api/keys"))["keys"]] == ["anna"]


@pytest.mark.spec("CLUSTER-4")
async def test_a_frozen_leader_is_replaced_and_follows_when_it_thaws(
    pair: list[Coordinator], ollama: StandIn
) -> None:
    first, second = pair
    await second.register(ollama, "one")
    first.program.send(signal.SIGSTOP)
    assert (await second.chat())[0] == 200
    await second.leads(epoch=2)
    first.program.send(signal.SIGCONT)
    await first.program.says("another coordinator leads now")
    await first.program.says("stands by")
    assert (await first.chat())[0] == 200
    assert (await first.get("/healthz"))["leader"]["url"] == second.url


@pytest.mark.spec("CLUSTER-5")
async def test_a_leader_that_stops_gives_way_at_once_and_ends_its_answers(
    pair: list[Coordinator], ollama: StandIn
) -> None:
    first, second = pair
    await second.register(ollama, "one")
    ollama.hold(after=1)
    async with first.session.post(f"{first.url}/api/chat", json=CHAT) as response:
        await response.content.readline()
        first.program.send(programs.TERMINATE)
        await second.leads(epoch=2)
        ollama.release()
        assert (await second.chat())[0] == 200
        assert b'"done":true' in await response.read()
    assert await first.program.ended() == 0
    async with asyncio.timeout(DEADLINE_SECONDS):
        while len((await second.get("/api/history"))["requests"]) < 2:
            await asyncio.sleep(0.01)


@pytest.mark.spec("CLUSTER-6")
async def test_a_database_that_comes_back_changes_no_leader(
    tmp_path: Path, postgres: PostgresSchema, ollama: StandIn
) -> None:
    async with (
        Line(postgres.url) as line,
        cluster(tmp_path, line.url) as [first, second],
    ):
        await second.register(ollama, "one")
        line.cut()
        await first.program.says("database not writable")
        await second.program.says("cannot see who leads")
        assert (await second.chat())[0] == 200
        await line.mend()
        await first.program.says("database writable again")
        assert (await second.chat())[0] == 200
        assert (await second.get("/healthz"))["leader"]["epoch"] == 1


@pytest.mark.spec("CLUSTER-7")
async def test_a_linked_agent_is_served_by_way_of_a_front(
    pair: list[Coordinator], tmp_path: Path, ollama: StandIn
) -> None:
    first, second = pair
    settings = AgentConfig(
        coordinator_url=second.url, ollama_port=ollama.port, state_dir=tmp_path / "agent",
        machine_name="linked", transport="link", manage_ollama=False,
    )  # fmt: skip
    async with agent_world.running(settings), asyncio.timeout(DEADLINE_SECONDS):
        while (await second.chat())[0] != 200:
            await asyncio.sleep(0.01)
        await first.program.says("agent's link is open")
        first.program.send(signal.SIGKILL)
        await second.leads(epoch=2)
        while (await second.chat())[0] != 200:
            await asyncio.sleep(0.01)


@pytest.mark.spec("CLUSTER-8")
async def test_without_a_leader_a_request_is_told_to_come_again(
    tmp_path: Path, postgres: PostgresSchema
) -> None:
    async with cluster(tmp_path, postgres.url) as [first, second]:
        postgres.ask("ALTER SCHEMA " + postgres.schema + " RENAME TO gone")
        os.kill(first.program.pid, signal.SIGKILL)
        try:
            async with second.session.get(f"{second.url}/readyz") as response:
                assert response.status == 503
                assert "leads now" in (await response.json())["error"]
        finally:
            postgres.ask("ALTER SCHEMA gone RENAME TO " + postgres.schema)
        await second.leads(epoch=2)
        assert (await second.get("/readyz"))["status"] == "ok"
