"""Several coordinators with one PostgreSQL, as programs."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from support import programs
from support.deadline import DEADLINE_SECONDS
from support.ollama import StandIn

CHAT = {"model": "llama3.2", "messages": [{"role": "user", "content": "hello"}]}


class Coordinator:
    """One of the programs."""

    def __init__(self, url: str, program: programs.Program, session: aiohttp.ClientSession) -> None:
        self.url = url
        self.program = program
        self.session = session

    async def get(self, path: str, *also: int) -> Any:
        async with self.session.get(self.url + path) as response:
            assert response.status in (200, *also), await response.text()
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
            agent_id = str((await response.json())["agent_id"])
        # A setting is in the database before its answer, and with it the agent's models.
        url, setting = f"{self.url}/api/settings", {"max_queue": 512}
        async with self.session.patch(url, json=setting) as response:
            assert response.status == 200, await response.text()
        return agent_id

    async def history(self, count: int, query: str = "") -> list[Any]:
        """The rows of the history, once there are so many."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            while len(rows := (await self.get(f"/api/history{query}"))["requests"]) < count:
                await asyncio.sleep(0.05)
        return list(rows)

    async def led(self, *, epoch: int = 1) -> Any:
        """Who leads, once the process that is asked knows a leader of this epoch or a later one."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            while True:
                leader = (await self.get("/healthz", 503)).get("leader")
                if leader is not None and leader["epoch"] >= epoch:
                    return leader
                await asyncio.sleep(0.02)

    async def has(self, requests: int) -> None:
        """Wait until it leads, with so many requests that wait and run."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            while True:
                health = await self.get("/healthz", 503)
                if health.get("in_flight", 0) + health.get("waiting", 0) == requests:
                    return
                await asyncio.sleep(0.02)

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
