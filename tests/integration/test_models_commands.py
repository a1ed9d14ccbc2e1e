"""The command line's `models` and `ps`, asked of a running coordinator."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from ollama_coordinator.main import app
from support import programs
from support.coordinator import Running, running
from support.ollama import Model, StandIn
from support.transfers import names


@pytest.fixture
async def fleet() -> AsyncIterator[tuple[Running, list[StandIn]]]:
    """Two agents that can pull `tiny`; one of them has `llama3.2`."""
    registry = [Model("tiny", size_bytes=1_000_000)]
    async with (
        running() as coordinator,
        StandIn(registry=registry) as first,
        StandIn([], registry=registry) as second,
    ):
        await coordinator.register(first, "first")
        await coordinator.register(second, "second")
        yield coordinator, [first, second]


async def _run(coordinator: Running | str, *arguments: str) -> Result:
    """Run a command in a thread, as it runs a loop of its own."""
    url = coordinator if isinstance(coordinator, str) else coordinator.url
    environment = {"COORDINATOR_URL": url, "COLUMNS": "200", "DATABASE_URL": "sqlite://:memory:"}
    return await asyncio.to_thread(CliRunner(env=environment).invoke, app, list(arguments))


@pytest.mark.spec("SURFACE-29")
async def test_pull_list_copy_remove(fleet: tuple[Running, list[StandIn]]) -> None:
    coordinator, ollamas = fleet
    pulled = await _run(coordinator, "models", "pull", "tiny", "--replicas", "2")
    assert pulled.exit_code == 0, pulled.output
    assert "success" in pulled.output
    assert pulled.output.count("done") == 2
    assert all("tiny:latest" in names(ollama) for ollama in ollamas)
    listed = await _run(coordinator, "models", "list")
    row = next(line for line in listed.output.splitlines() if line.startswith("tiny:latest"))
    assert "first, second" in row
    copied = await _run(coordinator, "models", "cp", "tiny", "mine")
    assert copied.exit_code == 0
    removed = await _run(coordinator, "models", "rm", "tiny", "mine")
    assert removed.exit_code == 0, removed.output
    assert [names(ollama) for ollama in ollamas] == [["llama3.2:latest"], []]


@pytest.mark.spec("SURFACE-29")
@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminal")
async def test_a_terminal_lists_the_machines_before_it_deletes(
    fleet: tuple[Running, list[StandIn]],
) -> None:
    coordinator, ollamas = fleet
    for typed, code, left in ((b"n\n", 1, ["llama3.2:latest"]), (b"y\n", 0, [])):
        ours, theirs = os.openpty()
        os.write(ours, typed)
        done = await asyncio.create_subprocess_exec(
            programs.command("ollama-coordinator"), "models", "rm", "llama3.2",
            "--url", coordinator.url,
            stdin=theirs, stdout=subprocess.PIPE, env={**os.environ, "COLUMNS": "80"},
        )  # fmt: skip
        try:
            output, _ = await done.communicate()
        finally:
            os.close(ours)
            os.close(theirs)
        assert done.returncode == code, output
        lines = output.decode().splitlines()
        assert lines[1].split() == ["llama3.2", "first"]
        assert "Delete what is listed?" in output.decode()
        assert names(ollamas[0]) == left


@pytest.mark.spec("SURFACE-29")
async def test_load_ps_show_unload(fleet: tuple[Running, list[StandIn]]) -> None:
    coordinator, ollamas = fleet
    assert (await _run(coordinator, "models", "load", "llama3.2")).exit_code == 0
    assert ollamas[0].loaded == ["llama3.2:latest"]
    shown = await _run(coordinator, "ps")
    assert "llama3.2:latest" in shown.output
    assert "first" in shown.output
    assert "gguf" in (await _run(coordinator, "models", "show", "llama3.2")).output
    assert (await _run(coordinator, "models", "unload", "llama3.2")).exit_code == 0
    assert ollamas[0].loaded == []


@pytest.mark.spec("SURFACE-29")
async def test_each_command_answers_in_json_also_where_it_fails(
    fleet: tuple[Running, list[StandIn]],
) -> None:
    coordinator, ollamas = fleet

    async def answer(*arguments: str, code: int = 0) -> Any:
        done = await _run(coordinator, *arguments, "--json")
        assert done.exit_code == code, done.output
        return json.loads(done.stdout)

    pulled = await answer("models", "pull", "tiny", "--replicas", "2")
    assert [target["state"] for target in pulled["targets"]] == ["done", "done"]
    assert (await answer("models", "cp", "tiny", "mine"))["state"] == "done"
    assert (await answer("models", "load", "tiny"))["kind"] == "load"
    (row,) = await answer("ps")
    assert (row["name"], len(row["agents"])) == ("tiny:latest", 1)
    assert (await answer("models", "show", "tiny"))["models"][0]["name"] == "tiny:latest"
    assert (await answer("models", "unload", "tiny"))["state"] == "done"
    assert (await answer("models", "rm", "tiny"))["kind"] == "delete"
    assert {row["name"] for row in await answer("models", "list")} == {
        "llama3.2:latest", "mine:latest",
    }  # fmt: skip
    for ollama in ollamas:
        ollama.faults.error_line("no space left on device", after=1, paths=["/api/pull"])
    failed = await answer("models", "pull", "tiny", code=1)
    assert {target["state"] for target in failed["targets"]} == {"failed"}
    assert "error" in await answer("models", "show", "nothing", code=1)


@pytest.mark.spec("SURFACE-29")
async def test_show_tells_who_has_a_model_and_has_it_in_memory() -> None:
    async with (
        running() as coordinator,
        StandIn([Model("m", digest="a" * 64)]) as one,
        StandIn([Model("m", digest="a" * 64)]) as two,
        StandIn([Model("m", digest="b" * 64, system="Answer in verse.")]) as stranger,
        StandIn() as none,
    ):
        for name, ollama in (("one", one), ("two", two), ("[odd]", stranger), ("none", none)):
            await coordinator.register(ollama, name)
        await coordinator.chat("m")
        loaded_on = "one" if one.loaded else "two"
        shown = await _run(coordinator, "models", "show", "M:latest")
    assert shown.exit_code == 0, shown.output
    lines = [line.strip().split(maxsplit=2) for line in shown.output.splitlines()]
    listed = lines[lines.index(["AGENT", "IN", "MEMORY"]) + 1 :]
    assert sorted(listed) == sorted(
        [
            ["[odd]", "no", "other content, gets no requests"],
            *([name, "yes" if name == loaded_on else "no"] for name in ("one", "two")),
        ]
    )


@pytest.mark.spec("SURFACE-29")
async def test_errors_are_one_sentence(fleet: tuple[Running, list[StandIn]]) -> None:
    coordinator, _ = fleet
    for arguments in (
        ("models", "pull", "nope"),
        ("models", "rm", "nope"),
        ("models", "show", "nope"),
        ("models", "pull", "tiny", "--on", "some"),
    ):
        failed = await _run(coordinator, *arguments)
        assert failed.exit_code == 1, arguments
        assert failed.stderr.startswith("Error: ")
        assert len(failed.stderr.splitlines()) == 1
    nobody = await _run("http://127.0.0.1:1", "ps")
    assert nobody.exit_code == 1
    assert "COORDINATOR_URL" in nobody.stderr


@pytest.mark.spec("SURFACE-29")
async def test_a_detached_pull_is_not_waited_for(fleet: tuple[Running, list[StandIn]]) -> None:
    coordinator, ollamas = fleet
    ollamas[0].faults.stall(after=1, paths=["/api/pull"])
    started = await _run(coordinator, "models", "pull", "tiny", "--on", "agents:first", "--detach")
    assert started.exit_code == 0
    await ollamas[0].seen.wait_for(lambda seen: seen.faulted == 1)
    ollamas[0].faults.clear()
    await coordinator.until(lambda: "tiny:latest" in names(ollamas[0]))
