"""What the agent makes of what is on Ollama's port."""

import socket
from collections.abc import AsyncIterator

import aiohttp
import pytest

from ollama_coordinator_agent.ollama import Ollama, OllamaError, Presence
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


async def presence(ollama: Ollama) -> Presence:
    """What an Ollama that does not answer as it should is taken for."""
    with pytest.raises(OllamaError) as caught:
        await ollama.version()
    return caught.value.presence


@pytest.mark.spec("AGENT-30")
async def test_nothing_and_silence_are_two_things(session: aiohttp.ClientSession) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        hasty = Ollama(session, "127.0.0.1", port, timeout_seconds=0.05)
        assert await presence(hasty) is Presence.SILENT
    assert await presence(Ollama(session, "127.0.0.1", port)) is Presence.ABSENT


@pytest.mark.spec("AGENT-31")
@pytest.mark.parametrize("body", ["<html>hello</html>", "[]", '{"name": "another"}'])
async def test_another_program_is_recognised(session: aiohttp.ClientSession, body: str) -> None:
    async with StandIn() as stand_in:
        ollama = Ollama(session, "127.0.0.1", stand_in.port)
        with stand_in.faults.status(200, raw=body, paths=["/api/version"]):
            assert await presence(ollama) is Presence.FOREIGN
        with stand_in.faults.status(404, paths=["/api/version"]):
            assert await presence(ollama) is Presence.FOREIGN
        with stand_in.faults.status(500, paths=["/api/version"]):
            assert await presence(ollama) is Presence.SILENT
