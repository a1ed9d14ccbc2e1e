"""What the agent makes of what is on Ollama's port."""

import socket
from collections.abc import AsyncIterator

import aiohttp
import pytest

from ollama_coordinator_agent.ollama import (
    NotOllama,
    Ollama,
    OllamaAbsent,
    OllamaSilent,
)
from support.ollama import Model, StandIn


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.mark.spec("AGENT-32")
async def test_the_bodies_are_ollamas_own(session: aiohttp.ClientSession) -> None:
    async with StandIn([Model("llama3.2", size_bytes=5)]) as stand_in:
        ollama = Ollama(session, "127.0.0.1", stand_in.port)
        async with session.get(stand_in.url + "/api/tags") as response:
            body = await response.read()
        tags = await ollama.tags()
        assert tags.body == body
        assert tags.names == ["llama3.2:latest"]
        assert (await ollama.ps()).names == []
        assert await ollama.version() == stand_in.settings.version


@pytest.mark.spec("AGENT-30")
async def test_nothing_and_silence_are_two_things(session: aiohttp.ClientSession) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(OllamaSilent):
            await Ollama(session, "127.0.0.1", port, timeout_seconds=0.05).version()
    with pytest.raises(OllamaAbsent):
        await Ollama(session, "127.0.0.1", port).version()


@pytest.mark.spec("AGENT-31")
@pytest.mark.parametrize("body", ["<html>hello</html>", "[]", '{"name": "another"}'])
async def test_another_program_is_recognised(session: aiohttp.ClientSession, body: str) -> None:
    async with StandIn() as stand_in:
        with (
            stand_in.faults.status(200, raw=body, paths=["/api/version"]),
            pytest.raises(NotOllama),
        ):
            await Ollama(session, "127.0.0.1", stand_in.port).version()
        with stand_in.faults.status(404, paths=["/api/version"]), pytest.raises(NotOllama):
            await Ollama(session, "127.0.0.1", stand_in.port).version()
        with stand_in.faults.status(500, paths=["/api/version"]), pytest.raises(OllamaSilent):
            await Ollama(session, "127.0.0.1", stand_in.port).version()
