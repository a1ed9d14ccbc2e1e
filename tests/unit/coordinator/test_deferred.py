"""Deferred commands: which remain, in which order, and that none is lost."""

from datetime import UTC, datetime, timedelta

import pytest

from ollama_coordinator.db import Store, database_of
from ollama_coordinator.operations import AgentCommand, Deferred, DeferredCommand
from ollama_coordinator_common.types import AgentId
from support.databases import Space, store_of

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
AWAY = AgentId("away")

PULL = AgentCommand.pull("m")
FIRST = AgentCommand.create("m", b'{"system":"first"}', ())
SECOND = AgentCommand.create("m", b'{"system":"second"}', ())
COPY_OF_A = AgentCommand.copy("a", "m")
COPY_OF_B = AgentCommand.copy("b", "m")
LOAD = AgentCommand.load("m")
LOAD_FOR_LONG = AgentCommand.load("m", keep_alive="24h")
DELETE = AgentCommand.delete("m")


def _add(deferred: Deferred, *commands: AgentCommand) -> None:
    for minutes, command in enumerate(commands):
        deferred.add(DeferredCommand(AWAY, command, NOON + timedelta(minutes=minutes)))


def _commands(deferred: Deferred) -> list[AgentCommand]:
    return [pending.command for pending in deferred.all()]


@pytest.mark.spec("SURFACE-23")
@pytest.mark.parametrize(
    ("asked", "remaining"),
    [
        ([FIRST, SECOND], [SECOND]),
        ([COPY_OF_A, COPY_OF_B], [COPY_OF_B]),
        ([PULL, FIRST, PULL], [PULL]),
        ([PULL, COPY_OF_A, FIRST], [FIRST]),
        ([FIRST, DELETE], [DELETE]),
        ([DELETE, FIRST], [FIRST]),
        ([LOAD, LOAD_FOR_LONG], [LOAD_FOR_LONG]),
        ([PULL, LOAD], [PULL, LOAD]),
    ],
)
async def test_only_the_newest_command_for_a_model_remains(
    asked: list[AgentCommand], remaining: list[AgentCommand]
) -> None:
    async with Store(database_of("sqlite://:memory:")) as store:
        deferred = Deferred(store)
        _add(deferred, *asked)
        assert _commands(deferred) == remaining


@pytest.mark.spec("SURFACE-23")
async def test_a_command_that_is_deferred_again_keeps_its_time_and_its_place() -> None:
    async with Store(database_of("sqlite://:memory:")) as store:
        deferred = Deferred(store)
        _add(deferred, PULL, LOAD, PULL)
        assert [(pending.command, pending.since) for pending in deferred.all()] == [
            (PULL, NOON),
            (LOAD, NOON + timedelta(minutes=1)),
        ]
        deferred.supersede(AWAY, PULL)
        assert _commands(deferred) == [PULL, LOAD]


@pytest.mark.spec("SURFACE-23")
async def test_an_older_command_that_is_done_leaves_the_newer_one() -> None:
    async with Store(database_of("sqlite://:memory:")) as store:
        deferred = Deferred(store)
        _add(deferred, FIRST, SECOND)
        deferred.finish(AWAY, FIRST)
        assert _commands(deferred) == [SECOND]
        deferred.finish(AWAY, SECOND)
        assert _commands(deferred) == []


@pytest.mark.spec("SURFACE-22")
async def test_every_deferred_command_is_there_after_a_restart(database: Space) -> None:
    async with store_of(database) as store:
        deferred = Deferred(store)
        for number in range(1000):
            deferred.add(DeferredCommand(AgentId(f"agent-{number}"), PULL, NOON))
        remaining = deferred.all()
    async with store_of(database) as store:
        again = Deferred(store)
        await again.restore()
        assert again.all() == remaining
        again.forget(AgentId("agent-0"))
    async with store_of(database) as store:
        again = Deferred(store)
        await again.restore()
        assert again.all() == remaining[1:]
