"""Many nodes in one loop, nothing left behind, and the stand-in as a process of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from support.ollama import StandIn

TESTS = Path(__file__).parents[2]


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


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
