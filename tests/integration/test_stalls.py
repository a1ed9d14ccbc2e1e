"""Clients that stay connected and do not do their part: they are waited for, but not for ever."""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from ollama_coordinator import clock
from ollama_coordinator.http1 import ConnectionLimits
from ollama_coordinator.http1.connection import MovingTimer
from ollama_coordinator.http1.limits import capacity_of
from ollama_coordinator_common.settings import HTTP_CHOICES
from support import deaf, programs
from support.asgi import Client, Shows, connection
from support.coordinator import Running, running, serving
from support.deadline import DEADLINE_SECONDS

BOTH = pytest.mark.parametrize("http", HTTP_CHOICES)


@pytest.fixture
async def coordinator(http: str) -> AsyncIterator[Running]:
    """A coordinator whose patience is short."""
    async with running(http=http, stall_timeout=0.5, body_timeout=0.5) as coordinator:
        yield coordinator


async def last(coordinator: Running) -> dict[str, Any]:
    """The last request that ended."""
    ended = coordinator.parts.observation.journal.recent
    await coordinator.until(lambda: ended)
    return {"status": ended[-1].request.status.value, "error": ended[-1].request.error}


# ── an answer that is not read ────────────────────────────────────────────────────────────────


@BOTH
@pytest.mark.spec("OPERATION-18")
async def test_an_answer_that_nobody_takes_ends_with_its_lease(coordinator: Running) -> None:
    async with deaf.flooding() as ollama:
        agent_id = await coordinator.register(ollama)
        async with deaf.connected(coordinator.url, deaf.chat()) as sock:
            await deaf.begins(sock)
            await ollama.seen.wait_for(lambda seen: seen.cancelled == 1 and seen.active == 0)
            await coordinator.until(coordinator.at_rest)
            told = await last(coordinator)
            assert told["status"] == "cancelled"
            assert "took nothing of its answer for 0.5 s" in told["error"]
            assert not coordinator.agent(agent_id).resting
            got = await deaf.everything(sock)
            assert not got.endswith(b"0\r\n\r\n")


@BOTH
@pytest.mark.spec("OPERATION-18")
async def test_who_takes_an_answer_slowly_gets_it(http: str) -> None:
    shows, limits = Shows(), ConnectionLimits(stall_seconds=lambda: 0.6)
    async with (
        serving(shows, http, limits=limits) as url,
        deaf.connected(url, b"GET /flood HTTP/1.1\r\nHost: x\r\n\r\n") as sock,
    ):
        # Too little at a time for the kernel to ask for more, and much longer than a stall lasts.
        for _ in range(15):
            await deaf.reads(sock, 64 * 1024)
            await asyncio.sleep(0.1)
        await deaf.reads(sock, 90 * 1024 * 1024)


@BOTH
@pytest.mark.spec("OPERATION-18")
async def test_a_stall_of_0_waits_for_ever(http: str) -> None:
    async with running(http=http, stall_timeout=0) as coordinator, deaf.flooding() as ollama:
        await coordinator.register(ollama)
        async with deaf.connected(coordinator.url, deaf.chat()) as sock:
            await deaf.begins(sock)
            await asyncio.sleep(0.5)
            assert not coordinator.at_rest()
        await coordinator.until(coordinator.at_rest)


@pytest.mark.spec("OPERATION-18")
async def test_an_answer_on_http_2_that_nobody_takes_ends_too() -> None:
    """The connection goes on, its window for this answer does not open."""
    async with running(http="hypercorn", stall_timeout=0.3) as coordinator:
        # Hypercorn holds what does not fit into the window, so the agent's part may be done.
        async with deaf.flooding(pieces=4) as ollama:
            await coordinator.register(ollama)
            async with deaf.connected(coordinator.url, deaf.chat_on_http_2()):
                told = await last(coordinator)
                assert "took nothing of its answer for 0.3 s" in told["error"]
                assert coordinator.at_rest()


# ── a request that does not come ──────────────────────────────────────────────────────────────


BODY = json.dumps({"model": "llama3.2", "prompt": "hello"}).encode()


