"""The demonstration: which machines it shows, and to whom."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("ollama")

from support import demo
from support.ollama import Model, StandIn

EMBEDS = Model("embedder", size_bytes=100, capabilities=("embedding",))
CLOUD = Model("huge:120b-cloud", size_bytes=400, remote=True)
CHATS = [Model("large", size_bytes=9_000), Model("small", size_bytes=5_000)]


async def test_it_shows_three_machines_unless_told_otherwise() -> None:
    machines, models, _ = await demo.plan(own=False)
    assert len(machines) == 3
    assert all(machine.ollama for machine in machines)
    assert set(models) == {"llama3.2", "qwen3:8b"}


async def test_the_own_model_is_the_smallest_that_chats_on_this_machine() -> None:
    async with StandIn([EMBEDS, CLOUD, *CHATS]) as ollama:
        assert await demo.own_model(ollama.url) == "small:latest"
    async with StandIn([EMBEDS, CLOUD]) as ollama:
        assert await demo.own_model(ollama.url) is None
    assert await demo.own_model(ollama.url) is None  # nobody is there any more


async def test_an_old_ollama_is_asked_what_its_models_can_do() -> None:
    listed = [{"name": "embedder:latest", "size": 100}, {"name": "small:latest", "size": 5_000}]
    async with StandIn([EMBEDS, *CHATS]) as ollama:
        with ollama.faults.status(200, {"models": listed}, paths=["/api/tags"]):
            assert await demo.own_model(ollama.url) == "small:latest"


async def test_it_is_served_to_this_machine_only(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{demo.free_port()}"
    log = tmp_path / "coordinator.log"
    async with demo.fleet(tmp_path, url, []), asyncio.timeout(demo.START_SECONDS):
        while "host=" not in log.read_text():
            await asyncio.sleep(0.05)
    assert "host=127.0.0.1" in log.read_text()
