"""The end of the real program: whatever clients do, it comes, and nothing known is lost."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from ollama_coordinator_common.settings import HTTP_CHOICES
from support import deaf, programs
from support.ollama import StandIn


async def register(session: aiohttp.ClientSession, url: str, ollama: StandIn) -> None:
    facts = {
        "machine_name": "first",
        "ip_address": "127.0.0.1",
        "ollama_version": "0.33.0",
        "ollama_port": ollama.port,
    }
    async with session.post(f"{url}/api/agents", json=facts) as response:
        assert response.status == 201


def rows(database: Path, sql: str) -> list[Any]:
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(sql).fetchall()


@pytest.mark.spec("OPERATION-9")
@pytest.mark.spec("OPERATION-17")
@pytest.mark.parametrize("how", ["time-out", "second signal"])
@pytest.mark.parametrize("http", HTTP_CHOICES)
async def test_a_client_that_does_not_read_keeps_nobody_from_stopping(
    tmp_path: Path, http: str, how: str
) -> None:
    settings = {
        "COORDINATOR_HTTP": http,
        "COORDINATOR_DRAIN_TIMEOUT": "0.3" if how == "time-out" else "300",
    }
    async with deaf.flooding() as ollama, aiohttp.ClientSession() as session:
        port = programs.free_port()
        async with programs.coordinator(tmp_path, port, **settings) as (url, program):
            await register(session, url, ollama)
            async with (
                deaf.connected(url, deaf.chat()) as one,
            ):
                await deaf.begins(one)
                await session.close()
                program.send(programs.TERMINATE)
                if how == "second signal":
                    await program.says("coordinator stops")
                    program.send(programs.TERMINATE)
                assert await program.ended() == 0
                assert "Traceback" not in program.output
    database = tmp_path / "coordinator.db"
    # The database was closed in order, which takes its journal away, after the last writes.
    assert not database.with_suffix(".db-wal").exists()
    told = {error for (error,) in rows(database, "SELECT error FROM requests")}
    assert told == {"the coordinator is shutting down"}
    assert rows(database, "SELECT name FROM documents WHERE name = 'learned'")
