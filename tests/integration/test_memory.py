"""What a request leaves in memory: nothing, also before the garbage collector comes."""

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from support.coordinator import Running, running
from support.deadline import DEADLINE_SECONDS
from support.ollama import StandIn

OF_A_REQUEST = {"Call", "Held", "Routing", "Request", "JournalEntry", "Exchange", "IncomingRequest"}


@pytest.fixture
async def ollama() -> AsyncIterator[StandIn]:
    async with StandIn() as stand_in:
        yield stand_in


@pytest.fixture
async def coordinator(ollama: StandIn) -> AsyncIterator[Running]:
    async with running() as coordinator:
        await coordinator.register(ollama)
        await coordinator.chat()
        yield coordinator


class Uncollected:
    """`async with` it: nothing of a request is left for the collector at the block's end."""

    def __init__(self, coordinator: Running) -> None:
        self._coordinator = coordinator

    async def __aenter__(self) -> None:
        gc.collect()
        gc.disable()

    async def __aexit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                await self._coordinator.until(self._coordinator.at_rest)
                await self._coordinator.until(lambda: not _tasks_of_requests())
                assert _left() == []
        finally:
            gc.enable()


def _tasks_of_requests() -> list[str]:
    names = [task.get_coro().__qualname__ for task in asyncio.all_tasks()]  # type: ignore[union-attr]
    return [name for name in names if name == "Http1Connection._serve"]


def _left() -> list[str]:
    """The kinds of our objects that only a collection frees."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
        return sorted({type(each).__name__ for each in gc.garbage} & OF_A_REQUEST)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


async def leave(coordinator: Running, arrived: Callable[[], Any], **more: Any) -> None:
    """Chat, and close the connection as soon as something is true."""
    asked = asyncio.create_task(coordinator.chat(**more))
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not arrived():
            await asyncio.sleep(0.005)
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)


@pytest.mark.spec("OPERATION-32")
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_leaves_nothing(
    coordinator: Running, ollama: StandIn, stream: bool
) -> None:
    ollama.hold()
    async with Uncollected(coordinator):
        for _ in range(3):
            await leave(coordinator, lambda: ollama.seen.held == 1, stream=stream)
            await ollama.seen.wait_for(lambda seen: seen.active == 0)


@pytest.mark.spec("OPERATION-32")
async def test_a_client_that_leaves_the_queue_leaves_nothing(
    coordinator: Running, ollama: StandIn
) -> None:
    agent_id = next(iter(coordinator.parts.registry)).id
    await coordinator.heartbeat(agent_id, runner={"num_parallel": 1})
    ollama.hold()
    first = asyncio.create_task(coordinator.chat())
    await ollama.seen.wait_for(lambda seen: seen.held == 1)
    waiting = coordinator.parts.scheduler.waiting
    gc.collect()
    async with Uncollected(coordinator):
        await leave(coordinator, lambda: waiting(0.0))
        await coordinator.until(lambda: not waiting(0.0))
        ollama.release()
        await first


@pytest.mark.spec("OPERATION-32")
@pytest.mark.parametrize("fault", ["refuse", "cut", "fin", "rst", "malformed"])
async def test_a_request_that_no_agent_can_serve_leaves_nothing(
    coordinator: Running, ollama: StandIn, fault: str
) -> None:
    getattr(ollama.faults, fault)()
    async with Uncollected(coordinator):
        status, _ = await coordinator.chat()
        assert status == 503


@pytest.mark.spec("OPERATION-32")
async def test_a_refused_request_leaves_nothing(coordinator: Running) -> None:
    async with Uncollected(coordinator):
        assert (await coordinator.chat(model="nope"))[0] == 404
        assert (await coordinator.chat(messages=[], model=""))[0] == 400
        many = {str(number): 0 for number in range(10_002)}
        assert (await coordinator.post("/api/chat", many))[0] == 413
