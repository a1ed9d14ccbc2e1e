"""What agents owe: which deeds remain, in which order, and that none is lost."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from ollama_coordinator.db import Store
from ollama_coordinator.operations import Debts, Deed, Pending
from ollama_coordinator.operations import deeds as deeds_for
from ollama_coordinator_common.types import AgentId

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
AWAY = AgentId("away")

PULL = deeds_for.pull("m")
FIRST = deeds_for.create("m", b'{"system":"first"}', ())
SECOND = deeds_for.create("m", b'{"system":"second"}', ())
COPY_OF_A = deeds_for.copy("a", "m")
COPY_OF_B = deeds_for.copy("b", "m")
LOAD = deeds_for.load("m")
LOAD_FOR_LONG = deeds_for.load("m", keep_alive="24h")
DELETE = deeds_for.delete("m")


def _owe(debts: Debts, *deeds: Deed) -> None:
    for minutes, deed in enumerate(deeds):
        debts.add(Pending(AWAY, deed, NOON + timedelta(minutes=minutes)))


def _owed(debts: Debts) -> list[Deed]:
    return [pending.deed for pending in debts.all()]


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
async def test_only_what_is_newest_is_owed(asked: list[Deed], owed: list[Deed]) -> None:
    async with Store(None) as store:
        debts = Debts(store)
        _owe(debts, *asked)
        assert _owed(debts) == owed


@pytest.mark.spec("SURFACE-23")
async def test_what_is_owed_already_keeps_its_time_and_its_place() -> None:
    async with Store(None) as store:
        debts = Debts(store)
        _owe(debts, PULL, LOAD, PULL)
        assert [(pending.deed, pending.since) for pending in debts.all()] == [
            (PULL, NOON),
            (LOAD, NOON + timedelta(minutes=1)),
        ]
        debts.void(AWAY, PULL)
        assert _owed(debts) == [PULL, LOAD]


@pytest.mark.spec("SURFACE-23")
async def test_an_older_deed_that_gets_done_leaves_the_newer_one() -> None:
    async with Store(None) as store:
        debts = Debts(store)
        _owe(debts, FIRST, SECOND)
        debts.settle(AWAY, FIRST)
        assert _owed(debts) == [SECOND]
        debts.settle(AWAY, SECOND)
        assert _owed(debts) == []


@pytest.mark.spec("SURFACE-22")
async def test_all_that_is_owed_is_there_after_a_restart(tmp_path: Path) -> None:
    async with Store(tmp_path / "c.db") as store:
        debts = Debts(store)
        for number in range(1000):
            debts.add(Pending(AgentId(f"agent-{number}"), PULL, NOON))
        owed = debts.all()
    async with Store(tmp_path / "c.db") as store:
        again = Debts(store)
        await again.restore()
        assert again.all() == owed
        again.forget(AgentId("agent-0"))
    async with Store(tmp_path / "c.db") as store:
        again = Debts(store)
        await again.restore()
        assert again.all() == owed[1:]
