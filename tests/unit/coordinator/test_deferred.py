"""What agents owe: which deeds remain, in which order, and that none is lost."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from ollama_coordinator.db import Store
from ollama_coordinator.operations import AgentCommand, Deferred, DeferredCommand
from ollama_coordinator_common.types import AgentId

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


def _owe(deferred: Deferred, *commands: AgentCommand) -> None:
    for minutes, command in enumerate(commands):
        deferred.add(DeferredCommand(AWAY, command, NOON + timedelta(minutes=minutes)))


def _owed(deferred: Deferred) -> list[AgentCommand]:
    return [pending.command for pending in deferred.all()]


@pytest.mark.spec("SURFACE-23")
@pytest.mark.parametrize(
    ("asked", "owed"),
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
async def test_only_what_is_newest_is_owed(
    asked: list[AgentCommand], owed: list[AgentCommand]
) -> None:
    async with Store(None) as store:
        deferred = Deferred(store)
        _owe(deferred, *asked)
        assert _owed(deferred) == owed


@pytest.mark.spec("SURFACE-23")
async def test_what_is_owed_already_keeps_its_time_and_its_place() -> None:
    async with Store(None) as store:
        deferred = Deferred(store)
        _owe(deferred, PULL, LOAD, PULL)
        assert [(pending.command, pending.since) for pending in deferred.all()] == [
            (PULL, NOON),
            (LOAD, NOON + timedelta(minutes=1)),
        ]
        deferred.supersede(AWAY, PULL)
        assert _owed(deferred) == [PULL, LOAD]


@pytest.mark.spec("SURFACE-23")
async def test_an_older_deed_that_gets_done_leaves_the_newer_one() -> None:
    async with Store(None) as store:
        deferred = Deferred(store)
        _owe(deferred, FIRST, SECOND)
        deferred.finish(AWAY, FIRST)
        assert _owed(deferred) == [SECOND]
        deferred.finish(AWAY, SECOND)
        assert _owed(deferred) == []


@pytest.mark.spec("SURFACE-22")
async def test_all_that_is_owed_is_there_after_a_restart(tmp_path: Path) -> None:
    async with Store(tmp_path / "c.db") as store:
        deferred = Deferred(store)
        for number in range(1000):
            deferred.add(DeferredCommand(AgentId(f"agent-{number}"), PULL, NOON))
        owed = deferred.all()
    async with Store(tmp_path / "c.db") as store:
        again = Deferred(store)
        await again.restore()
        assert again.all() == owed
        again.forget(AgentId("agent-0"))
    async with Store(tmp_path / "c.db") as store:
        again = Deferred(store)
        await again.restore()
        assert again.all() == owed[1:]
