"""The relay and the coordinator prove to each other who they are, on real sockets.

Every peer of these tests is this machine, which the relay always lets in; so the rule about
addresses is replaced: all peers are at the coordinator's.
"""

import asyncio
import contextlib
import json
import logging
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from ollama_coordinator.carry.messages import AnswerStart, Order, Told, messages
from ollama_coordinator.upstream import NotConnected, Unreachable, Upstreams
from ollama_coordinator_agent import relay as relays
from ollama_coordinator_agent.daemon import Daemon
from ollama_coordinator_agent.relay import TcpRelay, parse_networks
from ollama_coordinator_common import handshake
from ollama_coordinator_common.handshake import ANSWER_BYTES, CoordinatorSide, relay_key
from ollama_coordinator_common.settings import AgentConfig
from ollama_coordinator_common.tickets import key_of
from support import agent_world, cluster
from support.agent_world import eventually
from support.coordinator import Running, running
from support.databases import PostgresSchema
from support.deadline import DEADLINE_SECONDS
from support.ollama import StandIn

SECRET = "s" * 43
KEY = relay_key(key_of(SECRET))
OTHER_KEY = relay_key(key_of("t" * 43))
REQUEST = b"GET /api/version HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"

pytestmark = pytest.mark.usefixtures("at_the_coordinators_address")


@pytest.fixture
def at_the_coordinators_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TcpRelay, "is_allowed", lambda self, peer, local: not self.asks_handshake)


@contextlib.asynccontextmanager
async def relayed(ollama: StandIn, key: str = KEY) -> AsyncIterator[tuple[TcpRelay, int]]:
    """A relay that asks for a handshake, and its port."""
    relay = TcpRelay("127.0.0.1", ollama.port, key=key)
    relay.asks_handshake = True
    port = relay.listen(0)
    async with asyncio.timeout(DEADLINE_SECONDS), asyncio.TaskGroup() as tasks:
        task = tasks.create_task(relay.run())
        yield relay, port
        task.cancel()


@contextlib.asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def rest(reader: asyncio.StreamReader) -> bytes:
    """What comes until the connection ends; a reset is an end."""
    came = b""
    with contextlib.suppress(ConnectionError):
        while chunk := await reader.read(4096):
            came += chunk
    return came


def proving(key: str = KEY) -> Upstreams:
    """Connections that begin with this key, wherever they lead."""
    return Upstreams(relay_key_at=lambda url: key)


@contextlib.asynccontextmanager
async def listening(answer: bytes | None) -> AsyncIterator[tuple[int, bytearray]]:
    """Something else at a relay's port, which answers so (`None`: nothing); and what it got."""
    got = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(4096):
            got.extend(chunk)
            if answer is not None:
                writer.write(answer)
            if answer == b"":
                break
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], got


