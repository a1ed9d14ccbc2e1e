"""`top` in the terminal: the same state as the page's."""

import asyncio
import io
import json
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from ollama_coordinator.commands.client import Client
from ollama_coordinator.commands.top import Follower, screen
from ollama_coordinator.main import app
from support.coordinator import Running, running
from support.deadline import DEADLINE_SECONDS
from support.ollama import StandIn


def drawn(state: dict[str, Any], problem: str | None = None, height: int | None = None) -> str:
    """The screen as text."""
    console = Console(width=140, file=io.StringIO(), color_system=None)
    console.print(screen(state, problem, datetime.now(UTC), height))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.spec("DASH-31")
async def test_the_terminal_shows_agents_and_requests(coordinator: Running) -> None:
    async with StandIn() as ollama:
        await coordinator.register(ollama, "[red]a<script>[/red]")
        await coordinator.chat()
        ollama.hold(after=2)
        follower = Follower(Client(coordinator.url, coordinator.session))
        async with (
            coordinator.stream() as answer,
            aclosing(follower.follow()) as states,
            asyncio.timeout(DEADLINE_SECONDS),
        ):
            await answer.content.readline()
            async for state in states:
                if [r["tokens"] for r in state["requests"].values()] == [2]:
                    break
            ollama.release()
    text = drawn(follower.state)
    assert "[red]a<script>[/red]" in text
    assert "1/1 online" in text
    assert "writing" in text
    assert "llama3.2" in text


@pytest.mark.spec("DASH-36")
async def test_what_an_agent_says_steers_no_terminal(coordinator: Running) -> None:
    async with StandIn() as ollama:
        agent_id = await coordinator.register(ollama, "first")
        tags = {
            "models": [{"name": "m:latest", "model": "m:latest", "size": 1, "digest": "a" * 64}]
        }
        broken = {"m:latest": "gone\x1b[2J\u202e"}
        await coordinator.heartbeat(agent_id, tags=tags, broken_models=broken)
        follower = Follower(Client(coordinator.url, coordinator.session))
        async with aclosing(follower.follow()) as states, asyncio.timeout(DEADLINE_SECONDS):
            async for state in states:
                if state:
                    break
        client = Client(coordinator.url, coordinator.session)
        (row,) = await client.json("GET", "/api/agents")
    assert row["broken_models"] == {"m:latest": r"gone\x1b[2J\u202e"}
    assert "\x1b" not in drawn(follower.state) + json.dumps(follower.state, ensure_ascii=False)


@pytest.mark.spec("DASH-31")
async def test_the_follower_survives_a_restart(coordinator: Running) -> None:
    follower = Follower(Client("http://127.0.0.1:9", coordinator.session))
    async with aclosing(follower.follow()) as states, asyncio.timeout(DEADLINE_SECONDS):
        async for _ in states:
            break
    assert follower.problem
    assert "reconnecting" in drawn(follower.state, follower.problem)
    again = Follower(Client(coordinator.url, coordinator.session))
    async with aclosing(again.follow()) as states, asyncio.timeout(DEADLINE_SECONDS):
        async for _ in states:
            coordinator.parts.begin_stopping()
            if again.problem:
                break
    assert again.problem == "the coordinator has stopped"


@pytest.mark.spec("DASH-31")
async def test_one_picture_can_be_printed() -> None:
    async with running() as coordinator:
        arguments = ["top", "--once", "--coordinator", coordinator.url]
        result = await asyncio.to_thread(CliRunner().invoke, app, arguments)
        assert result.exit_code == 0, result.output
        assert "0/0 online" in result.output
        assert "ollama-coordinator-agent run" in result.output
    result = await asyncio.to_thread(CliRunner().invoke, app, arguments)
    assert result.exit_code == 1
    assert "no coordinator answers" in result.output


def test_a_small_terminal_shows_what_fits() -> None:
    agent = {
        "state": "online", "loaded_models": [], "gpus": [], "in_flight": 0, "slots": 1,
        "sparkline": [0, 0],
    }  # fmt: skip
    agents = {str(n): {**agent, "name": f"machine-{n:02}"} for n in range(40)}
    text = drawn({"agents": agents, "requests": {}, "fleet": {}}, height=24)
    assert "and 24 more" in text
    assert len(text.splitlines()) <= 24
