"""Which machines come into the fleet, and who speaks for them, on real sockets."""

import asyncio
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ollama_coordinator.main import app
from ollama_coordinator_common.join_token import JoinToken
from support.coordinator import Running, running
from support.ollama import StandIn

PRIVATE, OTHER = "192.168.1.7", "192.168.1.8"
PROXIED: dict[str, Any] = {"trusted_proxies": ("127.0.0.1",)}
"""The tests' own address is a trusted proxy: it says for whom it asks."""


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