# ── who gets in ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.spec("AGENT-84")
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_whoever_knows_the_secret_gets_in_once_a_connection(
    loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = asyncio if loop == "asyncio" else pytest.importorskip("uvloop")
    sides = []
    made = handshake.RelaySide

    def counted(*given: Any) -> Any:
        sides.append(made(*given))
        return sides[-1]

    monkeypatch.setattr(relays, "RelaySide", counted)

    async def ask() -> None:
        async with StandIn() as ollama, relayed(ollama) as (_, port), proving() as upstreams:
            url = f"http://127.0.0.1:{port}"
            for _ in range(3):
                status, body = await upstreams.fetch("GET", f"{url}/api/version", seconds=5.0)
                assert (status, b"version" in body) == (200, True)

    with asyncio.Runner(loop_factory=module.new_event_loop) as runner:
        runner.run(ask())
    assert len(sides) == 1


@pytest.mark.spec("AGENT-84")
async def test_a_request_right_behind_the_proof_arrives_however_it_is_cut() -> None:
    async with StandIn() as ollama, relayed(ollama) as (_, port), connected(port) as (near, out):
        side = CoordinatorSide(KEY)
        for byte in side.line:
            out.write(bytes([byte]))
            await out.drain()
            await asyncio.sleep(0)
        proof = side.proof(await near.readexactly(ANSWER_BYTES))
        out.write(proof[:10])
        await out.drain()
        out.write(proof[10:] + REQUEST)
        assert (await near.readline()).startswith(b"HTTP/1.1 200")


async def no_handshake(port: int) -> bytes:
    async with connected(port) as (reader, writer):
        writer.write(REQUEST)
        return await rest(reader)


async def a_wrong_proof(port: int) -> bytes:
    async with connected(port) as (reader, writer):
        writer.write(CoordinatorSide(KEY).line)
        await reader.readexactly(ANSWER_BYTES)
        writer.write(b"0" * 64 + b"\n" + REQUEST)
        return await rest(reader)


async def the_relays_own_proof(port: int) -> bytes:
    async with connected(port) as (reader, writer):
        writer.write(CoordinatorSide(KEY).line)
        answer = await reader.readexactly(ANSWER_BYTES)
        writer.write(answer.partition(b" ")[2] + REQUEST)
        return await rest(reader)


async def a_replay(port: int) -> bytes:
    async with connected(port) as (reader, writer):
        side = CoordinatorSide(KEY)
        writer.write(side.line)
        proof = side.proof(await reader.readexactly(ANSWER_BYTES))
        writer.write(proof + REQUEST)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    async with connected(port) as (reader, writer):
        writer.write(side.line)
        await reader.readexactly(ANSWER_BYTES)
        writer.write(proof + REQUEST)
        return await rest(reader)


async def half_a_hello(port: int) -> bytes:
    async with connected(port) as (reader, writer):
        writer.write(CoordinatorSide(KEY).line[:20])
        writer.write_eof()
        return await rest(reader)


async def no_nonce(port: int) -> bytes:
    async with connected(port) as (reader, writer):
        writer.write(CoordinatorSide(KEY).line[:-2] + b"g\n" + REQUEST)
        return await rest(reader)


Peer = Callable[[int], Any]


@pytest.mark.spec("AGENT-84")
@pytest.mark.parametrize(
    "peer",
    [no_handshake, a_wrong_proof, the_relays_own_proof, a_replay, half_a_hello, no_nonce],
    ids=lambda peer: peer.__name__,
)
async def test_the_coordinators_address_alone_lets_nobody_in(
    peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    async with StandIn() as ollama, relayed(ollama) as (relay, port):
        before = 1 if peer is a_replay else 0
        assert await peer(port) == b""
        assert ollama.seen.count("/api/version") == before
        await eventually(lambda: not relay._strangers)
        if peer is not a_wrong_proof:
            assert await peer(port) == b""
    assert caplog.text.count("AGENT_RELAY_ALLOW") == 1


@pytest.mark.spec("AGENT-84")
@pytest.mark.parametrize("said", [b"", b"o", CoordinatorSide(KEY).line], ids=["", "o", "hello"])
async def test_a_silent_peer_has_a_deadline(said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relays, "HANDSHAKE_SECONDS", 0.1)
    async with StandIn() as ollama, relayed(ollama) as (relay, port):
        async with connected(port) as (reader, writer):
            writer.write(said)
            await rest(reader)
        await eventually(lambda: not relay._strangers)


@pytest.mark.spec("AGENT-84")
async def test_who_only_looks_whether_somebody_listens_is_not_told_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As the monitor does with a machine that fell silent."""
    async with StandIn() as ollama, relayed(ollama) as (relay, port):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()
        assert await no_handshake(port) == b""  # it was accepted after the other one
        await eventually(lambda: not relay._strangers)
    assert [one.levelno for one in caplog.records if "relay" in one.message] == [logging.WARNING]


@pytest.mark.spec("AGENT-84")
async def test_many_silent_peers_keep_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relays, "MOST_STRANGERS", 8)
    async with (
        StandIn() as ollama,
        relayed(ollama) as (relay, port),
        contextlib.AsyncExitStack() as s,
    ):
        silent = [await s.enter_async_context(connected(port)) for _ in range(40)]
        for reader, _ in silent[:32]:
            assert await rest(reader) == b""
        async with proving() as upstreams:
            url = f"http://127.0.0.1:{port}/api/version"
            assert (await upstreams.fetch("GET", url, seconds=5.0))[0] == 200
        assert len(relay._strangers) <= 8


@pytest.mark.spec("AGENT-41")
@pytest.mark.usefixtures("monkeypatch")
def test_whose_address_lets_it_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    relay = TcpRelay("127.0.0.1", 1, parse_networks(["192.0.2.128/25"]), KEY)
    relay.admit_coordinator(["192.0.2.9"])
    own = "192.0.2.50"
    for asks in (False, True):
        relay.asks_handshake = asks
        assert relay.is_allowed("192.0.2.9", own) is not asks
        assert relay.is_allowed("::ffff:192.0.2.9", own) is not asks
        assert all(relay.is_allowed(peer, own) for peer in ("192.0.2.200", own, "127.0.0.1"))
        assert not relay.is_allowed("192.0.2.10", own)


# ── what the coordinator connects to ──────────────────────────────────────────────────────────


@pytest.mark.spec("AGENT-84")
@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n400 Bad Request",
        b"0" * 32 + b" " + b"0" * 64 + b"\n",
        b"x" * 100,
        b"",
    ],
    ids=["HTTP", "wrong", "noise", "closed"],
)
async def test_nothing_is_sent_to_what_is_not_the_agents_relay(answer: bytes) -> None:
    async with listening(answer) as (port, got), proving() as upstreams:
        with pytest.raises(NotConnected, match=r"not this agent's relay|closed|reset"):
            await upstreams.fetch("POST", f"http://127.0.0.1:{port}/a", seconds=5.0, body=b"secret")
        assert b"POST" not in got
        assert b"secret" not in got


@pytest.mark.spec("AGENT-84")
async def test_a_relay_that_does_not_answer_a_hello_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ollama_coordinator.upstream.CONNECT_SECONDS", 0.2)
    async with listening(None) as (port, got), proving() as upstreams:
        with pytest.raises(NotConnected):
            await upstreams.fetch("GET", f"http://127.0.0.1:{port}/a", seconds=5.0)
        assert b"GET" not in got


@pytest.mark.spec("AGENT-84")
async def test_a_coordinator_with_another_key_is_told_so_and_sends_nothing() -> None:
    async with StandIn() as ollama, relayed(ollama) as (_, port), proving(OTHER_KEY) as upstreams:
        with pytest.raises(Unreachable, match="not this agent's relay"):
            await upstreams.fetch("GET", f"http://127.0.0.1:{port}/api/version", seconds=5.0)
        assert ollama.seen.count("/api/version") == 0


# ── of whom it is asked ───────────────────────────────────────────────────────────────────────


async def register(
    coordinator: Running | cluster.Coordinator, ollama: StandIn, port: int, **more: Any
) -> dict[str, Any]:
    facts = {
        "machine_name": "relayed",
        "ip_address": "127.0.0.1",
        "ollama_version": "0.33.0",
        "ollama_port": ollama.port,
        "relay_port": port,
        **more,
    }
    sent = {"X-Agent-Secret": SECRET}
    async with coordinator.session.post(
        f"{coordinator.url}/api/agents", json=facts, headers=sent
    ) as response:
        assert response.status in (200, 201), await response.text()
        return dict(await response.json())


async def heartbeat(coordinator: Running, agent_id: str) -> dict[str, Any]:
    facts = {"agent_id": agent_id, "cpu_usage": 1, "memory_usage": 1, "active_requests": 0}
    sent = {"X-Agent-Secret": SECRET}
    async with coordinator.session.post(
        f"{coordinator.url}/api/health", json=facts, headers=sent
    ) as response:
        assert response.status == 200
        return dict(await response.json())


@pytest.mark.spec("AGENT-84")
async def test_a_coordinator_proves_itself_from_the_first_probe_on_and_after_a_restart(
    tmp_path: Path,
) -> None:
    where = f"sqlite:///{tmp_path / 'c.db'}"
    async with StandIn() as ollama, relayed(ollama) as (_, port):
        async with running(database_url=where) as coordinator:
            reply = await register(coordinator, ollama, port, handshake=True)
            assert reply["handshake"] is True
            assert "reached" not in reply
            assert (await heartbeat(coordinator, reply["agent_id"]))["handshake"] is True
            assert (await coordinator.chat())[0] == 200
        async with running(database_url=where) as coordinator:
            assert (await coordinator.chat())[0] == 200
            assert (await heartbeat(coordinator, reply["agent_id"]))["handshake"] is True


@pytest.mark.spec("AGENT-84")
async def test_an_older_agent_and_a_bare_machine_see_no_handshake() -> None:
    async with running() as coordinator, StandIn() as ollama:
        reply = await register(coordinator, ollama, ollama.port)
        assert "handshake" not in reply
        assert "handshake" not in await heartbeat(coordinator, reply["agent_id"])
        assert (await coordinator.chat())[0] == 200
        async with coordinator.session.delete(
            f"{coordinator.url}/api/agents/{reply['agent_id']}"
        ) as response:
            assert response.status == 204
        # It says that it could, and has no secret to prove anything with.
        await coordinator.register(ollama, "bare", relay_port=ollama.port, handshake=True)
        assert (await coordinator.chat())[0] == 200


@pytest.mark.spec("AGENT-84")
async def test_an_agent_that_becomes_an_older_one_is_served_as_before() -> None:
    async with running() as coordinator, StandIn() as ollama:
        async with relayed(ollama) as (_, port):
            await register(coordinator, ollama, port, handshake=True)
            assert (await coordinator.chat())[0] == 200
        await register(coordinator, ollama, ollama.port)
        assert (await coordinator.chat())[0] == 200


def relay_port(daemon: Daemon) -> int:
    offer = daemon.parts.reach.offer
    assert offer is not None
    assert offer.relay_port is not None
    return offer.relay_port


def behind(url: str, ollama: StandIn, folder: Path) -> AgentConfig:
    return AgentConfig(
        coordinator_url=url,
        ollama_port=ollama.port,
        ip_address="127.0.0.1",
        state_dir=folder,
        manage_ollama=False,
        relay="always",
    )


@pytest.mark.spec("AGENT-84")
async def test_agent_and_coordinator_agree_on_it(tmp_path: Path) -> None:
    async with running() as coordinator, StandIn() as ollama:
        async with agent_world.running(behind(coordinator.url, ollama, tmp_path)) as daemon:
            await coordinator.until(
                lambda: any(a.brings_inventory for a in coordinator.parts.registry)
            )
            port = relay_port(daemon)
            assert (await coordinator.chat())[0] == 200
            assert await no_handshake(port) == b""


@pytest.mark.spec("AGENT-84")
async def test_an_agent_asks_an_older_coordinator_for_nothing_and_the_same_one_after_a_restart(
    tmp_path: Path,
) -> None:
    async with agent_world.Coordinator() as coordinator, StandIn() as ollama:
        config = behind(coordinator.url, ollama, tmp_path)
        async with agent_world.running(config) as daemon:
            await coordinator.until(lambda seen: bool(seen.reports))
            assert coordinator.registrations[-1].handshake
            port = relay_port(daemon)
            assert (await no_handshake(port)).startswith(b"HTTP/1.1 200")
            coordinator.handshake = True
            await coordinator.next_report(lambda report: True)
            await eventually(lambda: daemon.parts.reach._relay.asks_handshake)
            assert await no_handshake(port) == b""
            coordinator.handshake = False  # it became an older one
            await eventually(lambda: not daemon.parts.reach._relay.asks_handshake)
            assert (await no_handshake(port)).startswith(b"HTTP/1.1 200")
            coordinator.handshake = True
            await eventually(lambda: daemon.parts.reach._relay.asks_handshake)
        await coordinator.stop()
        async with agent_world.running(config) as daemon:
            await eventually(lambda: daemon.parts.reach.offer is not None)
            assert await no_handshake(relay_port(daemon)) == b""
        config = behind("http://127.0.0.1:9", ollama, tmp_path)
        async with agent_world.running(config) as daemon:
            await eventually(lambda: daemon.parts.reach.offer is not None)
            await eventually(lambda: not daemon.parts.reach._relay.asks_handshake)
            port = relay_port(daemon)
            assert (await no_handshake(port)).startswith(b"HTTP/1.1 200")


# ── several coordinators ──────────────────────────────────────────────────────────────────────


async def until_served(coordinator: cluster.Coordinator) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while (await coordinator.chat())[0] != 200:
            await asyncio.sleep(0.02)


@pytest.mark.spec("CLUSTER-16")
async def test_a_front_proves_itself_with_what_the_leader_gives_it(
    tmp_path: Path, postgres: PostgresSchema
) -> None:
    async with (
        StandIn() as ollama,
        relayed(ollama) as (relay, port),
        cluster.cluster(tmp_path, postgres.url) as [first, second],
    ):
        await register(second, ollama, port, handshake=True)
        await until_served(first)
        by_the_leader = len(relay._connections)
        assert (await second.chat())[0] == 200
        assert len(relay._connections) == by_the_leader + 1
        first.program.send(signal.SIGKILL)
        await second.leads(epoch=2)
        await until_served(second)


@pytest.mark.spec("CLUSTER-16")
@pytest.mark.parametrize(("wire", "kind"), [(2, AnswerStart), (3, Order)])
async def test_for_a_front_that_cannot_the_leader_carries_out_the_attempt(
    tmp_path: Path, postgres: PostgresSchema, wire: int, kind: type[Told]
) -> None:
    async with (
        StandIn() as ollama,
        relayed(ollama) as (_, port),
        cluster.cluster(tmp_path, postgres.url) as [first, _],
    ):
        await register(first, ollama, port, handshake=True)
        await until_served(first)
        [[body]] = postgres.ask("SELECT body FROM documents WHERE name = 'cluster'")
        front = {
            "X-Ollama-Coordinator-Front": f"{json.loads(body)['secret']} 127.0.0.1 5000",
            "X-Ollama-Coordinator-Carries": f"{wire} 0",
        }
        url = f"{first.url}/api/chat"
        async with first.session.post(url, json=cluster.CHAT, headers=front) as response:
            told = await anext(messages(response.content.iter_any()))
            assert isinstance(told, kind)
            if isinstance(told, Order):
                assert told.sent.relay_key == KEY
