"""Which machines come into the fleet, and who speaks for them, on real sockets."""

import asyncio
import re
import stat
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ollama_coordinator.access import NewKey
from ollama_coordinator.main import app
from ollama_coordinator_agent.daemon import Daemon
from ollama_coordinator_common.join_token import JoinToken
from ollama_coordinator_common.network import public_address
from ollama_coordinator_common.settings import AgentConfig
from support import agent_world
from support.coordinator import Running, running
from support.databases import Space
from support.ollama import StandIn

PRIVATE, OTHER = "192.168.1.7", "192.168.1.8"
PROXIED: dict[str, Any] = {"trusted_proxies": ("127.0.0.1",)}
"""The tests' own address is a trusted proxy: it says for whom it asks."""
OWN, ANOTHER = "s" * 43, "t" * 43


async def run(url: str, *arguments: str) -> str:
    """What a command prints to its standard output."""
    runner = CliRunner(env={"COORDINATOR_URL": url, "COLUMNS": "120"})
    done = await asyncio.to_thread(runner.invoke, app, list(arguments))
    assert done.exit_code == 0, done.output
    return str(done.stdout)


async def sent(
    coordinator: Running, path: str, body: Any, *, of: str = "", **headers: str
) -> tuple[int, Any]:
    """Status and body of a POST of a machine at the address `of`."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    if of:
        given["X-Forwarded-For"] = of
    async with coordinator.session.post(coordinator.url + path, json=body, headers=given) as answer:
        return answer.status, await answer.json(content_type=None)


def registration(ollama: StandIn, name: str = "m", **more: Any) -> dict[str, Any]:
    facts = {"machine_name": name, "ip_address": "127.0.0.1", "ollama_version": "0.33.0"}
    return {**facts, "ollama_port": ollama.port, **more}


async def joined(coordinator: Running, ollama: StandIn, token: str, **more: Any) -> int:
    """The status of a registration with the token of a text, as an agent sends it."""
    key = JoinToken.parse(token).secret
    body = registration(ollama, **more)
    return (await sent(coordinator, "/api/agents", body, of=body["ip_address"], X_Api_Key=key))[0]


@pytest.mark.spec("ACCESS-21")
async def test_a_token_lets_machines_in_until_it_ends() -> None:
    async with running(access="keys", **PROXIED) as coordinator, StandIn() as one, StandIn() as two:
        coordinator.parts.access.mode = "open"  # for the operator of this test
        lasting = (await run(coordinator.url, "join-token", "create", "rack")).strip()
        single = (await run(coordinator.url, "join-token", "create", "--once")).strip()
        soon = (datetime.now(UTC) + timedelta(seconds=60)).isoformat()
        short = await run(coordinator.url, "join-token", "create", "s", "--expires", soon)
        listed = await run(coordinator.url, "join-token", "list")
        assert re.search(r"rack .*any number .*in force", listed)
        assert re.search(r"join-\w{4} .*one machine", listed)
        assert "until" in listed
        assert JoinToken.parse(short).secret not in listed
        coordinator.parts.access.mode = "keys"
        assert await joined(coordinator, one, "oc1.-.oc_" + "x" * 43, ip_address=PRIVATE) == 401
        assert await joined(coordinator, one, single, ip_address=PRIVATE) == 201
        assert await joined(coordinator, two, single, name="n", ip_address=OTHER) == 401
        assert await joined(coordinator, two, lasting, name="n", ip_address=OTHER) == 201
        coordinator.parts.access.mode = "open"
        assert "revoked" in await run(coordinator.url, "join-token", "revoke", "rack")
        coordinator.parts.access.mode = "keys"
        async with StandIn() as three:
            assert await joined(coordinator, three, lasting, name="o", ip_address="10.0.0.9") == 401


@pytest.mark.spec("JOIN-4")
async def test_a_token_comes_with_the_line_that_joins() -> None:
    async with running() as coordinator:
        runner = CliRunner(env={"COORDINATOR_URL": coordinator.url})
        done = await asyncio.to_thread(runner.invoke, app, ["join-token", "create", "rack"])
        # The tests' loopback address would lead another machine to itself.
        host, port = public_address("") or "127.0.0.1", coordinator.url.rpartition(":")[2]
        url, token = f"http://{host}:{port}", done.stdout.strip()
        assert f"curl -fsSL {url}/join | AGENT_JOIN_TOKEN={token} sh\n" in done.stderr
        assert f"$env:AGENT_JOIN_TOKEN='{token}'; irm {url}/join | iex\n" in done.stderr
        session = await coordinator.get("/api/session")
        assert not session["join_token_needed"]
        coordinator.parts.access.keys.create(NewKey(name="anna", rights=("operate",)))
        session = await coordinator.get("/api/session")
        assert session["join_token_needed"]


@pytest.mark.spec("ACCESS-21")
async def test_a_token_is_no_reason_to_ask_people_for_a_key() -> None:
    async with running(**PROXIED) as coordinator:
        await run(coordinator.url, "join-token", "create", "rack")
        headers = {"X-Forwarded-For": PRIVATE}
        async with coordinator.session.get(f"{coordinator.url}/api/tags", headers=headers) as one:
            assert one.status == 200


@pytest.mark.spec("ACCESS-21")
async def test_a_token_is_in_force_from_the_start(tmp_path: Path) -> None:
    token = JoinToken("oc_" + "t" * 43).text
    settings = {"database_url": f"sqlite://{tmp_path}/a.db", "access": "keys", **PROXIED}
    for _ in range(2):
        async with running(**settings, join_token=token) as coordinator, StandIn() as ollama:
            assert await joined(coordinator, ollama, token, ip_address=PRIVATE) == 201
            assert len(list(coordinator.parts.access.keys)) == 1


@pytest.mark.spec("ACCESS-21")
async def test_a_token_for_one_machine_is_used_up_in_the_database_first(database: Space) -> None:
    settings = {"database_url": database.url, "access": "keys", **PROXIED}
    async with running(**settings) as coordinator, StandIn() as ollama:
        keys, store = coordinator.parts.access.keys, coordinator.parts.store
        _, secret = keys.create(NewKey(name="one", rights=("join",), once=True))
        await store.commit()
        await store.run(database.stop_writing)
        body, key = registration(ollama, ip_address=PRIVATE), {"X-Api-Key": secret}
        status, answer = await sent(
            coordinator, "/api/agents", body, of=PRIVATE, **key, **proof(OWN)
        )
        assert (status, "ask once more to be sure" in answer["error"]) == (503, True)
        await store.run(database.mend)
        status, _ = await sent(coordinator, "/api/agents", body, of=PRIVATE, **key, **proof(OWN))
        assert status == 200
    async with running(**settings) as after, StandIn() as other:
        assert [agent.name for agent in after.parts.registry] == ["m"]
        text = JoinToken(secret).text
        assert await joined(after, other, text, name="n", ip_address=OTHER) == 401


# ── who speaks for an agent ───────────────────────────────────────────────────────────────────


def proof(secret: str) -> dict[str, str]:
    return {"X-Agent-Secret": secret}


def beat(agent_id: str, **more: Any) -> dict[str, Any]:
    return {"agent_id": agent_id, "cpu_usage": 1, "memory_usage": 1, "active_requests": 0, **more}


def ids(number: int) -> dict[str, str]:
    return {"machine_id": f"machine-{number}", "instance_id": f"process-{number}"}


@pytest.mark.spec("ACCESS-22")
async def test_only_who_has_the_secret_speaks_for_an_agent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"sqlite://{tmp_path}/a.db"
    async with StandIn() as ollama:
        async with running(database_url=url) as coordinator:
            body = registration(ollama, **ids(1))
            _, answer = await sent(coordinator, "/api/agents", body, **proof(OWN))
            agent_id = answer["agent_id"]
        async with running(database_url=url) as coordinator:  # it is known after a restart
            assert await coordinator.heartbeat(agent_id) == 404
            says: dict[str, Any]
            for says in ({"leaving": True}, {"tags": {"models": []}}, {"ollama_running": False}):
                for headers in ({}, proof(ANOTHER), proof("")):
                    said = beat(agent_id, instance_id="process-1", **says)
                    status, text = await sent(coordinator, "/api/health", said, **headers)
                    assert (status, "not believed" in text["error"]) == (404, True)
            path = f"/api/agents/{agent_id}/log"
            assert (await sent(coordinator, path, {"lines": []}))[0] == 404
            async with coordinator.session.get(f"{coordinator.url}{path[:-3]}link") as answered:
                assert answered.status == 404
            [told] = [one for one in caplog.records if one.msg.startswith("not believed")]
            assert vars(told)["agent_id"] == agent_id
            assert vars(told)["client"] == "127.0.0.1"
            # Nobody takes its place, by whatever it says of itself.
            for more in (ids(1), ids(2), {**ids(2), "previous_instance_id": "process-1"}):
                status, text = await sent(
                    coordinator, "/api/agents", {**body, **more}, **proof(ANOTHER)
                )
                assert status == 409
                assert "agents rm m" in text["error"]
            assert await sent(coordinator, "/api/agents", registration(ollama, name="x")) == (
                200,
                {"agent_id": agent_id, "status": "updated"},
            )
            [row] = await coordinator.get("/api/agents")
            assert (row["machine_name"], row["status"]) == ("m", "online")
            assert (await coordinator.chat())[0] == 200
            # Its own machine does what it wants.
            status, _ = await sent(coordinator, "/api/health", beat(agent_id), **proof(OWN))
            assert status == 200
            again = {**body, **ids(1), "instance_id": "process-9", "machine_name": "renamed"}
            assert (await sent(coordinator, "/api/agents", again, **proof(OWN)))[0] == 200
            said = beat(agent_id, leaving=True)
            assert (await sent(coordinator, "/api/health", said, **proof(OWN)))[0] == 200
    for file in tmp_path.iterdir():
        assert OWN.encode() not in file.read_bytes()


@pytest.mark.spec("ACCESS-22")
async def test_an_agent_of_yesterday_is_served_and_pins_from_where_it_is() -> None:
    async with running(**PROXIED) as coordinator, StandIn() as ollama:
        body = registration(ollama, ip_address=PRIVATE, **ids(1))
        _, answer = await sent(coordinator, "/api/agents", body, of=PRIVATE)
        agent_id = answer["agent_id"]
        said = beat(agent_id, instance_id="process-1")
        assert (await sent(coordinator, "/api/health", said, of=PRIVATE))[0] == 200
        coordinator.parts.access.keys.create(NewKey(name="first"))
        assert (await sent(coordinator, "/api/health", said, of=PRIVATE))[0] == 200
        # Another machine's secret is not pinned, nor is its word believed.
        assert (await sent(coordinator, "/api/agents", body, of=OTHER, **proof(ANOTHER)))[0] == 403
        new = {**body, "instance_id": "process-2"}
        assert (await sent(coordinator, "/api/agents", new, of=PRIVATE, **proof(OWN)))[0] == 200
        assert (await sent(coordinator, "/api/health", beat(agent_id), of=PRIVATE))[0] == 401
        for address in (PRIVATE, OTHER, "203.0.113.9"):  # wherever it is from then on
            status, _ = await sent(
                coordinator, "/api/health", beat(agent_id), of=address, **proof(OWN)
            )
            assert status == 200


@pytest.mark.spec("ACCESS-23")
async def test_a_bare_machine_is_believed_from_where_it_is_alone() -> None:
    async with running(**PROXIED) as coordinator, StandIn() as ollama:
        body = registration(ollama, ip_address=PRIVATE)
        _, answer = await sent(coordinator, "/api/agents", body, of="10.0.0.5")
        leaves = beat(answer["agent_id"], leaving=True)
        assert (await sent(coordinator, "/api/health", leaves, of=OTHER))[0] == 404
        assert (await sent(coordinator, "/api/agents", {**body, "machine_name": "x"}, of=OTHER))[
            0
        ] == 409
        assert (await sent(coordinator, "/api/agents", body, of=OTHER))[0] == 409
        for address in (PRIVATE, "10.0.0.5"):
            assert (await sent(coordinator, "/api/agents", body, of=address))[0] == 200
        [row] = await coordinator.get("/api/agents")
        assert (row["machine_name"], row["status"]) == ("m", "online")


@pytest.mark.spec("ACCESS-23")
async def test_who_registers_anothers_address_does_not_lock_it_out() -> None:
    async with running(**PROXIED) as coordinator, StandIn() as ollama:
        body = registration(ollama, name="evil", ip_address=PRIVATE, **ids(2))
        _, first = await sent(coordinator, "/api/agents", body, of=OTHER, **proof(ANOTHER))
        own = registration(ollama, ip_address=PRIVATE, **ids(1))
        status, answer = await sent(coordinator, "/api/agents", own, of=PRIVATE, **proof(OWN))
        assert status == 201
        assert answer["agent_id"] != first["agent_id"]
        assert (await sent(coordinator, "/api/agents", body, of=OTHER, **proof(ANOTHER)))[0] == 409
        online = [row for row in await coordinator.get("/api/agents") if row["status"] == "online"]
        assert [row["machine_name"] for row in online] == ["m"]


# ── who wants to join ─────────────────────────────────────────────────────────────────────────


@pytest.mark.spec("ACCESS-24")
async def test_a_machine_without_a_token_waits_to_be_admitted() -> None:
    async with running(**PROXIED) as coordinator, StandIn() as ollama:
        coordinator.parts.access.keys.create(NewKey(name="first"))
        body = registration(ollama, ip_address=PRIVATE, **ids(1))
        assert (await sent(coordinator, "/api/agents", body, of=PRIVATE))[0] == 401
        for _ in range(2):
            status, text = await sent(coordinator, "/api/agents", body, of=PRIVATE, **proof(OWN))
            assert status == 403
        [asked] = (await coordinator.get("/api/join-requests"))["join_requests"]
        assert asked["fingerprint"] in text["error"]
        assert (asked["machine_name"], asked["address"]) == ("m", PRIVATE)
        coordinator.parts.attention.look(coordinator.parts.clock.now())
        listed = (await coordinator.get("/api/attention"))["attention"]
        [concern] = [one["concern"] for one in listed if one["concern"]["kind"] == "join"]
        assert asked["fingerprint"] in concern["text"]
        assert not ollama.seen.requests  # nothing was sent there
        assert asked["fingerprint"] in await run(coordinator.url, "join-request", "list")
        await run(coordinator.url, "join-request", "admit", "m")
        assert (await sent(coordinator, "/api/agents", body, of=OTHER, **proof(ANOTHER)))[0] == 403
        status, _ = await sent(coordinator, "/api/agents", body, of=PRIVATE, **proof(OWN))
        assert status == 201
        # A copy of its disk has its secret too, and is another machine.
        copy = {**body, "ip_address": OTHER, "instance_id": "process-2"}
        assert (await sent(coordinator, "/api/agents", copy, of=OTHER, **proof(OWN)))[0] == 403


@pytest.mark.spec("ACCESS-24")
async def test_a_machine_that_is_refused_does_not_ask_again() -> None:
    async with running(**PROXIED) as coordinator, StandIn() as ollama:
        coordinator.parts.access.keys.create(NewKey(name="first"))
        body = registration(ollama, ip_address=PRIVATE, **ids(1))
        await sent(coordinator, "/api/agents", body, of=PRIVATE, **proof(OWN))
        await run(coordinator.url, "join-request", "refuse", "m")
        status, text = await sent(coordinator, "/api/agents", body, of=PRIVATE, **proof(OWN))
        assert (status, "was refused" in text["error"]) == (403, True)
        assert (await coordinator.get("/api/join-requests"))["join_requests"] == []
        for number in range(100):  # and strangers fill no memory
            body = registration(ollama, name=f"n{number}", ip_address=PRIVATE)
            secret = proof(f"{number:043d}")
            assert (await sent(coordinator, "/api/agents", body, of=PRIVATE, **secret))[0] == 403
        assert len((await coordinator.get("/api/join-requests"))["join_requests"]) == 64


@pytest.mark.spec("ACCESS-24")
async def test_an_address_that_asks_with_ever_new_secrets_pushes_nobody_else_out() -> None:
    async with running(**PROXIED) as coordinator, StandIn() as ollama:
        coordinator.parts.access.keys.create(NewKey(name="first"))
        body = registration(ollama, name="real", ip_address=OTHER)
        await sent(coordinator, "/api/agents", body, of=OTHER, **proof(OWN))
        [asked] = (await coordinator.get("/api/join-requests"))["join_requests"]
        for number in range(70):
            body = registration(ollama, name=f"n{number}", ip_address=PRIVATE)
            await sent(coordinator, "/api/agents", body, of=PRIVATE, **proof(f"{number:043d}"))
        listed = (await coordinator.get("/api/join-requests"))["join_requests"]
        assert len(listed) == 64
        assert asked in listed


@pytest.mark.spec("ACCESS-24")
async def test_an_admitted_machine_joins_also_after_a_restart(database: Space) -> None:
    async with StandIn() as ollama:
        body = registration(ollama, ip_address=PRIVATE, **ids(1))
        async with running(database_url=database.url, **PROXIED) as coordinator:
            coordinator.parts.access.keys.create(NewKey(name="first"))
            for secret in (OWN, ANOTHER):
                await sent(coordinator, "/api/agents", body, of=PRIVATE, **proof(secret))
            first, _ = (await coordinator.get("/api/join-requests"))["join_requests"]
            await run(coordinator.url, "join-request", "admit", first["id"])
        async with running(database_url=database.url, **PROXIED) as coordinator:
            for secret, status in ((ANOTHER, 403), (OWN, 201)):
                sent_by = {"of": PRIVATE, **proof(secret)}
                assert (await sent(coordinator, "/api/agents", body, **sent_by))[0] == status
            await coordinator.parts.store.flush()
            kept = await coordinator.parts.store.document("known machines")
            assert b'"admitted":[]' in (kept or b"")


@pytest.mark.spec("ACCESS-21")
@pytest.mark.spec("ACCESS-22")
@pytest.mark.spec("ACCESS-24")
async def test_the_agent_itself_asks_is_admitted_and_joins_again_with_a_token(
    tmp_path: Path,
) -> None:
    settings: dict[str, Any] = {"manage_ollama": False, "machine_name": "real"}
    async with running(access="keys", **PROXIED) as coordinator, StandIn() as ollama:
        machines, keys = coordinator.parts.machines, coordinator.parts.access.keys
        settings |= {"ollama_port": ollama.port, "coordinator_url": coordinator.url}
        config = AgentConfig(state_dir=tmp_path / "one", **settings)
        async with agent_world.running(config) as daemon:
            await coordinator.until(machines.requests)
            await coordinator.until(lambda: "wants to join" in str(daemon.trouble))
            machines.admit("real")
            await coordinator.until(lambda: is_well(daemon))
        file = tmp_path / "one" / "machine-secret"
        if sys.platform != "win32":
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
        async with agent_world.running(config) as daemon:  # it stays in the fleet
            await coordinator.until(lambda: is_well(daemon))
            assert len(coordinator.parts.registry) == 1
        _, text = keys.create(NewKey(name="t", rights=("join",)))
        config = AgentConfig(
            state_dir=tmp_path / "one", join_token=JoinToken(text).text, **settings
        )
        async with agent_world.running(config) as daemon:
            await coordinator.until(lambda: is_well(daemon))
            before = daemon.agent_id
            assert before is not None
            coordinator.parts.registry.remove(before)
            await coordinator.until(lambda: is_well(daemon) and daemon.agent_id != before)
        assert len(coordinator.parts.registry) == 1


def is_well(daemon: Daemon) -> bool:
    return daemon.agent_id is not None and daemon.trouble is None
