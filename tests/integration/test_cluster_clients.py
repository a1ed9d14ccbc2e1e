"""Clients of a front that end their connection as soon as they have the answer."""

import asyncio
import json
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from support.cluster import CHAT, cluster
from support.databases import PostgresSchema
from support.deadline import DEADLINE_SECONDS
from support.ollama import StandIn

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="as for all clusters")

REQUESTS = 30
"""Without the leader heard out, about every second one was cancelled there."""


async def chat_and_leave(url: str) -> None:
    """Ask on a connection that is closed with the last byte of the answer."""
    where, body = urlsplit(url), json.dumps(CHAT).encode()
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    head = f"POST /api/chat HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    async with asyncio.timeout(DEADLINE_SECONDS):
        answer = await reader.readuntil(b"\r\n0\r\n\r\n")
    writer.close()
    assert answer.startswith(b"HTTP/1.1 200")


@pytest.mark.spec("CLUSTER-20")
async def test_a_client_that_has_its_answer_from_a_front_may_leave_at_once(
    tmp_path: Path, postgres: PostgresSchema
) -> None:
    async with cluster(tmp_path, postgres.url) as (first, second), StandIn() as ollama:
        await second.register(ollama, "one")
        assert (await second.chat())[0] == 200
        for _ in range(REQUESTS):
            await chat_and_leave(second.url)
        rows = await first.history(REQUESTS + 1)
        assert {row["status"] for row in rows} == {"served"}
        assert all(row["output_tokens"] for row in rows)
        assert (await first.get("/healthz"))["in_flight"] == 0
