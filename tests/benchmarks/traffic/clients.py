"""The clients: each asks at its time, waits two minutes for a token, and listens to the end."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import aiohttp
from msgspec import Struct, field

from ollama_coordinator.scheduler import Lane
from ollama_coordinator.simulation import TraceRequest

from .dialects import TOKEN, Dialect
from .writer import Writer

PATIENCE_SECONDS = 120.0
OVERLAP_BYTES = 16
ENDED_EARLY = "ended without a token"


class Target(Struct, frozen=True):
    """A system under test."""

    url: str
    dialect: Dialect = Dialect.OLLAMA
    headers: dict[str, str] = field(default_factory=dict)


class Told(Struct):
    """What one client saw; seconds in the trace's time."""

    request: TraceRequest
    first_token: float | None = None
    gave_up: bool = False
    error: str = ""
    agent: str = ""
    timings: dict[str, float] = field(default_factory=dict)


class Clients:
    """All clients of a trace before one system."""

    def __init__(self, target: Target, trace: Sequence[TraceRequest], speed: float) -> None:
        self.told = [Told(request) for request in trace]
        self._target = target
        self._speed = speed
        self._writer = Writer(trace, target.dialect)

    async def play(self, session: aiohttp.ClientSession) -> None:
        """Every request at its time; ends when each has its first token or none to expect."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        tasks = []
        try:
            for told in self.told:
                await asyncio.sleep(started + told.request.at / self._speed - loop.time())
                tasks.append(asyncio.create_task(self._ask(session, told)))
            await asyncio.sleep(0)
            while any(self._expects(told) for told in self.told):
                await asyncio.sleep(0.1)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @staticmethod
    def _expects(told: Told) -> bool:
        return told.first_token is None and not told.gave_up and not told.error

    async def _ask(self, session: aiohttp.ClientSession, told: Told) -> None:
        try:
            async with asyncio.timeout(PATIENCE_SECONDS / self._speed) as patience:
                await self._listen(session, told, patience)
        except TimeoutError:
            told.gave_up = True
        except aiohttp.ClientError as exc:
            told.error = repr(exc)

    async def _listen(
        self, session: aiohttp.ClientSession, told: Told, patience: asyncio.Timeout
    ) -> None:
        loop, target = asyncio.get_running_loop(), self._target
        path, body = self._writer.ask(told.request)
        lane = "batch" if told.request.lane is Lane.BATCH else "interactive"
        headers = {"x-ollama-coordinator-lane": lane, **target.headers}
        started = loop.time()
        heard = bytearray()
        async with session.post(target.url + path, json=body, headers=headers) as response:
            told.agent = response.headers.get("x-ollama-coordinator-agent", "")
            async for chunk in response.content.iter_any():
                if told.first_token is None and response.status == 200:
                    tail = bytes(heard[-OVERLAP_BYTES:])
                    if TOKEN.search(tail + chunk):
                        told.first_token = (loop.time() - started) * self._speed
                        patience.reschedule(None)
                heard += chunk
        if response.status != 200:
            told.error = f"{response.status} {heard[:200].decode(errors='replace')}"
        elif told.first_token is None:
            told.error = f"{ENDED_EARLY}: {heard[:200].decode(errors='replace')}"
        else:
            self._writer.heard(told.request, bytes(heard))
            told.timings = _timings(heard, self._speed)


def _timings(answer: bytes | bytearray, speed: float) -> dict[str, float]:
    """What Ollama's last line says of loading, reading and writing; seconds of the trace."""
    try:
        last: dict[str, Any] = json.loads(answer.splitlines()[-1])
    except (ValueError, IndexError):
        return {}
    return {
        name.removesuffix("_duration"): value / 1e9 * speed
        for name, value in last.items()
        if name.endswith("_duration")
    }
