"""Many nodes in one loop, nothing left behind, and the stand-in as a process of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from support.ollama import StandIn
from support.ollama.__main__ import model_from

TESTS = Path(__file__).parents[2]


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_fifty_nodes_live_in_one_loop(http: aiohttp.ClientSession) -> None:
    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(StandIn()) for _ in range(50)]
        assert len({node.port for node in nodes}) == 50

        async def ask(node: StandIn) -> int:
            body = {"model": "llama3.2", "prompt": "hi", "stream": False}
            async with http.post(node.url + "/api/generate", json=body) as answer:
                return answer.status

        assert set(await asyncio.gather(*map(ask, nodes))) == {200}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")
async def test_a_stopped_node_leaves_no_task_and_no_socket() -> None:
    tasks, descriptors = asyncio.all_tasks(), open_descriptors()
    async with StandIn(control_port=0) as node, aiohttp.ClientSession() as http:
        node.hold(after=1)
        body = {"model": "llama3.2", "prompt": "hi"}
        async with http.post(node.url + "/api/generate", json=body) as answer:
            await answer.content.readline()
            await node.stop()
    assert asyncio.all_tasks() == tasks
    assert open_descriptors() == descriptors


async def test_a_taken_port_is_an_error_and_leaves_nothing() -> None:
    async with StandIn() as node:
        with pytest.raises(OSError, match="in use"):
            await StandIn(port=node.port).start()


async def test_stopping_twice_does_no_harm() -> None:
    async with StandIn() as node:
        await node.stop()


async def test_seen_says_what_it_waited_for_in_vain() -> None:
    async with StandIn() as node:
        with pytest.raises(TimeoutError, match="figures"):
            await node.seen.wait_for(lambda seen: seen.active, timeout=0.01)


@asynccontextmanager
async def process(*arguments: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str, str]]:
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "support.ollama", "--port", "0", *arguments),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
    )
    try:
        assert child.stdout is not None
        urls = [(await child.stdout.readline()).decode().split()[-1] for _ in range(2)]
        yield child, urls[0], urls[1]
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()


async def test_sigterm_cuts_a_running_stream(http: aiohttp.ClientSession) -> None:
    async with process("--model", "m=1e9") as (child, url, control):
        async with http.post(control + "/hold", json={"after": 1}):
            pass
        body = {"model": "m", "prompt": "hi"}
        async with http.post(url + "/api/generate", json=body) as answer:
            await answer.content.readline()
            child.send_signal(signal.SIGTERM)
            with pytest.raises(aiohttp.ClientPayloadError):
                await answer.content.read()
        assert await child.wait() == 0


def test_models_on_the_command_line() -> None:
    model = model_from("nomic-embed-text:v1=3e8")
    assert (model.name, model.size_bytes) == ("nomic-embed-text:v1", 300_000_000)
    assert model.embeds
    assert model_from("llama3.2").size_bytes == 2_000_000_000
