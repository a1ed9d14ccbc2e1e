"""What survives a restart, an unwritable database, and a kill -9."""

import asyncio
import functools
import sqlite3
from pathlib import Path

import aiohttp
import pytest

from ollama_coordinator.access import KeyRing, NewKey
from ollama_coordinator.aliases import Aliases
from ollama_coordinator.db import DatabaseError
from ollama_coordinator.operations import Deferred
from ollama_coordinator.registry import Registry
from support import programs
from support.coordinator import running
from support.databases import PostgresSchema, Space, SqliteFile, agent_ids, store_of
from support.deadline import DEADLINE_SECONDS
from support.line import Line
from support.ollama import StandIn


@pytest.mark.spec("FLEET-19")
@pytest.mark.spec("FLEET-20")
async def test_a_restarted_coordinator_knows_its_agents_and_serves_at_once(database: Space) -> None:
    async with StandIn() as ollama:
        async with running(database_url=database.url) as coordinator:
            agent_id = await coordinator.register(ollama, "kept")
            patch = {"display_name": "Kept", "labels": ["gpu"], "notes": "rack 3"}
            told = {"slots": 2, "memory_bytes": 2**34, "gpu": "none"}
            url = f"{coordinator.url}/api/agents/{agent_id}"
            async with coordinator.session.patch(url, json={**patch, **told}):
                pass
        async with running(database_url=database.url) as coordinator:
            assert (await coordinator.chat())[0] == 200
            view = await coordinator.get(f"/api/agents/{agent_id}")
            assert view["status"] == "online"
            assert {key: view[key] for key in patch} == patch
            assert view["by_hand"] == told
            assert await coordinator.heartbeat(agent_id) == 200


@pytest.mark.spec("OPERATION-3")
async def test_the_log_names_the_file_that_was_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the program starts in the folder that this one is in
    port = programs.free_port()
    url = "sqlite://coordinator.db"
    async with programs.coordinator(tmp_path, port, DATABASE_URL=url) as (_, program):
        await program.says("coordinator listens")
        await program.says(f"database={tmp_path / 'coordinator.db'}")


@pytest.mark.spec("FLEET-20")
async def test_an_agent_silent_for_long_is_back_when_its_ollama_answers(database: Space) -> None:
    async with StandIn() as ollama:
        async with running(database_url=database.url) as coordinator:
            await coordinator.register(ollama)
        database.ask("UPDATE agents SET last_seen = '2020-01-01T00:00:00+00:00'")
        async with running(database_url=database.url) as coordinator:
            async with asyncio.timeout(DEADLINE_SECONDS):
                while (await coordinator.chat())[0] != 200:
                    await asyncio.sleep(0.01)


@pytest.mark.spec("FLEET-19")
async def test_a_model_whose_agents_are_gone_is_known_after_a_restart(
    database: Space,
) -> None:
    async with StandIn() as ollama, running(database_url=database.url) as coordinator:
        agent_id = await coordinator.register(ollama, "gone")
        await coordinator.heartbeat(agent_id, leaving=True)
    async with running(database_url=database.url) as coordinator:
        status, answer = await coordinator.chat()
        assert (status, "gone: offline" in answer["error"]) == (503, True)
        names = [model["name"] for model in (await coordinator.get("/api/tags"))["models"]]
        assert names == ["llama3.2:latest"]


@pytest.mark.spec("FLEET-4")
async def test_a_registration_is_on_disk_when_it_is_answered(database: Space) -> None:
    async with running(database_url=database.url) as coordinator, StandIn() as ollama:
        agent_id = await coordinator.register(ollama)
        assert agent_ids(database) == [agent_id]


@pytest.mark.spec("FLEET-19")
async def test_a_removed_agent_stays_removed(database: Space) -> None:
    async with StandIn() as ollama:
        async with running(database_url=database.url) as coordinator:
            agent_id = await coordinator.register(ollama)
            url = f"{coordinator.url}/api/agents/{agent_id}"
            async with coordinator.session.delete(url):
                pass
        async with running(database_url=database.url) as coordinator:
            assert await coordinator.get("/api/agents") == []
            assert await coordinator.heartbeat(agent_id) == 404


@pytest.mark.spec("OPERATION-6")
async def test_a_database_that_fails_while_running_stops_nobody(tmp_path: Path) -> None:
    path = tmp_path / "c.db"
    async with running(database_url=SqliteFile(path).url) as coordinator, StandIn() as ollama:
        holder = sqlite3.connect(path, isolation_level=None)
        holder.execute("BEGIN EXCLUSIVE")
        agent_id = await coordinator.register(ollama, "unwritten")
        assert (await coordinator.chat())[0] == 200
        health = await coordinator.get("/healthz")
        assert "locked" in health["database"]
        assert health["status"] == "ok"
        holder.execute("ROLLBACK")
        await coordinator.until(lambda: coordinator.parts.store.problem is None)
        rows = holder.execute("SELECT id FROM agents").fetchall()
        holder.close()
        assert rows == [(agent_id,)]


@pytest.mark.spec("OPERATION-62")
async def test_a_server_that_is_lost_while_running_stops_nobody(postgres: PostgresSchema) -> None:
    async with Line(postgres.url) as line, StandIn() as ollama:
        async with running(database_url=line.url) as coordinator:
            line.cut()
            agent_id = await coordinator.register(ollama, "unwritten")
            assert (await coordinator.chat())[0] == 200
            health = await coordinator.get("/healthz")
            assert "check that PostgreSQL runs there" in health["database"]
            async with coordinator.session.get(f"{coordinator.url}/api/history") as response:
                assert response.status == 503
                assert "check that PostgreSQL runs there" in await response.text()
            await line.mend()
            await coordinator.until(lambda: coordinator.parts.store.problem is None)
            assert agent_ids(postgres) == [agent_id]
            assert len((await coordinator.get("/api/history"))["requests"]) == 1


