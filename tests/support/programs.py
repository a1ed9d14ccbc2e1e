"""The real programs as processes, as an operator starts them."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

from support.deadline import DEADLINE_SECONDS


def command(name: str) -> str:
    """A command of the environment that runs the tests."""
    return str(Path(sys.executable).with_name(name))


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Program:
    """A running program and what it has written so far."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self._log = log

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def output(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    async def ended(self) -> int:
        """The exit code, once it ends by itself."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            return await self._process.wait()

    async def says(self, text: str) -> None:
        """Wait until it has written something."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            while text not in self.output:
                await asyncio.sleep(0.01)

    async def says_so_often(self, text: str, count: int) -> None:
        """Wait until it, and those before it with its log, have written something so often."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            while self.output.count(text) < count:
                await asyncio.sleep(0.01)

    async def kill(self) -> None:
        """`kill -9`."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()


@asynccontextmanager
async def program(log: Path, *arguments: str, **environment: str) -> AsyncIterator[Program]:
    """Run a program during the block; it is killed at its end if it still runs."""
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            *arguments,
            env={**os.environ, **environment},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    running = Program(process, log)
    try:
        yield running
    finally:
        await running.kill()


@asynccontextmanager
async def coordinator(
    folder: Path, port: int, **environment: str
) -> AsyncIterator[tuple[str, Program]]:
    """`ollama-coordinator` with its database in `folder`, once it answers."""
    settings = {
        "COORDINATOR_HOST": "127.0.0.1",
        "COORDINATOR_PORT": str(port),
        "DATABASE_URL": f"sqlite:///{folder.as_posix()}/coordinator.db",
        **environment,
    }
    log = folder / "coordinator.log"
    async with program(log, command("ollama-coordinator"), "serve", **settings) as running:
        url = f"http://127.0.0.1:{port}"
        await answers(url, running)
        yield url, running


async def answers(url: str, running: Program, seconds: float = DEADLINE_SECONDS) -> None:
    """Wait until a server answers."""
    async with aiohttp.ClientSession() as session, asyncio.timeout(seconds):
        while True:
            try:
                async with session.get(url) as response:
                    assert response.status == 200
                    return
            except aiohttp.ClientConnectionError:
                if running._process.returncode is not None:
                    raise AssertionError(f"it ended: {running.output}") from None
                await asyncio.sleep(0.02)


TERMINATE = signal.SIGTERM
INTERRUPT = signal.SIGINT
