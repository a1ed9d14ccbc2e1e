"""What an operator does from a terminal: agents, requests, history, settings."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from ollama_coordinator.main import app
from support.coordinator import Running
from support.ollama import StandIn


async def run(coordinator: Running, *arguments: str, width: int = 80) -> tuple[int, str]:
    """The exit code and all output of a command, in a terminal of 80 columns."""
    runner = CliRunner(env={"COORDINATOR_URL": coordinator.url, "COLUMNS": str(width)})
    done = await asyncio.to_thread(runner.invoke, app, list(arguments))
    return done.exit_code, done.output


async def answer(coordinator: Running, *arguments: str) -> Any:
    code, output = await run(coordinator, *arguments, "--json")
    assert code == 0, output
    return json.loads(output)


def widest(output: str) -> int:
    return max(map(len, output.splitlines()))


@pytest.mark.spec("OPERATION-45")
async def test_agents_are_listed_shown_and_changed(coordinator: Running) -> None:
    async with StandIn() as one, StandIn() as two:
        agent_id = await coordinator.register(one, "gpu-1")
        await coordinator.register(two, "a-machine-with-a-long-name")
        for listed in (("agents",), ("agents", "list")):
            code, output = await run(coordinator, *listed)
            assert code == 0
            assert "gpu-1" in output
            assert widest(output) <= 80
        assert agent_id in (await run(coordinator, "agents", width=200))[1]
        assert {row["machine_name"] for row in await answer(coordinator, "agents", "list")} == {
            "gpu-1", "a-machine-with-a-long-name",
        }  # fmt: skip
        assert await run(coordinator, "agents", "drain", "gpu-1") == (0, "gpu-1: draining\n")
        assert await run(coordinator, "agents", "resume", agent_id) == (0, "gpu-1: online\n")
        for command in (
            ("label", "gpu-1", "fast", "new"),
            ("rename", "gpu-1", "quick"),
            ("prefer", "quick", "2", "--backup", "5"),
        ):
            assert (await run(coordinator, "agents", *command))[0] == 0
        settings = coordinator.agent(agent_id).settings
        assert (settings.labels, settings.display_name) == (["fast", "new"], "quick")
        assert (settings.preference, settings.backup_seconds) == (2.0, 5.0)
        gpu = {"name": "X", "memory_used_bytes": 3_200_000_000, "temperature_celsius": 61}
        readings = {"cpu_usage": 37.1911, "memory_total_bytes": 2**36, "gpus": [gpu, gpu]}
        assert await coordinator.heartbeat(agent_id, **readings) == 200
        code, output = await run(coordinator, "agents", "show", "quick")
        assert "fast, new" in output
        units = ("37.2 %", "68.7 GB", "memory_used_bytes 3.2 GB", "61.0 °C")
        assert [one for one in units if one not in " ".join(output.split())] == []
        assert widest(output) <= 80
        assert (await answer(coordinator, "agents", "show", "quick"))["id"] == agent_id
        assert (await run(coordinator, "agents", "label", "quick"))[0] == 0
        assert coordinator.agent(agent_id).settings.labels == []
        assert await run(coordinator, "agents", "rm", "quick") == (0, "removed quick\n")
        assert len(await answer(coordinator, "agents")) == 1


@pytest.mark.spec("OPERATION-45")
async def test_a_name_that_is_nobodys_or_several_agents_says_so(coordinator: Running) -> None:
    async with StandIn() as one, StandIn() as two:
        ids = [await coordinator.register(node) for node in (one, two)]
        for agent_id in ids:
            await run(coordinator, "agents", "rename", agent_id, "same")
        code, output = await run(coordinator, "agents", "drain", "same")
        assert code == 1
        assert all(agent_id in output for agent_id in ids)
        whole = [f"same (127.0.0.1:{node.port})" for node in (one, two)]
        code, output = await run(coordinator, "agents", "drain", "nobody")
        assert (code, f"there are: {', '.join(sorted(whole))}" in output) == (1, True)
        assert await run(coordinator, "agents", "drain", whole[1]) == (0, f"{whole[1]}: draining\n")
        assert [row["name"] for row in await answer(coordinator, "agents")] == sorted(whole)
        assert [coordinator.agent(one).settings.draining for one in ids] == [False, True]


@pytest.mark.spec("OPERATION-45")
async def test_an_ollama_without_agent_is_added(coordinator: Running) -> None:
    async with StandIn() as ollama:
        address = f"127.0.0.1:{ollama.port}"
        code, output = await run(coordinator, "agents", "add", address, "--name", "bare")
        assert (code, output) == (0, "registered: bare, online\n")
        assert (await coordinator.chat())[0] == 200
        assert (await run(coordinator, "agents", "add", "gpu:x"))[0] == 1


@pytest.mark.spec("OPERATION-45")
async def test_requests_are_listed_explained_and_cancelled(coordinator: Running) -> None:
    async with StandIn() as ollama:
        await coordinator.register(ollama, "gpu-1")
        assert await run(coordinator, "requests", "list") == (
            0, "Nothing runs and nothing waits.\n",
        )  # fmt: skip
        assert (await coordinator.chat())[0] == 200
        ollama.hold()
        chat = asyncio.create_task(coordinator.chat())
        await ollama.seen.wait_for(lambda seen: seen.active == 1)
        (row,) = await answer(coordinator, "requests", "list")
        code, output = await run(coordinator, "requests", "list")
        assert row["id"] in output
        assert widest(output) <= 80
        code, output = await run(coordinator, "requests", "why", row["id"])
        assert code == 0
        assert "1. gpu-1: in progress" in output
        assert "chosen" in output
        assert widest(output) <= 80
        assert await run(coordinator, "requests", "cancel", row["id"]) == (
            0, f"cancelled {row['id']}\n",
        )  # fmt: skip
        assert (await chat)[0] == 499
        ollama.release()
        code, output = await run(coordinator, "requests", "why", row["id"])
        assert "1. gpu-1: cancelled: cancelled by the operator" in " ".join(output.split())
        assert (await run(coordinator, "requests", "cancel", row["id"]))[0] == 1


@pytest.mark.spec("OPERATION-45")
async def test_the_history_is_filtered_and_fits(coordinator: Running) -> None:
    async with StandIn() as ollama:
        await coordinator.register(ollama, "gpu-1")
        await coordinator.chat()
        await coordinator.chat("unknown")
        code, output = await run(coordinator, "history")
        assert code == 0
        assert "refused 404" in output
        assert widest(output) <= 80
        assert [row["status"] for row in await answer(coordinator, "history")] == [
            "refused", "served",
        ]  # fmt: skip
        served = await answer(coordinator, "history", "--status", "served", "--agent", "gpu-1")
        assert [row["model"] for row in served] == ["llama3.2:latest"]
        assert (await run(coordinator, "history", "--status", "lost"))[0] == 1


@pytest.mark.spec("OPERATION-45")
async def test_settings_are_read_and_set(coordinator: Running) -> None:
    code, output = await run(coordinator, "settings", "get")
    assert code == 0
    assert widest(output) <= 80
    assert ["larger_context", "true"] in [line.split()[:2] for line in output.splitlines()]
    assert await run(coordinator, "settings", "get", "max_queue") == (0, "512\n")
    for arguments, shown in (
        (("COORDINATOR_MAX_QUEUE", "7"), "max_queue = 7\n"),
        (("larger_context", "false"), "larger_context = false\n"),
        (("pull_placement", "2"), "pull_placement = 2\n"),
        (("max_queue",), "max_queue = 512\n"),
    ):
        assert await run(coordinator, "settings", "set", *arguments) == (0, shown)
    assert (await answer(coordinator, "settings", "get", "larger_context"))["value"] is False
    for wrong in (("max_queue", "1.5"), ("max_queue", "many"), ("policy", "random"), ("no", "1")):
        assert (await run(coordinator, "settings", "set", *wrong))[0] == 1


@pytest.mark.spec("OPERATION-45")
async def test_each_row_is_one_line_where_nobody_looks(coordinator: Running) -> None:
    async with StandIn() as ollama:
        await coordinator.register(ollama, "a-machine-with-a-name-of-some-length")
        runner = CliRunner(env={"COORDINATOR_URL": coordinator.url, "COLUMNS": None})
        done = await asyncio.to_thread(runner.invoke, app, ["agents"])
        assert len(done.stdout.splitlines()) == 2
        assert "127.0.0.1" in done.stdout


@pytest.mark.spec("OPERATION-45")
async def test_every_command_that_changes_something_answers_in_json(coordinator: Running) -> None:
    async with StandIn() as ollama:
        agent_id = await coordinator.register(ollama, "gpu-1")
        for command, expected in (
            (("drain", "gpu-1"), {"status": "draining"}),
            (("resume", "gpu-1"), {"status": "online"}),
            (("label", "gpu-1", "a"), {"labels": ["a"]}),
            (("rename", "gpu-1", "quick"), {"display_name": "quick"}),
            (("prefer", "quick", "2"), {"id": agent_id}),
            (("add", f"127.0.0.1:{ollama.port}"), {"id": agent_id}),
            (("rm", agent_id), {"removed": agent_id}),
        ):
            row = await answer(coordinator, "agents", *command)
            assert {name: row[name] for name in expected} == expected
        changed = await answer(coordinator, "settings", "set", "max_queue", "7")
        assert (changed["name"], changed["value"]) == ("max_queue", 7)
        runner = CliRunner(env={"COORDINATOR_URL": coordinator.url})
        gone = ["agents", "show", "nobody", "--json"]
        done = await asyncio.to_thread(runner.invoke, app, gone)
        assert (done.exit_code, list(json.loads(done.stdout))) == (1, ["error"])


@pytest.mark.spec("OPERATION-45")
async def test_keys_tokens_aliases_and_replays_answer_in_json(coordinator: Running) -> None:
    async with StandIn() as ollama:
        await coordinator.register(ollama)
        assert (await answer(coordinator, "keys", "create", "anna"))["key"].startswith("oc_")
        assert (await answer(coordinator, "keys", "show", "anna"))["rights"] == ["use"]
        assert [key["name"] for key in await answer(coordinator, "keys", "list")] == ["anna"]
        assert (await answer(coordinator, "keys", "revoke", "anna"))["revoked_at"]
        made = await answer(coordinator, "join-token", "create", "rack")
        assert made["join_token"].startswith("oc1.")
        assert [one["name"] for one in await answer(coordinator, "join-token", "list")] == ["rack"]
        assert (await answer(coordinator, "join-token", "revoke", "rack"))["revoked_at"]
        assert await answer(coordinator, "join-request", "list") == {"join_requests": []}
        alias = await answer(coordinator, "models", "alias", "fast", "llama3.2")
        assert alias["resolved"] == ["llama3.2"]
        removed = await answer(coordinator, "models", "alias", "fast", "--rm")
        assert removed == {"deleted": "fast"}
        assert (await coordinator.chat())[0] == 200
        await coordinator.until(coordinator.at_rest)
        played = await answer(coordinator, "replay", "--policy", "predicted")
        assert played["requests"] == played["policies"]["predicted"]["requests"] == 1
        for failing in (
            ("keys", "show", "nobody"), ("models", "alias", "fast", "--rm"),
            ("join-request", "admit", "nobody"), ("replay", "--add", "nobody"),
        ):  # fmt: skip
            code, output = await run(coordinator, *failing, "--json")
            assert (code, list(json.loads(output.splitlines()[0]))) == (1, ["error"])


def commands(found: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command by its whole name."""
    for name, command in getattr(found, "commands", {}).items():
        yield from commands(command, (*path, name))
    if not hasattr(found, "commands"):
        yield " ".join(path), found


@pytest.mark.spec("OPERATION-45")
def test_every_command_has_json_but_those_that_serve_or_print_a_file() -> None:
    found = commands(get_command(app))
    options = {name: {o for p in one.params for o in p.opts} for name, one in found}
    without = {name for name, given in options.items() if "--json" not in given}
    services = {f"service {what}" for what in ("install", "status", "uninstall")}
    assert without == {"serve", "top", "grafana", "alerts"} | services


@pytest.mark.spec("OPERATION-45")
async def test_a_decision_fits_into_80_columns_with_long_names_and_reasons(
    coordinator: Running,
) -> None:
    async with StandIn() as one, StandIn() as two:
        await coordinator.register(one, "gpu-1")
        await coordinator.register(two, "a-workstation-in-the-cellar.example.lan")
        await coordinator.register(two, "away", ollama_port=9)
        code, output = await run(coordinator, "explain", "llama3.2", "hello")
        assert code == 0
        assert widest(output) <= 80
        rows = output.splitlines()
        assert rows[0].split()[:3] == ["AGENT", "WOULD", "COST"]
        assert any(row.startswith("gpu-1 ") for row in rows)
        assert any(row.startswith("a-workstation-in-the-cell") for row in rows)
