"""What every test may ask for: a coordinator, and stand-ins registered with it."""

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from ollama_coordinator_common.commandline import EventFormatter
from support.coordinator import Running, running
from support.databases import PostgresSchema, Space, SqliteFile, postgres_schema
from support.ollama import StandIn

if sys.platform != "win32":
    import uvloop

# An example that takes longer than 200 ms only shows that the machine is busy.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")


def pytest_asyncio_loop_factories(
    item: pytest.Item,
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """asyncio's event loop; those marked `loops` run on uvloop's as well, as the programs do."""
    factories = {"asyncio": asyncio.new_event_loop}
    if item.get_closest_marker("loops") is not None and sys.platform != "win32":
        factories["uvloop"] = uvloop.new_event_loop
    return factories


@pytest.fixture(autouse=True)
def log_as_before() -> Iterator[None]:
    """A command that ran in this process has sent the log to a stream that is closed by now."""
    yield
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler.formatter, EventFormatter):
            root.removeHandler(handler)


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


@pytest.fixture
def postgres(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PostgresSchema]:
    """A database on a PostgreSQL server.

    Its coordinators leave files in the working folder, which is the test's own for that.
    """
    monkeypatch.chdir(tmp_path)
    with postgres_schema() as space:
        yield space


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Space:
    """A database of each kind that a coordinator can have."""
    if request.param == "sqlite":
        return SqliteFile(tmp_path / "coordinator.db")
    space: PostgresSchema = request.getfixturevalue("postgres")
    return space
