"""A leader whose way to the database swallows every byte: it knows in time whether it may go on."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ollama_coordinator.cluster import Cluster
from ollama_coordinator.db import SharedDatabase, Store, database_of
from support import programs
from support.cluster import CHAT, cluster, started
from support.databases import PostgresSchema
from support.deadline import DEADLINE_SECONDS
from support.line import Line
from support.ollama import StandIn

NOTHING = "cut off from the database, and another one may lead: nothing is granted"


@pytest.mark.skipif(sys.platform == "win32", reason="signals there are another matter")
@pytest.mark.spec("CLUSTER-17")
async def test_a_leader_that_is_cut_off_from_the_database_grants_nothing_while_another_one_leads(
    tmp_path: Path, postgres: PostgresSchema
) -> None:
    async with (
        StandIn() as ollama,
        Line(postgres.url) as line,
        started(tmp_path / "cut-off", line.url) as first,
    ):
        await first.program.says("coordinator leads")
        async with started(tmp_path / "other", postgres.url) as second:
            await second.program.says("stands by")
            agent_id = await second.register(ollama, "one")
            where, slots = f"{first.url}/api/agents/{agent_id}", {"slots": 1}
            async with first.session.patch(where, json=slots) as answer:
                assert answer.status == 200
            ollama.hold(after=1)
            url = f"{first.url}/api/chat"
            async with first.session.post(url, json=CHAT) as response:
                await response.content.readline()
                waits = asyncio.create_task(first.chat())
                async with asyncio.timeout(DEADLINE_SECONDS):
                    while (health := await first.get("/healthz"))["waiting"] != 1:
                        await asyncio.sleep(0.01)
                    while len(health["coordinators"]) != 2:
                        health = await first.get("/healthz")
                line.freeze()
                await first.program.says(NOTHING)
                async with first.session.get(f"{first.url}/readyz") as answer:
                    assert answer.status == 503
                await second.leads(epoch=2)
                ollama.release()
                assert b'"done":true' in await response.read()  # what runs goes on
            assert (await second.chat())[0] == 200
            assert not waits.done()
            await line.mend()
            await first.program.says("another coordinator leads now")
            assert (await waits)[0] == 200  # at the one that leads
            assert (await first.chat())[0] == 200
            await second.has(0)
            assert ollama.seen.held == 0


@pytest.mark.skipif(sys.platform == "win32", reason="signals there are another matter")
@pytest.mark.spec("CLUSTER-19")
async def test_a_front_says_at_once_that_its_leader_does_not_answer(
    tmp_path: Path, postgres: PostgresSchema
) -> None:
    async with cluster(tmp_path, postgres.url) as [first, second]:
        assert (await second.get("/readyz"))["status"] == "ok"
        first.program.send(signal.SIGSTOP)
        async with second.session.get(f"{second.url}/readyz") as answer:
            assert answer.status == 503
            assert "epoch=2" not in second.program.output
            assert "leads now" in (await answer.json())["error"]
        await second.leads(epoch=2)


@pytest.fixture
async def leader(postgres: PostgresSchema) -> AsyncIterator[tuple[Line, Cluster]]:
    """A leader, the way to its database, and another one on the list that was heard of lately."""
    async with Line(postgres.url) as line:
        database = database_of(line.url)
        assert isinstance(database, SharedDatabase)
        led = Cluster(database, lambda address: f"http://{address}:1")
        async with Store(database) as store:
            await store.run(lambda db: _note_another(database))
            async with led.leading(store):
                yield line, led


def _note_another(database: SharedDatabase) -> None:
    database.execute(
        "INSERT INTO coordinators (id, url, version, certificate, started_ms, seen_ms, epoch)"
        " VALUES ('a', 'http://127.0.0.2:2', '1', '', 0, ?, 0)",
        [database.now_ms() + 3_600_000],
    )


@pytest.mark.spec("CLUSTER-17")
async def test_it_pauses_as_long_as_another_one_may_lead(
    leader: tuple[Line, Cluster],
) -> None:
    line, cluster = leader
    asked, told, may_lead = asyncio.Queue[str](), asyncio.Queue[bool](), False

    async def answers(url: str) -> bool:
        asked.put_nowait(url)
        return may_lead

    keeping = asyncio.create_task(cluster.keep_lead(answers, told.put_nowait))
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            line.freeze()
            for _ in range(3):  # nobody reaches the database: it leads on
                assert await asked.get() == "http://127.0.0.2:2"
            assert told.empty()
            may_lead = True
            assert await told.get() is True
            await line.mend()
            assert await told.get() is False  # what was swallowed came after all
    finally:
        keeping.cancel()


@pytest.mark.spec("CLUSTER-17")
async def test_a_coordinator_that_reaches_the_database_says_that_it_may_lead(
    tmp_path: Path, postgres: PostgresSchema
) -> None:
    async with Line(postgres.url) as line, started(tmp_path / "leads", postgres.url) as first:
        await first.program.says("coordinator leads")
        async with started(tmp_path / "follows", line.url) as second:
            await second.program.says("stands by")

            async def says() -> str:
                headers = {"X-Ollama-Coordinator-Front": "anybody"}
                async with second.session.get(f"{second.url}/healthz", headers=headers) as answer:
                    assert answer.status == 503
                    return str(answer.headers["X-Ollama-Coordinator-Follows"])

            async with asyncio.timeout(DEADLINE_SECONDS):
                for act, wanted in ((line.freeze, "1"), (None, "may-lead"), (line.cut, "1")):
                    if act is None:
                        await line.mend()
                    else:
                        act()
                    while await says() != wanted:
                        await asyncio.sleep(0.01)


@pytest.mark.spec("CLUSTER-17")
async def test_a_coordinator_may_not_lead_as_long_as_the_last_leader_may_return(
    postgres: PostgresSchema,
) -> None:
    front = database_of(postgres.url)
    assert isinstance(front, SharedDatabase)
    front.open()
    _note_another(front)
    front.execute("UPDATE coordinators SET epoch = 1")
    front.close()
    cluster, asked = Cluster(front), asyncio.Event()
    cluster._led_at = asyncio.get_running_loop().time()  # as while the database is away

    async def answers(url: str) -> bool:
        asked.set()
        return True

    async with asyncio.timeout(DEADLINE_SECONDS):
        following = asyncio.create_task(cluster.follow(answers))
        await asked.wait()
        assert not cluster.may_lead
        await following
        assert cluster.may_lead


@pytest.mark.spec("CLUSTER-17")
async def test_who_may_lead_is_told_from_how_it_answers(
    tmp_path: Path, postgres: PostgresSchema
) -> None:
    from ollama_coordinator.clock import Clock
    from ollama_coordinator.front.coordinator_queries import CoordinatorQueries
    from ollama_coordinator.upstream import Upstreams

    clock = Clock()
    async with (
        Upstreams(clock) as upstreams,
        Line(postgres.url) as deaf,
        started(tmp_path / "leads", postgres.url) as first,
    ):
        queries = CoordinatorQueries(Cluster(None), upstreams, clock)
        assert await queries.may_lead(first.url)
        assert not await queries.may_lead(f"http://127.0.0.1:{programs.free_port()}")
        deaf.freeze()
        _, _, port = deaf.url.partition("@127.0.0.1:")
        assert await queries.may_lead(f"http://127.0.0.1:{port.partition('/')[0]}")
