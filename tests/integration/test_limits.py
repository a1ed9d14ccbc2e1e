"""What machines and operators send is bounded; the machine's row or the answer says so."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from ollama_coordinator.registry import agent_match as registries
from ollama_coordinator.registry.inventory import MOST_MODELS
from ollama_coordinator.upstream import Unreachable, Upstreams
from support.coordinator import Running, running
from support.ollama import StandIn

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"


@pytest.fixture
async def coordinator() -> AsyncIterator[Running]:
    async with running() as coordinator:
        yield coordinator


@asynccontextmanager
async def endless(head: bytes, more: bytes) -> AsyncIterator[int]:
    """The port of a server that never stops answering."""
    gone = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(head)
            while True:
                writer.write(more)
                await writer.drain()
        except OSError:
            gone.set()
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]
        await gone.wait()


@pytest.mark.spec("FLEET-40")
@pytest.mark.parametrize(
    ("head", "more", "text"),
    [
        (HEAD, b" " * 65536, "answers /api/x with more than 100000 bytes"),
        (b"", b"HTTP/1.1 102 Processing\r\n\r\n" * 99, "sends one 1xx response after the other"),
    ],
)
async def test_an_endless_answer_is_ended(head: bytes, more: bytes, text: str) -> None:
    async with Upstreams() as upstreams, endless(head, more) as port:
        url = f"http://127.0.0.1:{port}/api/x"
        with pytest.raises(Unreachable, match=text):
            await upstreams.fetch("GET", url, seconds=60.0, limit=100_000)


@pytest.mark.spec("FLEET-40")
async def test_the_row_of_a_machine_with_too_many_models_says_so(coordinator: Running) -> None:
    async with StandIn() as ollama:
        agent_id = await coordinator.register(ollama)
        models = [{"name": f"m{number}"} for number in range(MOST_MODELS + 1)]
        assert await coordinator.heartbeat(agent_id, tags={"models": models}) == 400
        row = await coordinator.get(f"/api/agents/{agent_id}")
        assert "1001 models; the limit is 1000" in row["out_of_rotation"]
        assert await coordinator.heartbeat(agent_id, tags={"models": models[:-1]}) == 200
        odd = {"models": [{"name": "m", "details": {"x": [[[[]]]] * 7_000}}]}
        assert await coordinator.heartbeat(agent_id, tags=odd) == 400
        row = await coordinator.get(f"/api/agents/{agent_id}")
        assert "21005 values; the limit is 20000" in row["out_of_rotation"]


async def changed(coordinator: Running, agent_id: str, **changes: Any) -> int:
    url = f"{coordinator.url}/api/agents/{agent_id}"
    async with coordinator.session.patch(url, json=changes) as response:
        return response.status


@pytest.mark.spec("OPERATION-34")
async def test_what_an_operator_sets_has_bounds(coordinator: Running) -> None:
    async with StandIn() as ollama:
        agent_id = await coordinator.register(ollama)
        for right in (
            {"labels": ["x" * 100] * 50},
            {"notes": "x" * 10_000},
            {"preference": 1000.0},
            {"display_name": "x" * 100},
        ):
            assert await changed(coordinator, agent_id, **right) == 200
        for wrong in (
            {"labels": ["x"] * 51},
            {"labels": ["x" * 101]},
            {"notes": "x" * 10_001},
            {"preference": 1e308},
            {"display_name": "x" * 101},
        ):
            assert await changed(coordinator, agent_id, **wrong) == 400
        assert await changed(coordinator, agent_id, labels=["x"] * 20_000) == 413


@pytest.mark.spec("SURFACE-65")
async def test_fields_that_are_not_known_are_refused_by_their_names(coordinator: Running) -> None:
    async with StandIn() as ollama:
        agent_id = await coordinator.register(ollama, newer_field=1)
        assert await coordinator.heartbeat(agent_id, newer_field=1) == 200
        chat = {"model": "llama3.2", "think": True}
        assert (await coordinator.post("/api/explain", chat))[0] == 200
        for method, path, right, there in (
            ("PATCH", f"/api/agents/{agent_id}", {"draining": True}, "backup_seconds"),
            ("PATCH", "/api/settings", {"max_queue": 7}, "max_queue"),
            ("POST", "/api/operations", {"kind": "delete", "model": "llama3.2"}, "placement"),
            ("POST", "/api/keys", {"name": "anna"}, "in_path"),
            ("POST", "/api/aliases", {"name": "fast", "models": ["x"]}, "wait_seconds"),
        ):
            body = {"drain": 1, **right, "label": []}
            url = coordinator.url + path
            async with coordinator.session.request(method, url, json=body) as response:
                error = (await response.json())["error"]
                assert response.status == 400, error
                assert "'drain', 'label'; there are " in error
                assert there in error
        assert coordinator.parts.settings.config.max_queue != 7
        assert "llama3.2:latest" in ollama.models
        limits = {"name": "anna", "limits": {"tokens": 1}}
        assert (await coordinator.post("/api/keys", limits))[0] == 400


@pytest.mark.spec("OPERATION-34")
async def test_a_long_name_is_not_repeated_whole(coordinator: Running) -> None:
    async with StandIn() as ollama:
        await coordinator.register(ollama)
        name = "x" * 100_000
        for path in ("/api/generate", "/api/delete", "/api/copy"):
            method = "DELETE" if path == "/api/delete" else "POST"
            body = {"model": name, "source": name}
            url = coordinator.url + path
            async with coordinator.session.request(method, url, json=body) as response:
                assert response.status in (400, 404)
                assert len(await response.read()) < 5000


@pytest.mark.spec("FLEET-41")
async def test_a_registration_that_never_answered_is_forgotten(
    coordinator: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def known(count: int) -> Callable[[], bool]:
        return lambda: len(coordinator.parts.registry) == count

    monkeypatch.setattr(registries, "MOST_UNANSWERED", 2)
    async with StandIn() as ollama:
        await coordinator.register(ollama)
        facts = {"ip_address": "127.0.0.1", "ollama_version": "0", "ollama_port": 1}
        for number in range(4):
            more = {"machine_name": f"m{number}", "ollama_port": number + 1}
            await coordinator.post("/api/agents", {**facts, **more})
        await coordinator.until(known(3))
        monkeypatch.setattr(registries, "FORGET_SECONDS", 0.0)
        await coordinator.until(known(1))
        assert (await coordinator.chat())[0] == 200
