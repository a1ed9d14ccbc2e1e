"""What a new leader takes over from fronts, whatever they say; the front is this test."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from msgspec import structs

from ollama_coordinator.carry import Grant, Hello, Takeover, encoded
from ollama_coordinator.carry.messages import WIRE, Abort, AttemptEnd, Carrying, Report, Told
from ollama_coordinator.db import DatabaseError
from ollama_coordinator.scheduler import Outcome, Request, RequestId, Result, Timings
from ollama_coordinator_common.types import AgentId
from support.coordinator import Running
from support.ollama import StandIn

NUMBER = 1 << 32 | 5


def grant(coordinator: Running, **more: Any) -> Grant:
    """What the leader before has granted."""
    [agent] = coordinator.parts.registry
    request = Request(
        id=RequestId("r1"),
        model="registry.ollama.ai/library/llama3.2:latest",
        name="llama3.2",
        arrived_at=12345.0,  # by another clock
        client="anna",
        prompt_tokens=9,
    )
    return Grant(structs.replace(request, **more), "/api/chat", AgentId(agent.id), 2.0)


def hello(one: Grant, *, number: int = NUMBER, ended: AttemptEnd | None = None) -> Hello:
    return Hello(WIRE, "front", 0, [Carrying(number, encoded(one), 3.0, 1.0, 4, ended, 3.0)])


class Heard:
    """What the leader tells the front."""

    def __init__(self) -> None:
        self.told: asyncio.Queue[Told] = asyncio.Queue()

    async def tell(self, told: Told) -> None:
        await self.told.put(told)


def report(takeover: Takeover, outcome: Outcome, **more: Any) -> None:
    ended = AttemptEnd(outcome, 200, **more)
    takeover.carried.take(encoded([Report(NUMBER, True, 7, ended)]))


SERVED = Outcome(Result.SERVED, timings=Timings(prompt_tokens=9, output_tokens=7))


async def rows(coordinator: Running, count: int) -> list[Any]:
    recent = coordinator.parts.observation.journal.recent
    await coordinator.until(lambda: len(recent) >= count)
    return [one.request for one in recent]


@pytest.mark.spec("CLUSTER-12")
async def test_what_was_taken_over_counts_until_its_front_reports_its_end(
    coordinator: Running, ollama: StandIn
) -> None:
    takeover, parts, heard = Takeover(coordinator.parts), coordinator.parts, Heard()
    async with takeover.running():
        takeover.take(hello(grant(coordinator)), heard.tell)
        takeover.take(hello(grant(coordinator)), heard.tell)  # a front may speak again
        [lease] = parts.scheduler.leases()
        now = parts.clock.now()
        assert now - lease.granted_at == pytest.approx(3.0, abs=0.5)
        assert lease.granted_at - lease.request.arrived_at == pytest.approx(2.0)
        await coordinator.until(lambda: parts.observation.journal.live)
        [view] = parts.observation.journal.views(now)
        assert (view.id, view.state.value, view.tokens) == ("r1", "writing", 4)
        report(takeover, SERVED)
        report(takeover, SERVED)
        [row] = await rows(coordinator, 1)
        assert (row.id, row.client, row.output_tokens, row.attempts) == ("r1", "anna", 7, 1)
        assert (row.status.value, row.waited_seconds) == ("served", pytest.approx(2.0))
        assert not list(parts.scheduler.leases())


@pytest.mark.spec("CLUSTER-12")
async def test_an_operator_cancels_what_was_taken_over(
    coordinator: Running, ollama: StandIn
) -> None:
    takeover, heard = Takeover(coordinator.parts), Heard()
    async with takeover.running():
        takeover.take(hello(grant(coordinator)), heard.tell)
        await asyncio.sleep(0)
        assert coordinator.parts.dispatch.cancel(RequestId("r1"), "enough")
        told = await heard.told.get()
        assert told == Abort(NUMBER, "RequestCancelled", "enough")
        report(takeover, Outcome(Result.CANCELLED, "enough"), cancelled="enough")
        [row] = await rows(coordinator, 1)
        assert (row.status.value, row.error) == ("failed", "enough") or row.http_status == 499


@pytest.mark.spec("CLUSTER-12")
async def test_what_ended_before_is_recorded_unless_it_was(
    coordinator: Running, ollama: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ollama_coordinator.carry.leader.WRITTEN_SECONDS", 0.0)
    takeover, heard = Takeover(coordinator.parts), Heard()
    history, ended = coordinator.parts.observation.history, AttemptEnd(SERVED, 200)
    written, asked = history.written, 0

    async def fails_once(ids: Sequence[str]) -> set[str]:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise DatabaseError("database", "away")
        return await written(ids)

    monkeypatch.setattr(history, "written", fails_once)
    async with takeover.running():
        takeover.take(hello(grant(coordinator), ended=ended), heard.tell)
        [row] = await rows(coordinator, 1)
        assert (row.id, row.status.value, row.output_tokens) == ("r1", "served", 7)
        takeover.take(hello(grant(coordinator), ended=ended), heard.tell)  # it may speak again
        await coordinator.parts.observation.sampler.write()
        takeover.take(hello(grant(coordinator), ended=ended), heard.tell)
        takeover.take(
            hello(grant(coordinator, id=RequestId("r2")), number=NUMBER + 1, ended=ended),
            heard.tell,
        )
        assert [row.id for row in await rows(coordinator, 2)] == ["r1", "r2"]


@pytest.mark.spec("CLUSTER-12")
async def test_nothing_is_granted_until_all_fronts_have_spoken(
    coordinator: Running, ollama: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, heard = coordinator.parts, Heard()
    monkeypatch.setattr(parts.cluster, "fronts", lambda: {"front", "other"})
    takeover = Takeover(parts)
    async with takeover.running():
        chat = asyncio.create_task(coordinator.chat())
        await coordinator.until(parts.scheduler.waiting_count)
        takeover.take(Hello(WIRE, "front", 1, []), heard.tell)
        takeover.take(Hello(WIRE, "other", 0, []), heard.tell)
        assert parts.dispatch.is_held  # until the request comes that waits at the first one
        takeover.hear_early()
        assert not parts.dispatch.is_held
        await chat


@pytest.mark.spec("CLUSTER-13")
async def test_what_a_leader_hands_over_is_neither_granted_nor_recorded_there(
    coordinator: Running, ollama: StandIn
) -> None:
    parts, heard = coordinator.parts, Heard()
    takeover = Takeover(parts)
    async with takeover.running():
        takeover.take(hello(grant(coordinator)), heard.tell)
        ollama.hold(after=1)
        chat = asyncio.create_task(coordinator.chat())
        await coordinator.until(lambda: len(parts.observation.journal.live) == 2)
        left = takeover.hand_over()
        assert len(left) == sum(1 for held in parts.dispatch.held() if not held.ended) - 1
        ollama.release()
        await asyncio.gather(chat, return_exceptions=True)
        assert heard.told.empty()
    assert not parts.observation.journal.recent
