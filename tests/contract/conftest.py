"""Where the suite is aimed: at stand-ins with and without a coordinator, or at any URL."""

import os
from collections.abc import AsyncIterator

import aiohttp
import pytest
import pytest_asyncio

from support.conformance import Aim, Endpoint
from support.coordinator import running
from support.ollama import Model, StandIn


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--url", default=None, help="ask this Ollama, or coordinator, instead")
    parser.addoption("--model", default="llama3.2", help="a model that it has and that chats")
    parser.addoption("--embed-model", default="nomic-embed-text", help="one that embeds")


@pytest.fixture(scope="module")
def aim(request: pytest.FixtureRequest) -> Aim:
    """What the command line says."""
    option = request.config.getoption
    url = option("--url", default=None) or os.environ.get("CONFORMANCE_URL")
    model = option("--model", default=None) or "llama3.2"
    embeds = option("--embed-model", default=None) or "nomic-embed-text"
    return Aim(url, model, embeds)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


VERSION = "0.24.0"
"""The one whose answers the table has, as a real one was seen to give them."""


def models() -> list[Model]:
    """What every stand-in has; the dates are equal so that lists are."""
    return [
        Model("llama3.2", modified_at=1_700_000_000.0),
        Model("someone/tiny:1b", size_bytes=600_000_000, modified_at=1_600_000_000.0),
        Model("nomic-embed-text", capabilities=("embedding",), modified_at=1_500_000_000.0),
    ]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def direct(aim: Aim, session: aiohttp.ClientSession) -> AsyncIterator[Endpoint]:
    """One Ollama: the URL, or a stand-in by itself."""
    if aim.url is not None:
        yield Endpoint(aim.url.rstrip("/"), aim, session)
        return
    async with StandIn(models(), version=VERSION) as ollama:
        yield Endpoint(ollama.url, aim, session)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(aim: Aim, session: aiohttp.ClientSession) -> AsyncIterator[Endpoint]:
    """Two such stand-ins behind a coordinator."""
    if aim.url is not None:
        pytest.skip("aimed at a URL: there is nothing to compare it with")
    async with (
        # A larger context than asked for cuts less; the sequences have a test of that.
        running(larger_context=False) as coordinator,
        StandIn(models(), version=VERSION) as first,
        StandIn(models(), version=VERSION) as second,
    ):
        await coordinator.register(first, "first")
        await coordinator.register(second, "second")
        yield Endpoint(coordinator.url, aim, session)
