"""One address takes not all connections, and some are kept for agents and operators."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from integration.test_link_network import Machines, Network, have_namespaces
from ollama_coordinator.access import NewKey
from ollama_coordinator.http1 import ConnectionLimits
from ollama_coordinator.http1.limits import capacity_of
from support import programs
from support.coordinator import running, serving
from support.deadline import DEADLINE_SECONDS
from support.ollama import StandIn

MOST = capacity_of(200).connections
"""What `ulimit -n 200` leaves."""

ONE, OTHER, THIRD = "127.0.0.2", "127.0.0.3", "127.0.0.4"


async def answer(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


async def status(url: str, of: str) -> int:
    """The status of a request from an address; 0 where it is cut off: so many are refused."""
    port = int(url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(of, 0))
    try:
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        line = await reader.readline()
    except ConnectionResetError:
        return 0
    finally:
        writer.transport.abort()
    return int(line.split()[1]) if line else 0


@asynccontextmanager
async def idle(
    url: str, of: str, count: int, limits: ConnectionLimits, until: int
) -> AsyncIterator[None]:
    """So many connections from an address that send nothing, until so many are open in all."""
    port = int(url.rpartition(":")[2])
    opened = [
        await asyncio.open_connection("127.0.0.1", port, local_addr=(of, 0)) for _ in range(count)
    ]
    while limits.open < until:
        await asyncio.sleep(0.005)
    try:
        yield
    finally:
        for _, writer in opened:
            writer.transport.abort()


@pytest.mark.spec("ACCESS-29")
async def test_one_address_has_half_of_them_and_others_are_served(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert MOST == 43
    limits = ConnectionLimits(most=MOST, shared=lambda at: at == THIRD, known=lambda at: at != ONE)
    async with serving(answer, limits=limits) as url:
        async with idle(url, ONE, 100, limits, 22):
            assert await status(url, ONE) in (0, 503)
            for _ in range(3):
                assert await status(url, OTHER) == 200
            assert caplog.text.count("as many connections of one address") == 1
        # A proxy's address is many clients'.
        while limits.open:
            await asyncio.sleep(0.005)
        async with idle(url, THIRD, 40, limits, 40):
            assert await status(url, THIRD) == 200


@pytest.mark.spec("ACCESS-29")
async def test_the_last_ones_are_kept_for_agents_and_operators() -> None:
    limits = ConnectionLimits(most=16, shared=lambda at: False, known=lambda at: at == THIRD)
    async with serving(answer, limits=limits) as url:
        async with idle(url, ONE, 8, limits, 8), idle(url, OTHER, 8, limits, 14):
            assert await status(url, "127.0.0.5") == 503
            assert await status(url, THIRD) == 200


@pytest.mark.spec("ACCESS-29")
async def test_who_is_known() -> None:
    async with running(access="keys", trusted_proxies=("10.0.0.1",)) as coordinator:
        access = coordinator.parts.access
        _, key = access.keys.create(NewKey(name="boss", rights=("operate",)))
        assert [access.is_shared(at) for at in ("127.0.0.1", "10.0.0.1", "10.0.0.2")] == [
            True,
            True,
            False,
        ]
        assert not access.is_known("10.0.0.2")
        assert access.is_known("127.0.0.1")
        async with StandIn() as ollama:
            coordinator.session.headers["Authorization"] = f"Bearer {key}"
            await coordinator.register(ollama, ip_address="127.0.0.1")
        [agent] = coordinator.parts.registry
        access.machines.note(agent.id, "192.168.1.7")
        assert access.is_known("192.168.1.7")
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/api/tags",
            "client": ("192.168.1.9", 1),
            "headers": [(b"authorization", f"Bearer {key}".encode())],
        }
        access.identify(scope)
        assert access.is_known("192.168.1.9")


# ── a process with few files ──────────────────────────────────────────────────────────────────

GREEDY, GUEST, AGENT = "10.77.0.2", "10.77.0.3", "10.77.0.4"
"""The addresses of the other machine, each another client's."""

CLIENTS = """
import http.client, json, socket, sys

GREEDY, GUEST, AGENT = sys.argv[1:]
FACTS = {"machine_name": "m", "ip_address": AGENT, "ollama_version": "0.33.0", "ollama_port": 11434}

def ask(of, method="GET", path="/api/version", body=None):
    connection = http.client.HTTPConnection("10.77.0.1", 8080, timeout=60, source_address=(of, 0))
    try:
        connection.request(method, path, json.dumps(body) if body else None)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except ConnectionError:
        return 0, b""  # so many are refused
    finally:
        connection.close()

status, said = ask(AGENT, "POST", "/api/agents", FACTS)
assert status == 201, said
beat = {"cpu_usage": 1, "memory_usage": 1, "active_requests": 0}
beat["agent_id"] = json.loads(said)["agent_id"]
idle = [
    socket.create_connection(("10.77.0.1", 8080), timeout=60, source_address=(GREEDY, 0))
    for _ in range(300)
]
refused = ask(GREEDY)[0]
guests = [ask(GUEST)[0] for _ in range(20)]
beats = [ask(AGENT, "POST", "/api/health", beat)[0] for _ in range(5)]
for one in idle:
    one.close()
for _ in range(1000):
    later = ask(GREEDY)[0]
    if later == 200:
        break
print(json.dumps([refused, guests, beats, later]))
"""


@pytest.fixture
def network() -> Iterator[Network]:
    with Network() as network:
        for address in (GUEST, AGENT):
            place = (f"{address}/24", "dev", "cable")
            subprocess.run(["ip", "-n", network.machine, "address", "add", *place], check=True)
        yield network


@pytest.mark.spec("ACCESS-29")
@pytest.mark.skipif(bool(have_namespaces()), reason=have_namespaces() or "")
async def test_a_process_with_200_files_serves_others_beside_one_clients_idle_connections(
    network: Network, tmp_path: Path
) -> None:
    limited = ("sh", "-c", 'ulimit -n 200; exec "$@"', "sh")
    settings = {"COORDINATOR_HOST": "0.0.0.0", "DATABASE_URL": "sqlite://:memory:"}
    machines = Machines(network, tmp_path)
    started = machines.run(
        network.center, "log", *limited, programs.command("ollama-coordinator"), **settings
    )
    async with started as coordinator, asyncio.timeout(DEADLINE_SECONDS):
        await coordinator.says("coordinator listens")
        clients = await asyncio.create_subprocess_exec(
            *("ip", "netns", "exec", network.machine, sys.executable, "-c", CLIENTS),
            *(GREEDY, GUEST, AGENT),
            stdout=asyncio.subprocess.PIPE,
        )
        told, _ = await clients.communicate()
        assert clients.returncode == 0
        refused, guests, beats, later = json.loads(told)
        assert refused in (0, 503)
        assert guests == [200] * 20
        assert beats == [200] * 5
        assert later == 200
        assert "as many connections of one address" in coordinator.output
        assert "Traceback" not in coordinator.output
