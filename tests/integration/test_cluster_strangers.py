"""What strangers send to a coordinator that passes requests on: it speaks for none of them."""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from ollama_coordinator.carry import HELLO, REPORTS, WIRE, Hello, encoded
from support.cluster import Coordinator, cluster
from support.databases import PostgresSchema
from support.deadline import DEADLINE_SECONDS
from support.ollama import StandIn

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals there are another matter")


@pytest.fixture
async def pair(tmp_path: Path, postgres: PostgresSchema) -> AsyncIterator[list[Coordinator]]:
    async with cluster(tmp_path, postgres.url) as made:
        yield made


@pytest.mark.spec("CLUSTER-18")
async def test_nobody_speaks_to_the_leader_as_a_coordinator_by_way_of_one(
    pair: list[Coordinator],
) -> None:
    front = pair[1]
    bodies = [encoded(Hello(WIRE, "stranger", 100_000, [])), b"", b"\xff" * 1000]
    for one in pair:
        for path in (HELLO, REPORTS):
            for body in bodies:
                async with one.session.post(one.url + path, data=body) as answer:
                    assert answer.status == 404, (path, await answer.text())
    assert (await front.get("/healthz"))["leader"]["url"] == pair[0].url


async def sent(url: str, *lines: str) -> bytes:
    """The first line of the answer to these bytes; the connection stays open until then."""
    where = urlsplit(url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    try:
        writer.write("\r\n".join([*lines, f"Host: {where.netloc}", "", ""]).encode())
        async with asyncio.timeout(DEADLINE_SECONDS):
            return await reader.readline()
    finally:
        writer.close()


@pytest.mark.spec("CLUSTER-18")
async def test_a_wrong_upgrade_is_answered_and_holds_up_nobody(pair: list[Coordinator]) -> None:
    front = pair[1]
    upgrade = ("Upgrade: websocket", "Connection: upgrade")
    waits = [
        ("404", f"GET {HELLO} HTTP/1.1"),
        ("404", f"GET {REPORTS} HTTP/1.1"),
        ("404", "GET /nothing HTTP/1.1"),
        ("404", "GET /api/agents/x/link HTTP/1.1"),
        ("404", "GET /api/agents/x/link HTTP/1.1", "Content-Length: 0"),
        ("200", "GET /api/version HTTP/1.1"),
    ]
    answers = await asyncio.gather(*(sent(front.url, *one[1:], *upgrade) for one in waits * 3))
    assert [answer.split()[1].decode() for answer in answers] == [one[0] for one in waits * 3]
    # One whose body never comes is in nobody's way.
    where = urlsplit(front.url)
    _, writer = await asyncio.open_connection(where.hostname, where.port)
    head = ("GET /api/agents/x/link HTTP/1.1", f"Host: {where.netloc}", "Content-Length: 5")
    writer.write("\r\n".join([*head, *upgrade, "", ""]).encode())
    async with StandIn() as ollama:
        await front.register(ollama, "one")
        assert (await front.chat())[0] == 200
    writer.close()
