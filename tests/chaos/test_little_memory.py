"""A coordinator with little memory: many large bodies at once, and clients that hardly read."""

import asyncio
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from support import deaf, programs
from support.asgi import connection
from support.deadline import DEADLINE_SECONDS
from support.ollama import Model, StandIn

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.timeout(600),
    pytest.mark.skipif(sys.platform == "win32", reason="there are no such limits there"),
]

MEBIBYTE = 1024 * 1024
MAY_TAKE = 700 * MEBIBYTE
"""By `ulimit -d`; a coordinator at rest takes 80 MiB."""


@asynccontextmanager
async def limited(folder: Path, *ollamas: StandIn) -> AsyncIterator[tuple[str, psutil.Process]]:
    """A coordinator that may take so much memory and no more, with these agents."""
    port = programs.free_port()
    settings = {
        "COORDINATOR_HOST": "127.0.0.1",
        "COORDINATOR_PORT": str(port),
        "DATABASE_URL": f"sqlite:///{folder}/coordinator.db",
    }
    limit = f'ulimit -d {MAY_TAKE // 1024}; exec "$@"'
    command = ("sh", "-c", limit, "sh", programs.command("ollama-coordinator"), "serve")
    async with programs.program(folder / "log", *command, **settings) as program:
        url = f"http://127.0.0.1:{port}"
        await programs.answers(url, program)
        for ollama in ollamas:
            facts = {
                "machine_name": f"m{ollama.port}", "ip_address": "127.0.0.1",
                "ollama_version": "0.24.0", "ollama_port": ollama.port,
            }  # fmt: skip
            assert (await asked(url, "/api/agents", facts))[0] == 201
        yield url, psutil.Process(program.pid)
        assert "MemoryError" not in program.output
        assert "Traceback" not in program.output
        program.send(programs.TERMINATE)
        assert await program.ended() == 0


async def asked(url: str, path: str, body: Any) -> tuple[int, float]:
    """The status of a small request, and the seconds that it took."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with aiohttp.ClientSession() as session:
        async with session.post(url + path, json=body) as answer:
            await answer.read()
            return answer.status, loop.time() - began


async def resident(process: psutil.Process, over: asyncio.Event) -> int:
    """The most memory that a process had until something was over, in bytes."""
    most = 0
    while not over.is_set():
        most = max(most, process.memory_info().rss)
        await asyncio.sleep(0.02)
    return most


SMALL = {"model": "small", "prompt": "hello", "stream": False}


@pytest.mark.spec("OPERATION-33")
async def test_forty_bodies_of_60_mib_fit_into_little_memory(tmp_path: Path) -> None:
    body = b'{"model":"zz","prompt":"' + b"a" * (60 * MEBIBYTE) + b'"}'
    request = deaf.post("/api/generate", body)

    async def send(url: str) -> int:
        async with connection(url) as client:
            try:
                for at in range(0, len(request), MEBIBYTE):
                    client.send(request[at : at + MEBIBYTE])
                    await client.writer.drain()
            except ConnectionError:
                pass  # it is answered before its end
            try:
                return (await asyncio.wait_for(client.head(), DEADLINE_SECONDS * 5))[0]
            except (ConnectionError, asyncio.IncompleteReadError):
                return 0

    async with (
        StandIn([Model("small")]) as ollama,
        limited(tmp_path, ollama) as (url, process),
    ):
        over = asyncio.Event()
        watching = asyncio.create_task(resident(process, over))
        sending = [asyncio.create_task(send(url)) for _ in range(40)]
        served = [(await asked(url, "/api/generate", SMALL))[0] for _ in range(20)]
        statuses = Counter(await asyncio.gather(*sending))
        over.set()
        assert set(served) == {200}
        assert await watching < MAY_TAKE
        assert statuses[404] >= 2, statuses
        assert set(statuses) <= {0, 404, 503}, statuses
        assert (await asked(url, "/api/generate", SMALL))[0] == 200
        async with asyncio.timeout(DEADLINE_SECONDS):
            while process.memory_info().rss > 250 * MEBIBYTE:
                await asyncio.sleep(0.1)


@pytest.mark.spec("OPERATION-12")
async def test_clients_that_read_a_byte_a_second_take_no_memory_and_hold_nobody_up(
    tmp_path: Path,
) -> None:
    async with (
        deaf.flooding() as flooding,
        StandIn([Model("small")]) as ollama,
        limited(tmp_path, flooding, ollama) as (url, process),
        AsyncExitStack() as stack,
    ):
        await asked(url, "/api/generate", SMALL)
        before = process.memory_info().rss
        clients = [
            await stack.enter_async_context(deaf.connected(url, deaf.chat(), window=4096))
            for _ in range(40)
        ]
        loop = asyncio.get_running_loop()
        over = asyncio.Event()
        watching = asyncio.create_task(resident(process, over))
        for _ in range(8):
            for client in clients:
                with suppress(BlockingIOError):  # it waits for a slot
                    client.recv(1)
            began = loop.time()
            for _ in range(5):
                status, seconds = await asked(url, "/api/generate", SMALL)
                assert (status, seconds < 5) == (200, True)
            await asyncio.sleep(max(0.0, 1.0 - (loop.time() - began)))
        over.set()
        assert await watching < before + 64 * MEBIBYTE
