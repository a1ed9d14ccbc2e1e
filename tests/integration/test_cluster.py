"""Several coordinators with one PostgreSQL: one leads, all answer, each may die."""

import asyncio
import io
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import psutil
import pytest

from ollama_coordinator.cluster import Cluster
from ollama_coordinator.db import SharedDatabase, database_of
from ollama_coordinator_common.settings import AgentConfig
from support import agent_world, programs
from support.cluster import CHAT, Coordinator, cluster
from support.databases import PostgresSchema
from support.deadline import DEADLINE_SECONDS
from support.line import Line
from support.ollama import StandIn

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals there are another matter")


@pytest.fixture
async def pair(tmp_path: Path, postgres: PostgresSchema) -> AsyncIterator[list[Coordinator]]:
    async with cluster(tmp_path, postgres.url) as made:
        yield made


@pytest.fixture
async def ollama() -> AsyncIterator[StandIn]:
    async with StandIn() as ollama:
        yield ollama


@pytest.mark.spec("CLUSTER-1")
@pytest.mark.spec("CLUSTER-2")
async def test_any_coordinator_answers_anything(pair: list[Coordinator], ollama: StandIn) -> None:
    first, second = pair
    agent_id = await second.register(ollama, "by-the-second")
    assert [agent["machine_name"] for agent in await first.get("/api/agents")] == ["by-the-second"]
    for one in pair:
        assert (await one.chat())[0] == 200
        health = await one.get("/healthz")
        assert health["leader"]["url"] == first.url
        assert health["leader"]["epoch"] == 1
    async with asyncio.timeout(DEADLINE_SECONDS):
        while len(health["coordinators"]) < 2:
            await asyncio.sleep(0.01)
            health = await second.get("/healthz")
    assert {each["url"] for each in health["coordinators"]} == {each.url for each in pair}
    async with second.session.post(f"{second.url}/api/chat", json=CHAT) as response:
        assert response.content_type == "application/x-ndjson"
        assert (await response.read()).endswith(b"}\n")
    async with second.session.head(second.url) as response:
        assert (response.status, await response.read()) == (200, b"")
    async with second.session.get(f"{second.url}/api/none") as response:
        assert (response.status, await response.text()) == (404, "404 page not found")
    async with second.session.delete(f"{second.url}/api/agents/{agent_id}") as response:
        assert response.status == 204
    assert await first.get("/api/agents") == []


@pytest.mark.spec("CLUSTER-2")
async def test_a_large_body_passes_whole(pair: list[Coordinator], ollama: StandIn) -> None:
    _, second = pair
    await second.register(ollama, "one")
    text = "long " * 300_000
    body = {**CHAT, "messages": [{"role": "user", "content": text}], "stream": False}
    sent = json.dumps(body).encode()
    async with second.session.post(f"{second.url}/api/chat", data=io.BytesIO(sent)) as response:
        assert response.status == 200, await response.text()
    assert json.loads(ollama.seen.last.body) == body


@pytest.mark.spec("CLUSTER-2")
async def test_a_client_that_leaves_a_front_ends_its_request(
    pair: list[Coordinator], ollama: StandIn
) -> None:
    first, second = pair
    await second.register(ollama, "one")
    ollama.hold(after=1)
    async with second.session.post(f"{second.url}/api/chat", json=CHAT) as response:
        await response.content.readline()
        assert (await first.get("/healthz"))["in_flight"] == 1
        response.close()
    await first.has(0)


@pytest.mark.spec("CLUSTER-3")
async def test_a_request_has_its_own_clients_address_and_nobody_else_may_name_one(
    pair: list[Coordinator], ollama: StandIn
) -> None:
    first, second = pair
    await second.register(ollama, "one")
    connector = aiohttp.TCPConnector(local_addr=("127.0.0.9", 0))
    async with aiohttp.ClientSession(connector=connector) as session:
        for one in pair:
            headers = {"X-Ollama-Coordinator-Front": "guessed 10.1.2.3 4567"}
            async with session.post(
                f"{one.url}/api/chat", json={**CHAT, "stream": False}, headers=headers
            ) as response:
                # A front takes it for another one's, and says that it does not lead.
                assert response.status == (200 if one is first else 503)
        async with session.post(f"{second.url}/api/chat", json=CHAT) as response:
            await response.read()
    rows = await first.history(2)
    assert {row["client"] for row in rows} == {"127.0.0.9"}