@BOTH
@pytest.mark.spec("OPERATION-19")
@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/api/generate", {"error": "nothing came of the request's body for 0.5 s"}),
        ("/api/show", {"error": "nothing came of the request's body for 0.5 s"}),
        ("/api/agents", {"error": "nothing came of the request's body for 0.5 s"}),
        (
            "/api/blobs/sha256:" + 64 * "a",
            {"error": "nothing came of the request's body for 0.5 s"},
        ),
        ("/v1/completions", None),
    ],
)
async def test_a_body_that_stands_still_is_answered_408(
    coordinator: Running, path: str, told: dict[str, str] | None
) -> None:
    request = deaf.post(path, BODY[:10], length=1000)
    async with connection(coordinator.url) as client:
        client.send(request)
        answer = await client.answer()
        assert answer.status == 408
        assert told in (None, answer.json)
        assert "nothing came" in str(answer.json["error"])
        assert await client.ends() == b""
    await coordinator.until(coordinator.at_rest)


@BOTH
@pytest.mark.spec("OPERATION-19")
async def test_a_body_that_comes_slowly_is_taken(http: str) -> None:
    async with running(http=http, body_timeout=0.4) as coordinator:
        async with connection(coordinator.url) as client:
            client.send(deaf.post("/api/generate", b"", length=len(BODY)))
            for at in range(0, len(BODY), 5):
                client.send(BODY[at : at + 5])
                await asyncio.sleep(0.1)
            # Read whole, and refused only because there is no agent.
            assert (await client.answer()).status == 503


async def is_served(url: str, path: bytes) -> bool:
    """Whether a new connection is let in."""
    async with connection(url) as client:
        client.send(b"GET /%b HTTP/1.1\r\nHost: x\r\n\r\n" % path)
        return await status(client) == 200


# ── the times that the page sets ──────────────────────────────────────────────────────────────


async def set_times(coordinator: Running, **seconds: float) -> None:
    """Change settings as the page does."""
    url = f"{coordinator.url}/api/settings"
    async with coordinator.session.patch(url, json=seconds) as response:
        assert response.status == 200


async def both_count(coordinator: Running) -> None:
    """Whether 0.4 s count for a body and 0.5 s for an answer."""
    async with connection(coordinator.url) as client:
        client.send(deaf.post("/api/generate", BODY[:10], length=1000))
        answer = await client.answer()
        assert (answer.status, "for 0.4 s" in str(answer.json)) == (408, True)
    async with deaf.flooding() as ollama:
        await coordinator.register(ollama)
        async with deaf.connected(coordinator.url, deaf.chat()) as sock:
            await deaf.begins(sock)
            await ollama.seen.wait_for(lambda seen: seen.cancelled == 1 and seen.active == 0)
            told = await last(coordinator)
            assert "took nothing of its answer for 0.5 s" in told["error"]


@BOTH
@pytest.mark.spec("DASH-17")
async def test_changed_times_count_at_once_and_after_a_restart(http: str, tmp_path: Path) -> None:
    database_url = f"sqlite:///{tmp_path}/fleet.db"
    async with running(http=http, database_url=database_url) as coordinator:
        await set_times(coordinator, stall_timeout=0.5, body_timeout=0.4)
        await both_count(coordinator)
    async with running(http=http, database_url=database_url) as coordinator:
        await both_count(coordinator)


@pytest.mark.spec("DASH-17")
async def test_a_changed_time_counts_on_http_2_too() -> None:
    async with running(http="hypercorn") as coordinator, deaf.flooding(pieces=4) as ollama:
        await coordinator.register(ollama)
        await set_times(coordinator, stall_timeout=0.3)
        async with deaf.connected(coordinator.url, deaf.chat_on_http_2()):
            told = await last(coordinator)
            assert "took nothing of its answer for 0.3 s" in told["error"]


# ── too many ──────────────────────────────────────────────────────────────────────────────────


@BOTH
@pytest.mark.spec("OPERATION-23")
async def test_one_connection_too_many_is_answered_503(http: str) -> None:
    shows, limits = Shows(), ConnectionLimits(most=2)
    async with serving(shows, http, limits=limits) as url:
        async with connection(url) as one, connection(url) as other:
            for client in (one, other):
                client.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                assert (await client.answer()).status == 200
            async with connection(url) as refused:
                refused.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nabcde")
                answer = await refused.answer()
                assert answer.status == 503
                assert int(answer.headers["retry-after"]) > 0
                assert "try again" in answer.json["error"]
                assert await refused.ends() == b""
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not await is_served(url, b"echo"):
                await asyncio.sleep(0.01)


