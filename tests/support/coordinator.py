"""A real coordinator on a real socket, in the test's event loop, and what tests ask of it."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from hypercorn.config import Config

from ollama_coordinator.aio import beside
from ollama_coordinator.app import create_app
from ollama_coordinator.http1 import ConnectionLimits, serve
from ollama_coordinator.parts import Parts
from ollama_coordinator.registry import AgentState
from ollama_coordinator.tls import Tls
from ollama_coordinator_common.settings import CoordinatorConfig

from .deadline import DEADLINE_SECONDS
from .ollama import StandIn


class Running:
    """A coordinator that serves at `url`; `parts` is its inside, for facts no route tells."""

    def __init__(self, url: str, parts: Parts, session: aiohttp.ClientSession) -> None:
        self.url = url
        self.parts = parts
        self.session = session

    async def register(self, ollama: StandIn, name: str = "", **more: Any) -> str:
        """Register a stand-in as a bare agent does: one POST; returns the agent's id."""
        facts = {
            "machine_name": name or f"machine-{ollama.port}",
            "ip_address": "127.0.0.1",
            "ollama_version": ollama.settings.version,
            "ollama_port": ollama.port,
            **more,
        }
        async with self.session.post(f"{self.url}/api/agents", json=facts) as response:
            assert response.status in (200, 201), await response.text()
            return str((await response.json())["agent_id"])

    async def register_at(self, port: int, name: str) -> str:
        """Register whatever listens on a port, or nothing; returns the agent's id."""
        facts = {
            "machine_name": name,
            "ip_address": "127.0.0.1",
            "ollama_version": "0.24.0",
            "ollama_port": port,
        }
        status, answer = await self.post("/api/agents", facts)
        assert status in (200, 201), answer
        return str(answer["agent_id"])

    async def heartbeat(self, agent_id: str, **more: Any) -> int:
        """Send one heartbeat; returns the status."""
        facts = {"agent_id": agent_id, "cpu_usage": 1, "memory_usage": 1, "active_requests": 0}
        async with self.session.post(f"{self.url}/api/health", json=facts | more) as response:
            return response.status

    async def get(self, path: str) -> Any:
        """The JSON of a GET that must succeed."""
        async with self.session.get(self.url + path) as response:
            assert response.status == 200, await response.text()
            return await response.json()

    async def post(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and JSON of a POST."""
        async with self.session.post(self.url + path, json=body) as response:
            return response.status, await response.json(content_type=None)

    async def chat(self, model: str = "llama3.2", **more: Any) -> tuple[int, Any]:
        """A chat that is not streamed."""
        messages = [{"role": "user", "content": "hello"}]
        body = {"model": model, "messages": messages, "stream": False, **more}
        return await self.post("/api/chat", body)

    @asynccontextmanager
    async def stream(
        self, path: str = "/api/chat", **more: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A streamed request; leaving the block closes the connection."""
        messages = [{"role": "user", "content": "hello"}]
        body = {"model": "llama3.2", "messages": messages, "stream": True, **more}
        async with self.session.post(self.url + path, json=body) as response:
            try:
                yield response
            finally:
                response.close()

    def agent(self, agent_id: str) -> AgentState:
        """An agent's state."""
        return self.parts.registry.get(agent_id)

    async def until(self, condition: Any) -> None:
        """Wait for a fact inside the coordinator that announces itself nowhere."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not condition():
                await asyncio.sleep(0.005)

    def at_rest(self) -> bool:
        """No lease, no waiting request, no attempt."""
        scheduler = self.parts.scheduler
        leases = list(scheduler.leases())
        return not leases and not scheduler.waiting(0.0) and not list(self.parts.dispatch.held())


@asynccontextmanager
async def running(**settings: Any) -> AsyncIterator[Running]:
    """A coordinator with these settings, in memory unless `database_url` says otherwise."""
    settings.setdefault("database_url", "sqlite://:memory:")
    config = CoordinatorConfig(**settings)
    app = await asyncio.to_thread(create_app, config)
    parts: Parts = app.state.parts
    parts.connections = ConnectionLimits(
        stall_seconds=lambda: parts.settings.config.stall_timeout, now=parts.clock.now
    )
    async with (
        serving(app, config.http, limits=parts.connections, tls=parts.tls) as url,
        beside(parts.tls.run()),
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=False)) as session,
    ):
        yield Running(url, parts, session)


@asynccontextmanager
async def serving(
    app: Any,
    http: str = "auto",
    *,
    limits: ConnectionLimits | None = None,
    tls: Tls | None = None,
    **settings: Any,
) -> AsyncIterator[str]:
    """Serve an ASGI application in this event loop, with these of Hypercorn's; yields its URL."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen(1024)
    port = sock.getsockname()[1]
    config = Config.from_mapping({"graceful_timeout": 0.2, **settings})
    config.bind = [f"fd://{sock.detach()}"]  # Hypercorn closes it
    config.errorlog = None
    stop = asyncio.Event()
    server = asyncio.create_task(serve(app, config, stop.wait, http=http, limits=limits, tls=tls))
    url = f"{'https' if tls and tls.context else 'http'}://127.0.0.1:{port}"
    try:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=False)) as session:
            # The socket listens already: this waits for the application to start.
            asked = asyncio.ensure_future(session.get(url))
            await asyncio.wait({asked, server}, return_when=asyncio.FIRST_COMPLETED)
            if server.done():
                asked.cancel()
                await server
            (await asked).release()
        yield url
    finally:
        stop.set()
        await server
