"""The log as programs read it: every line an object, and each request a line on choice."""

import asyncio
import json
import logging
import os
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from support import programs
from support.coordinator import Running, running
from support.ollama import StandIn

CRASHES = """
import threading, warnings
import typer
from ollama_coordinator_common.commandline import log_json
app = typer.Typer()
@app.command()
def main() -> None:
    log_json("INFO")
    warnings.warn("old")
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    {}["absent"]
app()
"""


def lines(log: Path) -> list[dict[str, Any]]:
    """Every line, each of which has to be an object."""
    found = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    assert all(one.keys() >= {"time", "level", "logger", "message"} for one in found)
    return found


@pytest.mark.spec("OPERATION-73")
async def test_every_line_of_a_coordinator_is_json_and_a_request_is_one(tmp_path: Path) -> None:
    wanted = {"COORDINATOR_LOG_FORMAT": "json", "COORDINATOR_ACCESS_LOG": "true"}
    port = programs.free_port()
    async with (
        programs.coordinator(tmp_path, port, **wanted) as (url, program),
        aiohttp.ClientSession() as session,
    ):
        key = f"oc_{'x' * 43}"
        async with session.get(f"{url}/k/{key}/api/tags?secret=1") as answer:
            status = answer.status
        await program.says("/api/tags")
        program.send(programs.TERMINATE)
        assert await program.ended() == 0
    found = lines(tmp_path / "coordinator.log")
    assert found[0]["level"] in ("INFO", "WARNING")
    assert any(one["message"] == "coordinator listens" for one in found)
    [row] = [one for one in found if one.get("path") == "/api/tags"]
    assert (row["method"], row["status"], row["client"]) == ("GET", status, "127.0.0.1")
    assert row["bytes"] > 0
    assert "secret" not in json.dumps(row)
    assert not any(key in json.dumps(one) for one in found)


@pytest.mark.spec("OPERATION-73")
@pytest.mark.parametrize(
    ("name", "variable", "wrong"),
    [
        ("ollama-coordinator", "COORDINATOR_LOG_FORMAT", {"COORDINATOR_PORT": "http"}),
        ("ollama-coordinator", "COORDINATOR_LOG_FORMAT", {"COORDINATOR_HOST": "203.0.113.1"}),
        ("ollama-coordinator-agent", "AGENT_LOG_FORMAT", {"OLLAMA_PORT": "http"}),
    ],
)
async def test_why_a_program_does_not_start_is_json_too(
    tmp_path: Path, name: str, variable: str, wrong: dict[str, str]
) -> None:
    log = tmp_path / "log"
    given = {variable: "json", "DATABASE_URL": "sqlite://:memory:", **wrong}
    async with programs.program(log, programs.command(name), **given) as started:
        assert await started.ended() in (1, 2)
    assert lines(log)[-1]["level"] == "CRITICAL"
    assert next(iter(wrong.values())) in lines(log)[-1]["message"]


@pytest.mark.spec("OPERATION-73")
async def test_a_crash_is_json_too(tmp_path: Path) -> None:
    log = tmp_path / "log"
    python = programs.command("python")
    async with programs.program(log, python, "-c", CRASHES, **os.environ) as started:
        assert await started.ended() == 1
    old, thread, crash = lines(log)
    assert "old" in old["message"]
    assert "ZeroDivisionError" in thread["exception"]
    assert "KeyError: 'absent'" in crash["exception"]


@pytest.mark.spec("OPERATION-73")
async def test_a_client_that_leaves_and_one_that_is_served_are_lines(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    async with running(access_log=True) as coordinator, StandIn() as ollama:
        await coordinator.register(ollama, "first")
        assert (await coordinator.chat())[0] == 200
        ollama.hold()
        leaving = asyncio.create_task(coordinator.chat())
        await ollama.seen.wait_for(lambda seen: seen.held == 1)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        await coordinator.until(coordinator.at_rest)
        ollama.release()
    rows = [vars(one) for one in caplog.records if one.name.endswith("access_log")]
    chats = [row for row in rows if row["path"] == "/api/chat"]
    assert chats[0]["request"]
    assert [row["status"] for row in chats] == [200, 499]


@pytest.mark.spec("OPERATION-81")
async def test_the_coordinators_own_log_is_read_over_http(coordinator: Running) -> None:
    async with StandIn() as ollama:
        await coordinator.register(ollama, "first")
    logging.getLogger("ollama_coordinator.test").warning("of no agent", extra={"number": 7})
    try:
        raise ValueError("why")
    except ValueError:
        logging.getLogger("ollama_coordinator.test").exception("it failed")
    lines = (await coordinator.get("/api/log"))["events"]
    assert [line["event"] for line in lines[:3]] == ["it failed", "of no agent", "agent registered"]
    assert lines[0]["level"] == "error"
    assert lines[0]["facts"]["exception"] == "ValueError('why')"
    assert lines[1]["facts"] == {"number": "7"}
    # The events of machines are those lines alone that are about one.
    events = (await coordinator.get("/api/events"))["events"]
    assert [event["event"] for event in events] == ["agent registered"]