@pytest.mark.spec("OPERATION-60")
@pytest.mark.spec("OPERATION-61")
async def test_a_password_is_in_no_log_and_no_answer(
    tmp_path: Path, postgres: PostgresSchema
) -> None:
    port = programs.free_port()
    async with Line(postgres.url) as line:
        url = line.url.replace("@", ":swordfish@")
        async with programs.coordinator(
            tmp_path, port, DATABASE_URL=url, COORDINATOR_LOG_LEVEL="DEBUG"
        ) as (base, program):
            async with aiohttp.ClientSession() as session:
                for path in ("/api/settings", "/healthz", "/api/agents"):
                    async with session.get(base + path) as response:
                        assert "swordfish" not in await response.text()
                async with session.get(f"{base}/api/settings") as response:
                    assert ":***@127.0.0.1" in await response.text()
            again = programs.command("ollama-coordinator")
            settings = {"DATABASE_URL": url, "COORDINATOR_PORT": str(programs.free_port())}
            async with programs.program(tmp_path / "second.log", again, **settings) as second:
                await second.says("stands by")
            line.cut()
            await program.says("database not writable")
            program.send(programs.TERMINATE)
            assert await program.ended() == 0
            assert "***" in program.output
            assert "swordfish" not in program.output + second.output


@pytest.mark.spec("FLEET-19")
@pytest.mark.spec("FLEET-20")
async def test_kill_9_under_load_loses_no_agent(tmp_path: Path, database: Space) -> None:
    port = programs.free_port()
    started = functools.partial(programs.coordinator, tmp_path, port, DATABASE_URL=database.url)
    async with StandIn(slots=4) as ollama, StandIn(slots=4) as other:
        async with started() as (url, first):
            client = Client(url)
            ids = [await client.register(node) for node in (ollama, other)]
            load = [asyncio.create_task(client.chat()) for _ in range(20)]
            await ollama.seen.wait_for(lambda seen: seen.count("/api/chat") > 0)
            await first.kill()
            await asyncio.gather(*load, return_exceptions=True)
            await client.close()
        async with started() as (url, _):
            client = Client(url)
            assert sorted(await client.agents()) == sorted(ids)
            assert {await client.chat() for _ in range(6)} == {200}
            await client.close()


class Client:
    """Just enough of one."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._session = aiohttp.ClientSession()

    async def register(self, ollama: StandIn) -> str:
        facts = {
            "machine_name": f"machine-{ollama.port}",
            "ip_address": "127.0.0.1",
            "ollama_version": "0.33.0",
            "ollama_port": ollama.port,
        }
        async with self._session.post(f"{self._url}/api/agents", json=facts) as response:
            return str((await response.json())["agent_id"])

    async def agents(self) -> list[str]:
        async with self._session.get(f"{self._url}/api/agents") as response:
            return [agent["id"] for agent in await response.json()]

    async def chat(self) -> int:
        body = {"model": "llama3.2", "messages": [{"role": "user", "content": "x"}]}
        async with self._session.post(f"{self._url}/api/chat", json=body) as response:
            await response.read()
            return response.status

    async def close(self) -> None:
        await self._session.close()


@pytest.mark.spec("OPERATION-5")
@pytest.mark.parametrize("body", ["", "{}", "null", '[{"id":1'])
async def test_keys_aliases_and_deferred_commands_that_are_damaged_are_not_begun_anew(
    database: Space, body: str
) -> None:
    async with store_of(database) as store:
        for name in ("keys", "aliases", "pending-operations"):
            store.note_document(name, body.encode())
        await store.flush()
        for part in (KeyRing(store), Aliases(Registry(60.0), store), Deferred(store)):
            with pytest.raises(DatabaseError, match="damaged; restore a copy"):
                await part.restore()


@pytest.mark.spec("OPERATION-5")
async def test_an_agents_damaged_settings_end_the_start_and_damaged_lists_are_asked_for_anew(
    tmp_path: Path,
) -> None:
    url, database = f"sqlite:///{tmp_path}/a.db", SqliteFile(tmp_path / "a.db")
    async with StandIn() as ollama:
        async with running(database_url=url) as coordinator:
            await coordinator.register(ollama, "first")
        database.ask("UPDATE agents SET blobs = '[', tags = '{'")
        database.ask("UPDATE buckets SET body = '['")
        async with running(database_url=url) as coordinator:
            assert (await coordinator.chat())[0] == 200
            assert (await coordinator.get("/api/statistics?minutes=5"))["points"]
    database.ask("UPDATE agents SET settings = '{'")
    port = programs.free_port()
    environment = {"DATABASE_URL": url, "COORDINATOR_PORT": str(port)}
    log = tmp_path / "log"
    async with programs.program(log, "ollama-coordinator", **environment) as program:
        assert await program.ended() == 1
        assert "settings of agent first" in program.output
        assert "Traceback" not in program.output


@pytest.mark.spec("ACCESS-9")
async def test_a_key_that_was_used_at_no_time_of_any_calendar_is_listed(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    async with running(database_url=url) as coordinator:
        key, _ = coordinator.parts.access.keys.create(NewKey(name="a"))
        key.last_used = 1e308
    async with running(database_url=url) as coordinator:
        [listed] = (await coordinator.get("/api/keys"))["keys"]
        assert listed["last_used_at"] is None
