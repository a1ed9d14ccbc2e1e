"""`top` in the terminal: the same state as the page's."""

import asyncio
import io
import json
import os
import sys
from contextlib import AsyncExitStack, aclosing
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from ollama_coordinator.commands.client import Client
from ollama_coordinator.commands.keyboard import keys_in
from ollama_coordinator.commands.top import HELP, Follower, View, screen
from ollama_coordinator.main import app
from support import programs
from support.coordinator import Running, running
from support.deadline import DEADLINE_SECONDS
from support.ollama import StandIn


def drawn(
    state: dict[str, Any],
    problem: str | None = None,
    height: int | None = None,
    view: View | None = None,
) -> str:
    """The screen as text."""
    console = Console(width=view.width if view else 140, file=io.StringIO(), color_system=None)
    console.print(screen(state, problem, datetime.now(UTC), height, view))
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


def request(number: int, **more: Any) -> dict[str, Any]:
    return {
        "id": f"r{number}", "model": f"m{number}", "state": "writing", "agent": "one",
        "client": "10.0.0.7", "arrived_at": f"2026-01-31T12:00:{59 - number}Z", "tokens": number,
        **more,
    }  # fmt: skip


STATE = {
    "fleet": {},
    "agents": {
        name: {
            "name": name, "state": "online", "loaded_models": [], "gpus": [], "slots": 1,
            "in_flight": flight, "sparkline": [0, 0],
        }
        for name, flight in (("first", 0), ("second", 1))
    },
    "requests": {f"r{number}": request(number) for number in range(3)},
    "finished": {
        "old": {
            "model": "mine:latest", "status": "failed", "total_seconds": 3.0, "agent": "second",
            "finished_at": "2026-01-31T12:00:00Z",
        }
    },
}  # fmt: skip


@pytest.mark.spec("DASH-77")
def test_keys_sort_filter_and_select() -> None:
    view = View(footer=HELP)
    shown = [one["id"] for one in view.requests(STATE)]
    assert shown == ["r2", "r1", "r0"]  # the oldest first, in one state
    for key in "ss":
        view.press(key, STATE)
    assert "sorted by most tokens" in drawn(STATE, view=view)
    view.press("a", STATE)
    assert [one["name"] for one in view.agents(STATE)] == ["second", "first"]
    for key in ("/", "m", "1", "x", "backspace", "enter"):
        assert view.press(key, STATE) is None
    assert [one["id"] for one in view.requests(STATE)] == ["r1"]
    assert "filter: m1" in drawn(STATE, view=view)
    view.press("escape", STATE)
    assert len(view.requests(STATE)) == 3
    view.press("down", STATE)
    assert view.selected == view.requests(STATE)[0]["id"]
    view.press("k", STATE)
    assert view.selected == view.requests(STATE)[0]["id"]
    view.press("q", STATE)
    assert view.ended


@pytest.mark.spec("DASH-77")
def test_a_request_is_cancelled_after_a_question_only() -> None:
    view = View(footer=HELP)
    assert view.press("c", STATE) is None
    assert "select a request" in view.note
    view.press("down", STATE)
    chosen = view.selected
    assert view.press("c", STATE) is None
    assert f"Cancel request {chosen}?" in drawn(STATE, view=view)
    assert view.press("n", STATE) is None
    view.press("c", STATE)
    assert view.press("y", STATE) == ("cancel", chosen)
    assert view.press("enter", STATE) == ("why", chosen)


@pytest.mark.spec("DASH-77")
@pytest.mark.parametrize("width", [80, 100, 160])
def test_a_wide_terminal_shows_more_and_none_is_overrun(width: int) -> None:
    view = View(width=width, footer=HELP)
    text = drawn(STATE, view=view, height=24)
    assert max(map(len, text.splitlines())) <= width
    assert ("JUST ENDED" in text) is (width >= 130)
    view.why = {
        "id": "r1", "model": "m1",
        "attempts": [{"agent": "one", "rule": "lowest cost", "refused": {"two": "offline"}}],
    }  # fmt: skip
    text = drawn(STATE, view=view, height=24)
    assert "decided by lowest cost" in text
    assert "not two: offline" in text
    # Beside the lists where there is room, in their place where there is not.
    assert ("JUST ENDED" in text, "10.0.0.7" in text) == (False, width >= 130)


@pytest.mark.spec("DASH-77")
@pytest.mark.parametrize("width", [80, 100, 160])
async def test_a_long_name_takes_no_numbers_place(coordinator: Running, width: int) -> None:
    name, model = "a-workstation-with-a-very-long-name.physics.example.edu", "m" * 70
    async with StandIn((f"{model}:q4",)) as ollama:
        agent_id = await coordinator.register(ollama, name)
        await coordinator.heartbeat(agent_id, cpu_usage=37.0, memory_total_bytes=64 * 2**30)
        ollama.hold(after=2)
        follower = Follower(Client(coordinator.url, coordinator.session))
        async with (
            coordinator.stream(model=f"{model}:q4") as streamed,
            aclosing(follower.follow()) as states,
            asyncio.timeout(DEADLINE_SECONDS),
        ):
            await streamed.content.readline()
            async for state in states:
                if [row["tokens"] for row in state["requests"].values()] == [2]:
                    break
            text = drawn(follower.state, view=View(width=width))
            ollama.release()
    assert max(map(len, text.splitlines())) <= width
    for shown in ("37 %", "/64 GiB", "1/1", "TOK/S", "ELAPSED", "127.0.0.1", "a-works", "mmmmm"):
        assert shown in text


@pytest.mark.parametrize(
    ("sent", "keys"),
    [("\x1b[A\x1bOB", ["up", "down"]), ("\x1b", ["escape"]), ("aé\r", ["a", "é", "enter"])],
)
def test_what_a_terminal_sends_is_read_as_keys(sent: str, keys: list[str]) -> None:
    assert keys_in(sent) == keys


@pytest.mark.spec("DASH-77")
@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminal")
async def test_keys_reach_it_in_a_terminal_which_is_left_as_it_was(
    coordinator: Running, ollama: StandIn
) -> None:
    import pty
    import termios

    ollama.hold(after=2)
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    streaming = AsyncExitStack()
    answer = await streaming.enter_async_context(coordinator.stream())
    await answer.content.readline()
    program = await asyncio.create_subprocess_exec(
        programs.command("ollama-coordinator"), "top", "--url", coordinator.url,
        stdin=theirs, stdout=theirs, stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "160", "LINES": "40"},
    )  # fmt: skip

    seen = bytearray()
    loop = asyncio.get_running_loop()
    changed = asyncio.Event()

    def read() -> None:
        seen.extend(os.read(ours, 65_536))
        changed.set()

    async def until(text: str) -> None:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while text.encode() not in seen:
                changed.clear()
                await changed.wait()
        seen.clear()

    loop.add_reader(ours, read)
    try:
        await until("writing")
        os.write(ours, b"j")
        os.write(ours, b"w")
        await until("decided by")
        os.write(ours, b"c")
        await until("y cancels it")
        os.write(ours, b"y")
        assert "cancelled by the operator" in (await answer.read()).decode()
        os.write(ours, b"q")
        async with asyncio.timeout(DEADLINE_SECONDS):
            assert await program.wait() == 0
        assert termios.tcgetattr(theirs) == before
    finally:
        loop.remove_reader(ours)
        if program.returncode is None:
            program.kill()
        os.close(ours)
        os.close(theirs)
        await streaming.aclose()
