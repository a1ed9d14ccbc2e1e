"""The coordinator is killed under load, again and again: what it has confirmed is kept."""

import asyncio
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from support import programs
from support.databases import Space
from support.deadline import DEADLINE_SECONDS
from support.ollama import StandIn

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

KILLS = 10
BEHIND_SECONDS = 4.0
"""The history is written behind by a second or two; a busy machine takes longer."""


class Clients:
    """What clients and an operator do without a pause, and what was confirmed to them."""

    def __init__(self, url: str, agent_id: str) -> None:
        self._url = url
        self._agent_id = agent_id
        self.served: dict[str, float] = {}
        self.keys: dict[str, bool] = {}
        self.aliases: set[str] = set()
        self.label = ""
        self.queue = 0
        self.over = asyncio.Event()

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and answer; 0: there was none."""
        timeout = aiohttp.ClientTimeout(total=DEADLINE_SECONDS)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.request(method, self._url + path, json=body) as answer,
            ):
                text = await answer.text()
                name = answer.headers.get("X-Ollama-Coordinator-Request", "")
                if answer.status == 200 and name and '"done":true' in text:
                    self.served[name] = time.monotonic()
                return answer.status, text
        except (aiohttp.ClientError, TimeoutError):
            return 0, ""

    async def chats(self) -> None:
        """Streamed chats."""
        body = {"model": "llama3.2", "messages": [{"role": "user", "content": "hello"}]}
        while not self.over.is_set():
            await self.ask("POST", "/api/chat", body)
            await asyncio.sleep(0.01)

    async def operates(self) -> None:
        """Keys that are made and ended, aliases, labels and settings."""
        number = 0
        while not self.over.is_set():
            number += 1
            name = f"k{number}"
            status, _ = await self.ask("POST", "/api/keys", {"name": name})
            if status == 201:
                self.keys[name] = True
                if number % 3 == 0 and (await self.ask("DELETE", f"/api/keys/{name}"))[0] == 200:
                    self.keys[name] = False
            body = {"name": name, "models": ["llama3.2"]}
            if (await self.ask("POST", "/api/aliases", body))[0] in (200, 201):
                self.aliases.add(name)
            patch = {"labels": [name]}
            if (await self.ask("PATCH", f"/api/agents/{self._agent_id}", patch))[0] == 200:
                self.label = name
            if (await self.ask("PATCH", "/api/settings", {"max_queue": 600 + number}))[0] == 200:
                self.queue = 600 + number
            await asyncio.sleep(0.01)

    async def shown(self, path: str) -> Any:
        """The JSON of a GET that must succeed."""
        status, text = await self.ask("GET", path)
        assert status == 200, text
        return json.loads(text)

    async def assert_kept(self, before: float) -> None:
        """All that was confirmed is there, and all that ended some seconds before the kill."""
        confirmed = dict(self.keys)
        keys = {key["name"]: key for key in (await self.shown("/api/keys"))["keys"]}
        assert {name for name, lives in confirmed.items() if lives} <= keys.keys()
        for name in [name for name, lives in confirmed.items() if not lives]:
            assert keys[name]["revoked_at"] is not None, name
        expected, label, queue = set(self.aliases), self.label, self.queue
        aliases = {one["name"] for one in (await self.shown("/api/aliases"))["aliases"]}
        assert expected <= aliases
        (agent,) = await self.shown("/api/agents")
        assert agent["id"] == self._agent_id
        assert int(agent["labels"][0][1:]) >= int(label[1:])
        settings = {one["name"]: one for one in (await self.shown("/api/settings"))["settings"]}
        assert settings["max_queue"]["value"] >= queue
        rows: list[str] = []
        after = ""
        while True:
            page = await self.shown(f"/api/history?limit=500{after}")
            rows += [row["id"] for row in page["requests"]]
            if page["next"] is None:
                break
            after = f"&after={page['next']}"
        assert len(rows) == len(set(rows))
        lost = self.served.keys() - set(rows)
        ages = sorted(round(before - self.served[name], 1) for name in lost)
        assert all(age <= 0 for age in ages), f"ended so many seconds too early: {ages}"
        for name in lost:
            del self.served[name]


@pytest.mark.spec("OPERATION-38")
async def test_ten_kills_lose_nothing_that_was_confirmed(database: Space, tmp_path: Path) -> None:
    chance = random.Random(14)
    port = programs.free_port()
    settings = {"DATABASE_URL": database.url, "COORDINATOR_ACCESS": "open"}
    async with StandIn() as ollama:
        clients: Clients | None = None
        work: list[asyncio.Task[None]] = []
        killed_at = 0.0
        for number in range(KILLS + 1):
            async with programs.coordinator(tmp_path, port, **settings) as (url, program):
                if clients is None:
                    clients = Clients(url, await registered(url, ollama))
                    doing = [clients.chats() for _ in range(8)]
                    work = [asyncio.create_task(one) for one in (*doing, clients.operates())]
                else:
                    await clients.assert_kept(killed_at - BEHIND_SECONDS)
                if number == KILLS:
                    clients.over.set()
                    await asyncio.gather(*work)
                    await assert_whole(clients, program)
                    break
                count = len(clients.served)
                async with asyncio.timeout(DEADLINE_SECONDS):
                    while len(clients.served) < count + 20:
                        await asyncio.sleep(0.01)
                await asyncio.sleep(chance.uniform(0.0, 2.0))
                killed_at = time.monotonic()
                await program.kill()
            await ollama.seen.wait_for(lambda seen: seen.active == 0)
    names = {path.name for path in tmp_path.iterdir()}
    kept = ("", "-wal", "-shm", ".lock", ".secret", ".blobs")
    assert names <= {"coordinator.log", *(f"coordinator.db{end}" for end in kept)}


async def assert_whole(clients: Clients, program: programs.Program) -> None:
    """Nothing is left of the kills, requests are served, and the program ends in order."""
    process = psutil.Process(program.pid)
    async with asyncio.timeout(DEADLINE_SECONDS):
        while (health := await clients.shown("/healthz"))["in_flight"]:
            await asyncio.sleep(0.01)
    assert (health["waiting"], health["database"]) == (0, "ok")
    if sys.platform != "win32":
        assert process.num_fds() < 64
    status, _ = await clients.ask("POST", "/api/generate", {"model": "llama3.2"})
    assert status == 200
    program.send(programs.TERMINATE)
    assert await program.ended() == 0
    assert "Traceback" not in program.output


async def registered(url: str, ollama: StandIn) -> str:
    """Register a stand-in; returns the agent's id."""
    facts = {
        "machine_name": "only", "ip_address": "127.0.0.1", "ollama_version": "0.24.0",
        "ollama_port": ollama.port,
    }  # fmt: skip
    async with aiohttp.ClientSession() as session:
        async with session.post(f"{url}/api/agents", json=facts) as answer:
            return str((await answer.json())["agent_id"])
