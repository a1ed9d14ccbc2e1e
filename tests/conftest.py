"""What every test may ask for: a coordinator, and stand-ins registered with it."""

from collections.abc import AsyncIterator

import pytest

from support.coordinator import Running, running
from support.ollama import StandIn


@pytest.fixture
async def coordinator() -> AsyncIterator[Running]:
    """An empty coordinator."""
    async with running() as coordinator:
        yield coordinator


@pytest.fixture
async def ollama(coordinator: Running) -> AsyncIterator[StandIn]:
    """A stand-in with `llama3.2`, registered as `first`."""
    async with StandIn() as ollama:
        await coordinator.register(ollama, "first")
        yield ollama


@pytest.fixture
async def spare(coordinator: Running) -> AsyncIterator[StandIn]:
    """A second one like it, registered as `spare`."""
    async with StandIn() as ollama:
        await coordinator.register(ollama, "spare")
        yield ollama
