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

CLIENT_TIMEOUT_SECONDS = 120.0
OVERLAP_BYTES = 16
ENDED_EARLY = "ended without a token"


class Target(Struct, frozen=True):
    """A system under test."""

    url: str
    dialect: Dialect = Dialect.OLLAMA
    headers: dict[str, str] = field(default_factory=dict)


class ClientRecord(Struct):
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
        self.records = [ClientRecord(request) for request in trace]
        self._target = target
        self._speed = speed
        self._writer = Writer(trace, target.dialect)

    async def play(self, session: aiohttp.ClientSession) -> None:
        """Every request at its time; ends when each has its first token or none to expect."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        tasks = []
        try:
            for record in self.records:
                await asyncio.sleep(started + record.request.at / self._speed - loop.time())
                tasks.append(asyncio.create_task(self._ask(session, record)))
            await asyncio.sleep(0)
            while any(self._expects(record) for record in self.records):
                await asyncio.sleep(0.1)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @staticmethod
    def _expects(record: ClientRecord) -> bool:
        return record.first_token is None and not record.gave_up and not record.error

    async def _ask(self, session: aiohttp.ClientSession, record: ClientRecord) -> None:
        try:
            async with asyncio.timeout(CLIENT_TIMEOUT_SECONDS / self._speed) as patience:
                await self._listen(session, record, patience)
        except TimeoutError:
            record.gave_up = True
        except aiohttp.ClientError as exc:
            record.error = repr(exc)

    async def _listen(
        self, session: aiohttp.ClientSession, record: ClientRecord, patience: asyncio.Timeout
    ) -> None:
        loop, target = asyncio.get_running_loop(), self._target
        path, body = self._writer.ask(record.request)
        lane = "batch" if record.request.lane is Lane.BATCH else "interactive"
        headers = {"x-ollama-coordinator-lane": lane, **target.headers}
        started = loop.time()
        heard = bytearray()
        async with session.post(target.url + path, json=body, headers=headers) as response:
            record.agent = response.headers.get("x-ollama-coordinator-agent", "")
            async for chunk in response.content.iter_any():
                if record.first_token is None and response.status == 200:
                    tail = bytes(heard[-OVERLAP_BYTES:])
                    if TOKEN.search(tail + chunk):
                        record.first_token = (loop.time() - started) * self._speed
                        patience.reschedule(None)
                heard += chunk
        if response.status != 200:
            record.error = f"{response.status} {heard[:200].decode(errors='replace')}"
        elif record.first_token is None:
            record.error = f"{ENDED_EARLY}: {heard[:200].decode(errors='replace')}"
        else:
            self._writer.heard(record.request, bytes(heard))
            record.timings = _timings(heard, self._speed)


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
