"""The relay between the coordinator and an Ollama on loopback."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ollama_coordinator_agent import reach
from ollama_coordinator_agent.relay import TcpRelay
from ollama_coordinator_common.network import keep_alive
from ollama_coordinator_common.pump import Framing, Pipe, carry
from ollama_coordinator_common.settings import AgentConfig
from support.agent_world import Coordinator, eventually, free_port, running
from support.deadline import DEADLINE_SECONDS
from support.ollama import StandIn
from support.sockets import asked_every_15_seconds, reset

pytestmark = pytest.mark.loops

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def relayed(serve: Serve) -> AsyncIterator[tuple[TcpRelay, int]]:
    """A server behind a relay; yields the relay and its port."""
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    relay = TcpRelay("127.0.0.1", server.sockets[0].getsockname()[1])
    port = relay.listen(0)
    async with server, asyncio.timeout(DEADLINE_SECONDS), asyncio.TaskGroup() as tasks:
        task = tasks.create_task(relay.run())
        yield relay, port
        task.cancel()


@contextlib.asynccontextmanager
async def connected(port: int) -> AsyncIterator[Streams]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(65536):
        writer.write(chunk)
        await writer.drain()
    writer.close()


@pytest.mark.spec("AGENT-38")
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(pieces=st.lists(st.binary(min_size=1, max_size=300_000), max_size=5))
def test_bytes_pass_unchanged_both_ways(pieces: list[bytes]) -> None:
    async def scenario() -> None:
        async with relayed(echo) as (_, port), connected(port) as (reader, writer):
            async with asyncio.TaskGroup() as tasks:
                answer = tasks.create_task(reader.read())
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                writer.write_eof()
            assert answer.result() == b"".join(pieces)

    asyncio.run(scenario())


@pytest.mark.spec("AGENT-38")
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_request_that_comes_before_ollama_is_connected_is_not_lost(loop: str) -> None:
    module = asyncio if loop == "asyncio" else pytest.importorskip("uvloop")

    async def run() -> bytes:
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        client, accepted = socket.socketpair()
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        async with server, asyncio.timeout(DEADLINE_SECONDS):
            transport, near = await asyncio.get_running_loop().connect_accepted_socket(
                Pipe, accepted
            )
            transport.resume_reading()  # as uvloop does, whatever `connection_made` wants
            for _ in range(10):  # the loop has read what there is
                await asyncio.sleep(0)
            target = server.sockets[0].getsockname()
            carried = asyncio.create_task(carry(near, target, Framing()))
            reader, writer = await asyncio.open_connection(sock=client)
            writer.write_eof()
            echoed = await reader.read()
            writer.close()
            await carried
            return echoed

    with asyncio.Runner(loop_factory=module.new_event_loop) as runner:
        assert runner.run(run()) == b"GET / HTTP/1.1\r\n\r\n"


@pytest.mark.spec("AGENT-38")
async def test_a_side_that_does_not_read_holds_the_other_back() -> None:
    sent = 0
    is_stuck = asyncio.Event()

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        try:
            while sent < 1 << 30:
                writer.write(bytes(1 << 20))
                sent += 1 << 20
                async with asyncio.timeout(0.5):
                    await writer.drain()
        except TimeoutError:
            is_stuck.set()
        finally:
            writer.transport.abort()

    async with relayed(flood) as (_, port), connected(port):
        await is_stuck.wait()
    assert sent < 1 << 28


@pytest.mark.spec("AGENT-39")
async def test_the_end_of_one_direction_leaves_the_other_open() -> None:
    async def answer_after_the_end(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        question = await reader.read()
        writer.write(b"heard " + question)
        writer.close()

    async with relayed(answer_after_the_end) as (relay, port):
        async with connected(port) as (reader, writer):
            writer.write(b"all of it")
            writer.write_eof()
            assert await reader.read() == b"heard all of it"
        await eventually(lambda: not relay._connections)


ASK = b"POST /api/chat HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}"
OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.spec("AGENT-36")
@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (ASK, [OK + b"Content-Length: 4\r\n\r\n", b"{}", b"{}"]),
        (ASK, [OK + b"Content-", b"Length: 4\r\n\r\n{}", b"\r\n"]),
        (ASK, [OK + b"Transfer-Encoding: chunked\r\n\r\n", b"2\r\n{}\r\n", b"0\r\n", b"\r\n"]),
        (ASK, [OK + b"transfer-encoding: Chunked\r\n\r\n2\r\n0\n", b"\r\n", b"0\r\n\r\n"]),
        (ASK, [b"HTTP/1.1 100 Continue\r\n\r\n", OK + b"Content-Length: 1\r\n\r\n", b"x"]),
        (b"HEAD / HTTP/1.1\r\n\r\n", [OK, b"Content-Length: 17\r\n\r\n"]),
        (b"GET / HTTP/1.1\r\n\r\n", [b"HTTP/1.1 304 Not Modified\r\n", b"\r\n"]),
    ],
    ids=["length", "head in two", "chunks", "a chunk like the last", "interim", "HEAD", "no body"],
)
async def test_requests_count_and_kept_connections_do_not(
    question: bytes, answer: list[bytes]
) -> None:
    """After each part of an answer the request is in progress; after the last one it is not."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            for part in answer:
                writer.write(part)
                await said.wait()
                said.clear()
        writer.close()

    said = asyncio.Event()
    async with relayed(serve) as (relay, port), connected(port) as (reader, writer):
        assert relay.active_requests == 0
        for _ in range(2):  # the second one on the kept connection
            writer.write(question)
            for index, part in enumerate(answer, 1):
                assert await reader.readexactly(len(part)) == part
                assert relay.active_requests == (index < len(answer)), index
                said.set()
        writer.close()
        assert await reader.read() == b""


