"""The ends that a front owes leaders: none is lost on its way from one leader to the next."""

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest

from ollama_coordinator.carry.front import CarriedAttempt, FrontAttempts, KnownAttempt
from ollama_coordinator.carry.messages import AttemptEnd, Report
from ollama_coordinator.clock import Clock
from ollama_coordinator.scheduler import Outcome, Result
from ollama_coordinator.upstream import Unreachable, Upstreams
from support.deadline import DEADLINE_SECONDS

FIRST, SECOND = "http://first", "http://second"
SERVED = AttemptEnd(Outcome(Result.SERVED), 200)
NUMBER = 1 << 32 | 1


class Leaders:
    """What leaders have heard; a lost one takes nothing, and a held one answers late."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Report]] = []
        self.lost = {FIRST: False, SECOND: False}
        self.answers = asyncio.Event()
        self.answers.set()
        self.asked = asyncio.Condition()
        self.tries = 0

    async def post(self, leader: str, body: bytes) -> None:
        async with self.asked:
            self.tries += 1
            self.asked.notify_all()
        if self.lost[leader]:
            raise Unreachable("lost")
        reports = msgspec.msgpack.decode(body, type=list[Report])
        self.heard += [(leader, report) for report in reports]
        await self.answers.wait()

    async def tried(self, times: int) -> None:
        async with asyncio.timeout(DEADLINE_SECONDS), self.asked:
            await self.asked.wait_for(lambda: self.tries >= times)


@pytest.fixture
def leaders() -> Leaders:
    return Leaders()


@pytest.fixture
async def attempts(leaders: Leaders) -> AsyncIterator[FrontAttempts]:
    """Those of a front that carries one out for the first leader."""
    clock = Clock()
    made = FrontAttempts(Upstreams(clock), clock, leaders.post)
    now = clock.now()
    made._under_way[NUMBER] = KnownAttempt(FIRST, CarriedAttempt(now), b"grant", now, now)
    async with made._tasks:
        yield made


@pytest.mark.spec("CLUSTER-12")
async def test_an_end_that_passes_the_hello_on_its_way_is_told_once_more(
    leaders: Leaders, attempts: FrontAttempts
) -> None:
    hello = attempts.hello("front", 0, SECOND, 2)
    attempts._end(NUMBER, SERVED)  # its report may be there before the hello, and is of nothing
    await leaders.tried(1)
    leaders.heard.clear()
    attempts.heard(hello)
    await leaders.tried(2)
    [(leader, report)] = leaders.heard
    assert (leader, report.id, report.ended) == (SECOND, NUMBER, SERVED)


@pytest.mark.spec("CLUSTER-12")
async def test_an_end_is_heard_only_by_whom_it_was_told(
    leaders: Leaders, attempts: FrontAttempts
) -> None:
    leaders.answers.clear()
    attempts._report(NUMBER, attempts._under_way[NUMBER])  # its progress
    await leaders.tried(1)
    leaders.lost[FIRST] = True
    attempts._end(NUMBER, SERVED)
    await leaders.tried(2)
    leaders.answers.set()
    await leaders.tried(3)
    assert attempts._over[NUMBER].heard_at is None


@pytest.mark.spec("CLUSTER-9")
async def test_an_end_is_reported_until_the_leader_can_be_reached(
    leaders: Leaders, attempts: FrontAttempts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ollama_coordinator.carry.front.AGAIN_SECONDS", 0)
    leaders.lost[FIRST] = True
    attempts._end(NUMBER, SERVED)
    await leaders.tried(20)
    leaders.lost[FIRST] = False
    await attempts.settle()
    assert [report.ended for _, report in leaders.heard] == [SERVED]


@pytest.mark.spec("CLUSTER-12")
async def test_what_one_leader_has_heard_the_next_one_is_told_as_well(
    leaders: Leaders, attempts: FrontAttempts
) -> None:
    attempts._end(NUMBER, SERVED)
    await attempts.settle()
    for leader, epoch in ((SECOND, 2), (FIRST, 3)):
        hello = attempts.hello("front", 0, leader, epoch)
        assert [one.ended for one in hello.carrying] == [SERVED]
        attempts.heard(hello)