@pytest.mark.spec("CLUSTER-4")
async def test_when_the_leader_is_killed_another_one_leads_and_knows_all(
    tmp_path: Path, postgres: PostgresSchema, ollama: StandIn
) -> None:
    async with cluster(tmp_path, postgres.url, 3) as [first, *others]:
        await others[0].register(ollama, "kept")
        async with others[0].session.post(
            f"{others[0].url}/api/keys", json={"name": "anna"}
        ) as response:
            assert response.status == 201
        first.program.send(signal.SIGKILL)
        # Those that come meanwhile wait.
        answers = await asyncio.gather(*(one.chat() for one in others for _ in range(5)))
        assert [status for status, _ in answers] == [200] * 10
        health = await others[0].get("/healthz")
        assert health["leader"]["epoch"] == 2
        assert health["leader"]["url"] in [one.url for one in others]
        assert (await others[1].get("/api/agents"))[0]["machine_name"] == "kept"
        assert [key["name"] for key in (await others[1].get("/api/keys"))["keys"]] == ["anna"]


@pytest.mark.spec("CLUSTER-4")
async def test_a_frozen_leader_is_replaced_and_follows_when_it_thaws(
    pair: list[Coordinator], ollama: StandIn
) -> None:
    first, second = pair
    await second.register(ollama, "one")
    first.program.send(signal.SIGSTOP)
    assert (await second.chat())[0] == 200
    await second.leads(epoch=2)
    first.program.send(signal.SIGCONT)
    await first.program.says("another coordinator leads now")
    await first.program.says("stands by")
    assert (await first.chat())[0] == 200
    assert (await first.get("/healthz"))["leader"]["url"] == second.url


@pytest.mark.spec("CLUSTER-4")
@pytest.mark.parametrize("is_amid_a_write", [False, True])
def test_the_session_of_a_leader_that_is_silent_is_ended(
    postgres: PostgresSchema, is_amid_a_write: bool
) -> None:
    import psycopg

    from ollama_coordinator.db.postgres import LOCK_KEY

    beside = database_of(postgres.url)
    assert isinstance(beside, SharedDatabase)
    beside.open_beside()
    try:
        with psycopg.connect(postgres.url) as silent:
            lock = "SELECT pg_advisory_lock(%s, hashtext(current_schema()))"
            silent.autocommit = not is_amid_a_write
            silent.execute(lock, [LOCK_KEY])  # which may begin a transaction
            assert not beside.end_silent_leader(60)
            assert beside.is_led()  # it may be about to go on
            assert beside.end_silent_leader(0)
            assert not beside.is_led()  # at once: whoever ended it may lead
            assert not beside.end_silent_leader(0)
            with pytest.raises(psycopg.OperationalError):
                silent.execute("SELECT 1")
    finally:
        beside.close()