@pytest.mark.skipif(sys.platform == "win32", reason="sockets are not limited by number there")
@pytest.mark.spec("OPERATION-23")
@BOTH
async def test_more_clients_than_files_may_be_open_are_told(tmp_path: Path, http: str) -> None:
    limited = ("sh", "-c", 'ulimit -n 128; exec "$@"', "sh")
    settings = {
        "COORDINATOR_HTTP": http,
        "COORDINATOR_HOST": "127.0.0.1",
        "COORDINATOR_PORT": str(port := programs.free_port()),
        "DATABASE_URL": "sqlite://:memory:",
    }
    command = (*limited, programs.command("ollama-coordinator"))
    url = f"http://127.0.0.1:{port}"
    async with programs.program(tmp_path / "log", *command, **settings) as program:
        await programs.answers(f"{url}/healthz", program)
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(connection(url)) for _ in range(150)]
            for client in clients:
                client.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            told = await asyncio.gather(*map(status, clients))
            assert told.count(200) == capacity_of(128).connections
            assert told.count(503) >= 32
            # Who was let in first is still served, among them all.
            served = clients[told.index(200)]
            served.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await served.answer()).status == 200
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not await is_served(url, b"healthz"):
                await asyncio.sleep(0.05)
        assert "as many connections as there can be" in program.output
        assert "out of system resource" not in program.output
        assert "Traceback" not in program.output


async def status(client: Client) -> int | None:
    """What a connection is answered; `None` where it just ends."""
    try:
        return (await client.answer()).status
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


# ── a coordinator that did not run ────────────────────────────────────────────────────────────


@pytest.fixture
def short_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the loop is late by counts as a gap after half a second."""
    monkeypatch.setattr(clock, "GAP_SECONDS", 0.5)


def stop(seconds: float = 1.5) -> None:
    """Hold up the event loop, as a stopped process does."""
    time.sleep(seconds)


@BOTH
@pytest.mark.spec("OPERATION-35")
@pytest.mark.usefixtures("short_gaps")
async def test_a_body_that_came_while_the_coordinator_did_not_run_is_taken(
    coordinator: Running,
) -> None:
    request = deaf.post("/api/chat", BODY)
    begun, rest = request[: -len(BODY) // 2], request[-len(BODY) // 2 :]
    async with deaf.connected(coordinator.url, begun) as sock:
        await asyncio.sleep(0.2)  # the coordinator waits for the rest now
        stop()
        sock.send(rest)
        async with asyncio.timeout(DEADLINE_SECONDS):
            answer = await asyncio.get_running_loop().sock_recv(sock, 100)
        assert answer.startswith(b"HTTP/1.1 503")  # there is no agent


@BOTH
@pytest.mark.spec("OPERATION-35")
@pytest.mark.usefixtures("short_gaps")
async def test_a_client_is_not_stalled_by_the_coordinators_own_gap(http: str) -> None:
    async with (
        running(http=http, stall_timeout=3) as coordinator,
        deaf.flooding() as ollama,
    ):
        await coordinator.register(ollama)
        async with deaf.connected(coordinator.url, deaf.chat()) as sock:
            await deaf.begins(sock)
            await asyncio.sleep(1.0)  # the buffers are full, and a check has seen it
            stop(3.0)
            await asyncio.sleep(0.2)  # and one after it
            for _ in range(20):
                await deaf.reads(sock, 1024 * 1024)


@pytest.mark.loops
@pytest.mark.spec("OPERATION-13")
async def test_a_deadline_that_is_at_once_is_met() -> None:
    fired = asyncio.Event()
    timer = MovingTimer(fired.set)
    timer.set(0.0)
    timer.set(0.0001)
    async with asyncio.timeout(DEADLINE_SECONDS):
        await fired.wait()


@pytest.mark.spec("OPERATION-35")
async def test_an_idle_connection_outlasts_a_gap() -> None:
    fired = asyncio.Event()
    timer = MovingTimer(fired.set)
    timer.set(0.2)
    stop(1.0)
    await asyncio.sleep(0.1)
    assert not fired.is_set()
    await fired.wait()