@pytest.mark.spec("AGENT-36")
async def test_an_answer_that_is_not_understood_lasts_as_long_as_its_connection() -> None:
    async with relayed(echo) as (relay, port), connected(port) as (reader, writer):
        writer.write(b"?" * 100_000)
        await reader.readexactly(100_000)
        assert relay.active_requests == 1
        writer.close()
        await eventually(lambda: not relay.active_requests)


@pytest.mark.spec("OPERATION-26")
async def test_a_silent_connection_is_kept_open_on_both_sides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    probed: list[bool] = []

    def noted(sock: socket.socket) -> None:
        keep_alive(sock)
        probed.append(asked_every_15_seconds(sock))

    monkeypatch.setattr("ollama_coordinator_common.pump.keep_alive", noted)
    async with relayed(echo) as (_, port), connected(port) as (reader, writer):
        writer.write(b"hello")
        assert await reader.read(5) == b"hello"
    assert probed == [True, True]


@pytest.mark.spec("AGENT-40")
async def test_a_client_that_leaves_is_noticed_by_ollama() -> None:
    asked, noticed = asyncio.Event(), asyncio.Event()

    async def generate(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readexactly(1)
            asked.set()
            await reader.readexactly(1)
        except (asyncio.IncompleteReadError, ConnectionError):
            noticed.set()
        finally:
            writer.close()

    async with relayed(generate) as (_, port):
        for leave in (reset, asyncio.StreamWriter.close):
            asked.clear()
            noticed.clear()
            async with connected(port) as (_, writer):
                writer.write(b"?")
                await asked.wait()
                leave(writer)
                await noticed.wait()


@pytest.mark.spec("AGENT-40")
async def test_a_reset_by_ollama_is_a_reset_for_the_client() -> None:
    async def crash(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        writer.write(b"to")
        await writer.drain()
        await reader.readexactly(1)
        reset(writer)

    async with relayed(crash) as (_, port), connected(port) as (reader, writer):
        writer.write(b"?")
        assert await reader.readexactly(2) == b"to"
        writer.write(b"!")
        with pytest.raises(ConnectionResetError):
            await reader.read()


@pytest.mark.spec("AGENT-40")
async def test_an_ollama_that_refuses_shows_as_a_reset() -> None:
    relay = TcpRelay("127.0.0.1", free_port())
    port = relay.listen(0)
    async with asyncio.timeout(DEADLINE_SECONDS), asyncio.TaskGroup() as tasks:
        task = tasks.create_task(relay.run())
        async with connected(port) as (reader, _):
            with pytest.raises(ConnectionResetError):
                await reader.read()
        task.cancel()


@pytest.mark.spec("AGENT-41")
async def test_a_stranger_is_refused_and_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every peer of this test is this machine, so the rule itself is replaced."""
    async with relayed(echo) as (relay, port):
        monkeypatch.setattr(relay, "is_allowed", lambda peer, local: False)
        for _ in range(3):
            async with connected(port) as (reader, _):
                assert await reader.read() == b""
    assert caplog.text.count("AGENT_RELAY_ALLOW") == 1


@pytest.mark.spec("AGENT-42")
async def test_the_last_port_is_taken_again_if_it_is_free(tmp_path: Path) -> None:
    last = free_port()
    first, second = TcpRelay("127.0.0.1", 1), TcpRelay("127.0.0.1", 1)
    assert first.listen(0, fallback=last) == last
    assert second.listen(0, fallback=last) != last
    with pytest.raises(OSError, match=r"in use|permitted"):
        TcpRelay("127.0.0.1", 1).listen(last)
    for relay in (first, second):
        assert relay._listener is not None
        relay._listener.close()


@pytest.mark.spec("AGENT-43")
async def test_the_end_of_the_agent_ends_what_is_relayed() -> None:
    is_served = asyncio.Event()

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        is_served.set()
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()

    async with contextlib.AsyncExitStack() as stack:
        async with relayed(wait) as (_, port):
            reader, _ = await stack.enter_async_context(connected(port))
            await is_served.wait()
        with pytest.raises(ConnectionResetError):
            await reader.read()


@pytest.fixture
def lan(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Which hosts take connections to Ollama's port, as the agent finds it."""
    hosts = {"127.0.0.1": True, "192.0.2.50": False}

    async def accepts(host: str, port: int) -> bool:
        return hosts[host]

    monkeypatch.setattr(reach, "accepts", accepts)
    return hosts


def behind(
    coordinator: Coordinator, ollama: StandIn, folder: Path, relay: str = "auto"
) -> AgentConfig:
    return AgentConfig(
        coordinator_url=coordinator.url,
        ollama_port=ollama.port,
        ip_address="192.0.2.50",
        state_dir=folder,
        manage_ollama=False,
        relay=relay,
    )


@pytest.mark.spec("AGENT-37")
async def test_an_ollama_on_loopback_is_relayed_and_works(
    tmp_path: Path, lan: dict[str, bool]
) -> None:
    async with Coordinator() as coordinator, StandIn() as ollama:
        async with (
            running(behind(coordinator, ollama, tmp_path)),
            aiohttp.ClientSession() as session,
        ):
            await coordinator.until(lambda seen: bool(seen.registrations))
            port = coordinator.registrations[-1].relay_port
            assert coordinator.registrations[-1].ip_address == "192.0.2.50"
            url = f"http://127.0.0.1:{port}/api/generate"
            async with session.post(url, json={"model": "llama3.2", "prompt": "hi"}) as response:
                assert response.status == 200
                assert b'"done":true' in await response.read()
        async with running(behind(coordinator, ollama, tmp_path)):
            before = len(coordinator.registrations)
            await coordinator.until(lambda seen: len(seen.registrations) > before)
    assert coordinator.registrations[-1].relay_port == port


@pytest.mark.spec("AGENT-37")
@pytest.mark.parametrize(
    ("setting", "open_hosts", "relays"),
    [
        ("auto", {"127.0.0.1", "192.0.2.50"}, False),
        ("auto", set(), False),
        ("always", {"127.0.0.1", "192.0.2.50"}, True),
        ("never", {"127.0.0.1"}, False),
    ],
)
async def test_when_it_relays(
    tmp_path: Path, lan: dict[str, bool], setting: str, open_hosts: set[str], relays: bool
) -> None:
    lan.update({host: host in open_hosts for host in lan})
    async with (
        Coordinator() as coordinator,
        StandIn() as ollama,
        running(behind(coordinator, ollama, tmp_path, setting)),
    ):
        await coordinator.until(lambda seen: bool(seen.registrations))
    assert (coordinator.registrations[-1].relay_port is not None) is relays


@pytest.mark.spec("AGENT-37")
async def test_a_relay_port_that_is_taken_is_told(
    tmp_path: Path, lan: dict[str, bool], caplog: pytest.LogCaptureFixture
) -> None:
    async with Coordinator() as coordinator, StandIn() as ollama:
        config = AgentConfig(
            coordinator_url=coordinator.url,
            ollama_port=ollama.port,
            ip_address="192.0.2.50",
            state_dir=tmp_path,
            relay_port=ollama.port,
            manage_ollama=False,
        )
        async with running(config):
            await coordinator.until(lambda seen: bool(seen.registrations))
    assert coordinator.registrations[-1].relay_port is None
    assert "AGENT_RELAY_PORT" in caplog.text


def test_no_token_waits_for_more() -> None:
    relay = TcpRelay("127.0.0.1", free_port())
    port = relay.listen(0)
    listener = relay._listener
    assert listener is not None
    with listener, socket.create_connection(("127.0.0.1", port)):
        listener.setblocking(True)
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