@pytest.mark.spec("CLUSTER-4")
async def test_a_leader_that_is_silent_and_answers_nobody_is_replaced_before_its_session_times_out(
    postgres: PostgresSchema, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ollama_coordinator.db.postgres.SILENT_SECONDS", 600)
    monkeypatch.setattr("ollama_coordinator.cluster.QUIET_SECONDS", 0.1)
    leader, front = database_of(postgres.url), database_of(postgres.url)
    assert isinstance(front, SharedDatabase)
    asked = []

    async def answers(url: str) -> bool:
        asked.append(url)
        return len(asked) < 4  # as one whose database is slow

    leader.open()
    try:
        postgres.ask(
            "INSERT INTO coordinators (id, url, version, certificate, started_ms, seen_ms, epoch)"
            " VALUES ('a', 'http://127.0.0.1:1', '1', '', 0, 0, 1)"
        )
        async with asyncio.timeout(DEADLINE_SECONDS):
            await Cluster(front).follow(answers)
        assert asked == ["http://127.0.0.1:1"] * 4
        front.open()  # whoever returns from following may lead at once
        front.close()
    finally:
        leader.close()


@pytest.mark.spec("CLUSTER-5")
async def test_a_leader_that_stops_gives_way_at_once_and_ends_its_answers(
    pair: list[Coordinator], ollama: StandIn
) -> None:
    first, second = pair
    await second.register(ollama, "one")
    ollama.hold(after=1)
    async with first.session.post(f"{first.url}/api/chat", json=CHAT) as response:
        await response.content.readline()
        first.program.send(programs.TERMINATE)
        await second.leads(epoch=2)
        ollama.release()
        assert (await second.chat())[0] == 200
        assert b'"done":true' in await response.read()
    assert await first.program.ended() == 0
    await second.history(2)


@pytest.mark.spec("CLUSTER-6")
async def test_a_database_that_comes_back_changes_no_leader(
    tmp_path: Path, postgres: PostgresSchema, ollama: StandIn
) -> None:
    async with (
        Line(postgres.url) as line,
        cluster(tmp_path, line.url) as [first, second],
    ):
        await second.register(ollama, "one")
        line.cut()
        await first.program.says("database not writable")
        await second.program.says("cannot see who leads")
        assert (await second.chat())[0] == 200
        await line.mend()
        await first.program.says("database writable again")
        assert (await second.chat())[0] == 200
        assert (await second.get("/healthz"))["leader"]["epoch"] == 1


@pytest.mark.spec("CLUSTER-7")
async def test_a_linked_agent_is_served_by_way_of_a_front(
    pair: list[Coordinator], tmp_path: Path, ollama: StandIn
) -> None:
    first, second = pair
    settings = AgentConfig(
        coordinator_url=second.url, ollama_port=ollama.port, state_dir=tmp_path / "agent",
        machine_name="linked", transport="link", manage_ollama=False,
    )  # fmt: skip
    async with agent_world.running(settings), asyncio.timeout(DEADLINE_SECONDS):
        while (await second.chat())[0] != 200:
            await asyncio.sleep(0.01)
        await first.program.says("agent's link is open")
        first.program.send(signal.SIGKILL)
        await second.leads(epoch=2)
        while (await second.chat())[0] != 200:
            await asyncio.sleep(0.01)


@pytest.mark.spec("CLUSTER-8")
async def test_without_a_leader_a_request_is_told_to_come_again(
    tmp_path: Path, postgres: PostgresSchema
) -> None:
    async with cluster(tmp_path, postgres.url) as [first, second]:
        postgres.ask("ALTER SCHEMA " + postgres.schema + " RENAME TO gone")
        os.kill(first.program.pid, signal.SIGKILL)
        try:
            async with second.session.get(f"{second.url}/readyz") as response:
                assert response.status == 503
                assert "leads now" in (await response.json())["error"]
        finally:
            postgres.ask("ALTER SCHEMA gone RENAME TO " + postgres.schema)
        await second.leads(epoch=2)
        assert (await second.get("/readyz"))["status"] == "ok"


# ── attempts that fronts carry out ────────────────────────────────────────────────────────────


@pytest.mark.spec("CLUSTER-9")
async def test_a_stream_by_way_of_a_front_outlives_its_leader(
    pair: list[Coordinator], ollama: StandIn
) -> None:
    first, second = pair
    await second.register(ollama, "one")
    ollama.hold(after=1)
    async with second.session.post(f"{second.url}/api/chat", json=CHAT) as response:
        await response.content.readline()
        await first.program.kill()
        await second.leads(epoch=2)
        ollama.release()
        assert b'"done":true' in await response.read()
    async with asyncio.timeout(DEADLINE_SECONDS):
        while (await second.chat())[0] != 200:  # its models may not have been written yet
            await asyncio.sleep(0.01)
    served = [one for one in ollama.seen.of("/api/chat") if one.status == 200]
    assert len(served) == 2  # nothing was generated twice


@pytest.mark.spec("CLUSTER-9")
async def test_what_a_front_carries_out_is_retried_and_counted_as_at_the_leader(
    pair: list[Coordinator], ollama: StandIn
) -> None:
    first, second = pair
    async with StandIn() as broken:
        await second.register(ollama, "well")
        await second.register(broken, "broken")
        broken.faults.rst(paths=["/api/chat"])
        for _ in range(4):
            assert (await second.chat(model="llama3.2"))[0] == 200
    rows = await first.history(4)
    assert {row["agent"] for row in rows} == {"well"}
    assert all(row["output_tokens"] and row["status"] == "served" for row in rows)
    assert (await first.get("/healthz"))["in_flight"] == 0


@pytest.mark.spec("CLUSTER-9")
async def test_an_operator_ends_what_a_front_carries_out(
    pair: list[Coordinator], ollama: StandIn
) -> None:
    first, second = pair
    await second.register(ollama, "one")
    ollama.hold(after=1)
    headers = {"Origin": "http://localhost:3000"}
    async with second.session.post(
        f"{second.url}/api/chat", json=CHAT, headers=headers
    ) as response:
        await response.content.readline()
        assert response.headers.getall("Access-Control-Allow-Origin") == [headers["Origin"]]
        [row] = await first.get("/api/requests")
        async with first.session.delete(f"{first.url}/api/requests/{row['id']}") as answer:
            assert answer.status == 204
        assert b"error" in await response.read()
    await first.has(0)


# ── what a new leader takes over ──────────────────────────────────────────────────────────────


@pytest.mark.spec("CLUSTER-12")
async def test_a_new_leader_counts_shows_cancels_and_records_what_fronts_carry_out(
    tmp_path: Path, postgres: PostgresSchema, ollama: StandIn
) -> None:
    async with (
        StandIn() as other,
        cluster(tmp_path, postgres.url, 3) as [first, *others],
        AsyncExitStack() as stack,
    ):
        streams = []
        for machine, name in ((ollama, "one"), (other, "other")):
            await first.register(machine, name)
            machine.hold(after=1)
        for one in others:
            post = one.session.post(f"{one.url}/api/chat", json=CHAT)
            streams.append(await stack.enter_async_context(post))
            await streams[-1].content.readline()
        before = {row["id"]: row for row in await first.get("/api/requests")}
        await first.program.kill()
        # By way of both: one of them leads, and has to hear of its own as well.
        for one in others:
            async with asyncio.timeout(DEADLINE_SECONDS):
                while (await one.get("/healthz", 503)).get("in_flight") != 2:
                    await asyncio.sleep(0.05)
        rows = {row["id"]: row for row in await others[0].get("/api/requests")}
        assert rows.keys() == before.keys()
        assert {row["agent"] for row in rows.values()} == {"one", "other"}
        assert {row["state"] for row in rows.values()} == {"writing"}
        ended = streams[1].headers["X-Ollama-Coordinator-Request"]
        async with others[0].session.delete(f"{others[0].url}/api/requests/{ended}") as answer:
            assert answer.status == 204
        assert b"error" in await streams[1].read()
        for held in (ollama, other):
            held.release()
        assert b'"done":true' in await streams[0].read()
        recorded = {row["id"]: row for row in await others[1].history(2)}
        assert recorded.keys() == before.keys()
        assert recorded[ended]["status"] == "cancelled"
        assert sorted(row["status"] for row in recorded.values()) == ["cancelled", "served"]
        assert (await others[1].get("/healthz"))["in_flight"] == 0
        assert ollama.seen.count("/api/chat") == other.seen.count("/api/chat") == 1


@pytest.mark.spec("CLUSTER-12")
async def test_what_ends_while_nobody_leads_is_in_the_history_once(
    pair: list[Coordinator], ollama: StandIn
) -> None:
    first, second = pair
    await second.register(ollama, "one")
    ollama.hold(after=1)
    async with second.session.post(f"{second.url}/api/chat", json=CHAT) as response:
        await response.content.readline()
        first.program.send(signal.SIGSTOP)  # for some seconds nobody else may lead
        ollama.release()
        assert b'"done":true' in await response.read()
    await second.leads(epoch=2)
    [row] = await second.history(1)
    assert (row["status"], row["agent"]) == ("served", "one")
    first.program.send(signal.SIGCONT)
    await first.program.says("stands by")
    assert (await second.chat())[0] == 200
    assert len(await second.history(2)) == 2


@pytest.mark.spec("CLUSTER-13")
async def test_a_leader_that_stops_hands_over_what_runs_and_what_waits(
    pair: list[Coordinator],
) -> None:
    first, second = pair
    async with StandIn() as ollama:
        await second.register(ollama, "one")
        ollama.hold(after=1)
        async with first.session.post(f"{first.url}/api/chat", json=CHAT) as response:
            await response.content.readline()
            waiting = [asyncio.create_task(one.chat()) for one in pair * 2]
            await first.has(5)
            first.program.send(programs.TERMINATE)
            await second.leads(epoch=2)
            await second.has(5)
            ollama.release()
            assert b'"done":true' in await response.read()
            assert [status for status, _ in await asyncio.gather(*waiting)] == [200] * 4
        rows = await second.history(5)
        assert [row["status"] for row in rows] == ["served"] * 5
        assert len([one for one in ollama.seen.of("/api/chat") if one.status == 200]) == 5
    assert await first.program.ended() == 0


# ── several processes on one machine ──────────────────────────────────────────────────────────


@asynccontextmanager
async def workers(folder: Path, count: int) -> AsyncIterator[Coordinator]:
    """One program of so many processes, with a file for its database."""
    port = programs.free_port()
    settings = {"COORDINATOR_WORKERS": str(count)}
    async with (
        programs.coordinator(folder, port, **settings) as (base, program),
        # A connection of its own for each request: any of the processes may take it.
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session,
    ):
        await program.says_so_often("coordinator listens", count)
        yield Coordinator(base, program, session)


def processes(coordinator: Coordinator) -> dict[int, psutil.Process]:
    """The processes that serve, by the ports on which the others reach them."""
    found = {}
    for process in psutil.Process(coordinator.program.pid).children():
        ports = {one.laddr.port for one in process.net_connections() if one.status == "LISTEN"}
        for port in ports - {int(coordinator.url.rpartition(":")[2])}:
            found[port] = process
    return found


@pytest.mark.spec("CLUSTER-10")
async def test_a_process_of_several_that_dies_takes_nothing_with_it(
    tmp_path: Path, ollama: StandIn
) -> None:
    async with workers(tmp_path, 3) as coordinator:
        await coordinator.register(ollama, "one")
        leader = (await coordinator.led())["url"]
        serving = processes(coordinator)
        assert len(serving) == 3
        ollama.hold(after=1)
        streams = [asyncio.create_task(_streamed(coordinator)) for _ in range(8)]
        async with asyncio.timeout(DEADLINE_SECONDS):
            while ollama.seen.count("/api/chat") < 1:
                await asyncio.sleep(0.01)
        serving[int(leader.rpartition(":")[2])].kill()
        ollama.release()
        ends = await asyncio.gather(*streams)
        # Those whose connections were with the process that died are cut, and know it.
        assert all(b'"done":true' in end or end == CUT for end in ends)
        assert (await coordinator.chat())[0] == 200
        assert (await coordinator.led(epoch=2))["epoch"] == 2
        async with asyncio.timeout(DEADLINE_SECONDS):
            while len(processes(coordinator)) < 3:
                await asyncio.sleep(0.05)
        rest = list(processes(coordinator).values())
        coordinator.program.send(programs.TERMINATE)
        assert await coordinator.program.ended() == 0
        assert not [process for process in rest if process.is_running()]


CUT = b"cut"


async def _streamed(coordinator: Coordinator) -> bytes:
    try:
        async with coordinator.session.post(f"{coordinator.url}/api/chat", json=CHAT) as response:
            return await response.read()
    except aiohttp.ClientError:
        return CUT


@pytest.mark.spec("CLUSTER-11")
async def test_a_front_believes_the_certificate_that_the_database_names(
    tmp_path: Path, ollama: StandIn
) -> None:
    port, log = programs.free_port(), tmp_path / "log"
    settings = {
        "COORDINATOR_WORKERS": "2",
        "COORDINATOR_TLS": "self",
        "COORDINATOR_HOST": "127.0.0.1",
        "COORDINATOR_PORT": str(port),
        "DATABASE_URL": f"sqlite:///{tmp_path.as_posix()}/coordinator.db",
    }
    connector = aiohttp.TCPConnector(force_close=True, ssl=False)
    async with (
        programs.program(log, programs.command("ollama-coordinator"), **settings) as program,
        aiohttp.ClientSession(connector=connector) as session,
    ):
        await program.says_so_often("coordinator listens", 2)
        coordinator = Coordinator(f"https://127.0.0.1:{port}", program, session)
        await coordinator.register(ollama, "one")
        leader = (await coordinator.led())["url"]
        assert leader.startswith("https://")
        [front] = [each for at, each in processes(coordinator).items() if f":{at}" not in leader]
        at = next(at for at, each in processes(coordinator).items() if each == front)
        by_front = Coordinator(f"https://127.0.0.1:{at}", program, session)
        assert (await by_front.chat())[0] == 200


@pytest.mark.spec("CLUSTER-10")
async def test_a_process_that_is_frozen_is_replaced(tmp_path: Path, ollama: StandIn) -> None:
    async with workers(tmp_path, 2) as coordinator:
        leader = (await coordinator.led())["url"]
        processes(coordinator)[int(leader.rpartition(":")[2])].suspend()
        await coordinator.program.says("epoch=2")
        await coordinator.program.says_so_often("coordinator listens", 3)
        assert len(processes(coordinator)) == 2


@pytest.mark.spec("CLUSTER-10")
async def test_the_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    async with workers(tmp_path, 2) as coordinator:
        serving = list(processes(coordinator).values())
        await coordinator.program.kill()
        async with asyncio.timeout(DEADLINE_SECONDS):
            while any(process.is_running() for process in serving):
                await asyncio.sleep(0.05)


@pytest.mark.spec("CLUSTER-10")
async def test_what_several_processes_cannot_share_is_said(tmp_path: Path) -> None:
    command = programs.command("ollama-coordinator")
    settings = {"COORDINATOR_WORKERS": "2", "DATABASE_URL": "sqlite://:memory:"}
    async with programs.program(tmp_path / "log", command, **settings) as program:
        assert await program.ended() == 1
        assert "COORDINATOR_WORKERS=2 does not work: a database in memory" in program.output


@pytest.mark.spec("CLUSTER-9")
@pytest.mark.spec("PROXY-46")
@pytest.mark.parametrize("through", ["leader", "front"])
async def test_an_answer_goes_on_at_another_machine(
    pair: list[Coordinator], ollama: StandIn, through: str
) -> None:
    leader, asked = pair[0], pair[through == "front"]
    async with StandIn() as other:
        nodes = {"one": ollama, "two": other}
        for name, node in nodes.items():
            await leader.register(node, name)
            node.hold(after=5)
        url = f"{asked.url}/api/chat"
        async with asked.session.post(url, json=CHAT) as response:
            name = response.headers["x-ollama-coordinator-agent"]
            dying, living = nodes.pop(name), next(iter(nodes.values()))
            await dying.seen.wait_for(lambda seen: seen.held == 1)
            living.release()
            await dying.kill()
            lines = [json.loads(line) for line in (await response.read()).splitlines()]
        assert lines[-1]["continued"] == [{"from": name, "by": next(iter(nodes)), "tokens": 5}]
        assert len(lines) == 17
        rows = await leader.history(1)
        assert (rows[0]["output_tokens"], rows[0]["status"]) == (16, "served")
        # With the leader gone nobody says where it could go on.
        await dying.start()
        for node in (ollama, other):
            node.hold(after=5)
        async with asked.session.post(url, json=CHAT) as response:
            for _ in range(5):
                await response.content.readline()
            if through == "front":
                await leader.program.kill()
                for node in (ollama, other):
                    await node.kill()
                assert list(json.loads((await response.read()).splitlines()[-1])) == ["error"]
