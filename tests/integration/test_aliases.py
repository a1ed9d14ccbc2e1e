"""Names that stand for models: lists, dialects, fallbacks, keys, and what refuses one."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import zstandard
from typer.testing import CliRunner, Result

from ollama_coordinator.api.inference.audio import read_form, renamed_form
from ollama_coordinator.main import app
from support.coordinator import Running, running
from support.databases import Space
from support.ollama import Model, StandIn

MODEL = "x-ollama-coordinator-model"
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture
async def two() -> AsyncIterator[tuple[Running, StandIn, StandIn]]:
    """A machine with `large` and one with `small`."""
    async with (
        running() as coordinator,
        StandIn([Model("large")]) as large,
        StandIn([Model("small")]) as small,
    ):
        await coordinator.register(large, "one")
        await coordinator.register(small, "two")
        yield coordinator, large, small


async def alias(coordinator: Running, name: str, *models: str, **more: Any) -> dict[str, Any]:
    status, body = await coordinator.post("/api/aliases", {"name": name, "models": models, **more})
    assert status == 200, body
    assert isinstance(body, dict)
    return body


async def chat(
    coordinator: Running, model: str, **headers: str
) -> tuple[int, dict[str, Any], str | None]:
    body = {"model": model, "messages": MESSAGES, "stream": False}
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    async with coordinator.session.post(
        f"{coordinator.url}/api/chat", json=body, headers=sent
    ) as answer:
        return answer.status, await answer.json(), answer.headers.get(MODEL)


def form(model: str) -> aiohttp.FormData:
    data = aiohttp.FormData()
    data.add_field("file", b"RIFF" * 2000, filename="a.wav")
    data.add_field("model", model)
    return data


# ── lists and dialects ────────────────────────────────────────────────────────────────────────


@pytest.mark.spec("SURFACE-60")
async def test_an_alias_is_listed_and_shown_like_a_model(
    two: tuple[Running, StandIn, StandIn],
) -> None:
    coordinator, _, _ = two
    assert (await alias(coordinator, "gpt-4o", "large"))["resolved"] == ["large"]
    await alias(coordinator, "lost", "absent")
    rows = {row["name"]: row for row in (await coordinator.get("/api/tags"))["models"]}
    assert sorted(rows) == ["gpt-4o:latest", "large:latest", "small:latest"]
    assert rows["gpt-4o:latest"]["alias_of"] == ["large"]
    assert rows["gpt-4o:latest"]["digest"] == rows["large:latest"]["digest"]
    ids = [row["id"] for row in (await coordinator.get("/v1/models"))["data"]]
    assert sorted(ids) == sorted(rows)
    assert (await coordinator.get("/v1/models/gpt-4o"))["id"] == "gpt-4o"
    shown = await coordinator.post("/api/show", {"model": "gpt-4o"})
    assert shown[0] == 200
    assert shown == await coordinator.post("/api/show", {"model": "large"})
    assert (await coordinator.post("/api/show", {"model": "lost"}))[0] == 404
    async with coordinator.session.delete(f"{coordinator.url}/api/aliases/gpt-4o") as answer:
        assert answer.status == 204
    names = [row["name"] for row in (await coordinator.get("/api/tags"))["models"]]
    assert "gpt-4o:latest" not in names
    assert (await chat(coordinator, "gpt-4o"))[0] == 404


BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/api/chat", {"messages": MESSAGES, "stream": False}),
    ("/api/generate", {"prompt": "hello", "stream": False}),
    ("/api/embed", {"input": "hello"}),
    ("/api/embeddings", {"prompt": "hello"}),
    ("/v1/chat/completions", {"messages": MESSAGES}),
    ("/v1/completions", {"prompt": "hello"}),
    ("/v1/embeddings", {"input": "hello"}),
    ("/v1/responses", {"input": "hello"}),
    ("/v1/messages", {"messages": MESSAGES, "max_tokens": 9}),
]


@pytest.mark.spec("SURFACE-61")
@pytest.mark.parametrize(("path", "body"), BODIES, ids=[path for path, _ in BODIES])
async def test_every_dialect_takes_an_alias_and_tells_what_served(
    two: tuple[Running, StandIn, StandIn], path: str, body: dict[str, Any]
) -> None:
    coordinator, large, _ = two
    await alias(coordinator, "gpt-4o", "large")
    text = json.dumps({"Model": "gpt-4o", "unknown": 1, **body})
    async with coordinator.session.post(coordinator.url + path, data=text) as answer:
        told = await answer.json()
        assert answer.status == 200, told
        assert answer.headers[MODEL] == "large"
    assert json.loads(large.seen.of(path)[-1].body) == json.loads(text) | {"Model": "large"}
    if "model" in told:
        assert told["model"] == "large"
    (row,) = (await coordinator.get("/api/history"))["requests"]
    assert (row["model"], row["alias"]) == ("large:latest", "gpt-4o")


@pytest.mark.spec("SURFACE-61")
async def test_a_form_and_a_compressed_body_take_an_alias(
    two: tuple[Running, StandIn, StandIn],
) -> None:
    coordinator, large, _ = two
    await alias(coordinator, "whisper-1", "large")
    url = f"{coordinator.url}/v1/audio/transcriptions"
    async with coordinator.session.post(url, data=form("whisper-1")) as answer:
        assert answer.status == 200, await answer.text()
    assert large.seen.count("/v1/audio/transcriptions") == 1
    body = zstandard.compress(json.dumps({"model": "whisper-1", "messages": MESSAGES}).encode())
    async with coordinator.session.post(
        f"{coordinator.url}/v1/chat/completions", data=body, headers={"Content-Encoding": "zstd"}
    ) as answer:
        assert answer.status == 200, await answer.text()


@pytest.mark.spec("SURFACE-61")
@pytest.mark.parametrize("filler", range(4070, 4110, 3))
async def test_a_name_is_replaced_wherever_it_stands_in_a_form(filler: int) -> None:
    """The form is read in pieces of 4096 bytes."""
    head = b'--x\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n'
    before = head % (b"file", b'; filename="a"') + b"R" * (filler - 150) + b"\r\n"
    body = before + head % (b"model", b"") + b"whisper-1\r\n--x--\r\n"
    kind = "multipart/form-data; boundary=x"
    assert (await read_form(kind, body)).name == "whisper-1"
    assert await renamed_form(kind, body, "large") == body.replace(b"whisper-1", b"large")


# ── which of several ──────────────────────────────────────────────────────────────────────────


@pytest.mark.spec("SURFACE-62")
async def test_the_next_model_serves_where_the_first_cannot(
    two: tuple[Running, StandIn, StandIn],
) -> None:
    coordinator, large, _ = two
    await alias(coordinator, "fast", "absent", "large", "small")
    assert (await chat(coordinator, "fast"))[2] == "large"
    with large.faults.status(500, "boom"):
        status, _, model = await chat(coordinator, "fast")
        assert (status, model) == (200, "small")
    await large.kill()
    status, answer, model = await chat(coordinator, "fast")
    assert (status, model, answer["model"]) == (200, "small", "small")
    rows = (await coordinator.get("/api/history"))["requests"]
    assert [(row["model"], row["alias"]) for row in rows] == [
        ("small:latest", "fast"), ("small:latest", "fast"), ("large:latest", "fast"),
    ]  # fmt: skip
    assert coordinator.at_rest()


@pytest.mark.spec("SURFACE-62")
async def test_what_is_the_requests_own_fault_goes_to_no_other_model(
    two: tuple[Running, StandIn, StandIn],
) -> None:
    coordinator, large, small = two
    await alias(coordinator, "fast", "large", "small")
    with large.faults.status(400, "invalid options"):
        assert (await chat(coordinator, "fast"))[0] == 400
    assert small.seen.count("/api/chat") == 0


@pytest.mark.spec("SURFACE-62")
@pytest.mark.parametrize("wait", [0.0, None])
async def test_a_busy_model_is_waited_for_as_long_as_the_alias_says(
    two: tuple[Running, StandIn, StandIn], wait: float | None
) -> None:
    coordinator, large, small = two
    await alias(coordinator, "fast", "large", "small", wait_seconds=wait)
    agent_id = next(
        row["id"] for row in await coordinator.get("/api/agents") if row["machine_name"] == "one"
    )
    await coordinator.heartbeat(agent_id, runner={"num_parallel": 1})
    large.hold()
    first = asyncio.create_task(chat(coordinator, "large"))
    await large.seen.wait_for(lambda seen: seen.held == 1)
    second = asyncio.create_task(chat(coordinator, "fast"))
    if wait is None:
        waiting = coordinator.parts.scheduler.waiting_count
        await coordinator.until(lambda: waiting() == 1)
        large.release()
        assert (await second)[2] == "large"
        assert small.seen.count("/api/chat") == 0
    else:
        assert (await second)[2] == "small"
        large.release()
    assert (await first)[0] == 200


@pytest.mark.spec("SURFACE-62")
async def test_an_alias_of_nothing_is_unknown_and_says_what_it_stands_for(
    two: tuple[Running, StandIn, StandIn],
) -> None:
    coordinator, _, _ = two
    await alias(coordinator, "lost", "absent", "gone")
    status, answer, _ = await chat(coordinator, "lost")
    assert status == 404
    assert answer["error"] == (
        "model 'lost' not found: it is an alias of absent, gone, which no agent has"
    )


# ── what an alias cannot be ───────────────────────────────────────────────────────────────────


@pytest.mark.spec("SURFACE-63")
@pytest.mark.parametrize(
    ("wanted", "status", "words"),
    [
        ({"name": "a", "models": ["a"]}, 400, "lead to itself: a:latest → a:latest"),
        ({"name": "a", "models": ["b"]}, 400, "a:latest → b:latest → a:latest"),
        ({"name": "large", "models": ["small"]}, 409, "on one"),
        ({"name": "a", "models": []}, 400, "from 1"),
        ({"name": "a b", "models": ["large"]}, 400, "name"),
        ({"name": "a", "models": ["large"], "wait_seconds": -1}, 400, "wait_seconds"),
        ({"name": "a", "models": ["large"], "wait": 1}, 400, "wait"),
    ],
)
async def test_what_cannot_work_is_refused_with_a_sentence(
    two: tuple[Running, StandIn, StandIn], wanted: dict[str, Any], status: int, words: str
) -> None:
    coordinator, _, _ = two
    await alias(coordinator, "b", "A:latest", "large")
    answered, body = await coordinator.post("/api/aliases", wanted)
    assert answered == status, body
    assert words in body["error"]


@pytest.mark.spec("SURFACE-63")
async def test_a_model_goes_before_an_alias_of_its_name_and_somebody_is_told() -> None:
    async with running() as coordinator, StandIn([Model("large")]) as one:
        await coordinator.register(one, "one")
        await alias(coordinator, "fast", "large")
        async with StandIn([Model("fast")]) as two:
            await coordinator.register(two, "two")
            assert (await chat(coordinator, "fast"))[2] is None
            tags = (await coordinator.get("/api/tags"))["models"]
            assert sorted(row["name"] for row in tags) == ["fast:latest", "large:latest"]
            (shown,) = (await coordinator.get("/api/aliases"))["aliases"]
            assert shown["hidden_by"] == ["two"]
            coordinator.parts.attention.look(coordinator.parts.clock.now())
            concerns = (await coordinator.get("/api/attention"))["attention"]
            assert any(one["concern"]["kind"] == "alias" for one in concerns)


@pytest.mark.spec("SURFACE-63")
async def test_a_keys_models_are_the_real_ones() -> None:
    async with (
        running(trusted_proxies=("127.0.0.1",)) as coordinator,
        StandIn([Model("large"), Model("small")]) as one,
    ):
        await coordinator.register(one, "one")
        await alias(coordinator, "fast", "large", "small")
        await alias(coordinator, "big", "large")
        _, made = await coordinator.post("/api/keys", {"name": "anna", "models": ["small*"]})
        sent = {"Authorization": f"Bearer {made['key']}", "X_Forwarded_For": "192.168.1.7"}
        status, _, model = await chat(coordinator, "fast", **sent)
        assert (status, model) == (200, "small")
        assert (await chat(coordinator, "big", **sent))[0] == 403
        headers = {name.replace("_", "-"): value for name, value in sent.items()}
        url = f"{coordinator.url}/api/tags"
        async with coordinator.session.get(url, headers=headers) as answer:
            listed = [row["name"] for row in (await answer.json())["models"]]
        assert sorted(listed) == ["fast:latest", "small:latest"]


@pytest.mark.spec("SURFACE-63")
async def test_aliases_survive_a_restart(database: Space) -> None:
    async with running(database_url=database.url) as coordinator:
        made = await alias(coordinator, "fast", "large", "small", wait_seconds=5)
    async with running(database_url=database.url) as coordinator:
        assert (await coordinator.get("/api/aliases"))["aliases"] == [made]


# ── from a terminal ───────────────────────────────────────────────────────────────────────────


@pytest.mark.spec("SURFACE-64")
async def test_aliases_are_set_listed_and_deleted_from_a_terminal(
    two: tuple[Running, StandIn, StandIn],
) -> None:
    coordinator, _, _ = two

    async def run(*arguments: str) -> Result:
        environment = {"COORDINATOR_URL": coordinator.url, "DATABASE_URL": "sqlite://:memory:"}
        runner = CliRunner(env={**environment, "COLUMNS": "80"})
        return await asyncio.to_thread(runner.invoke, app, ["models", "alias", *arguments])

    assert (await run("fast", "large", "small", "--wait", "5")).exit_code == 0
    listed = await run()
    assert "fast" in listed.output
    assert "large, small" in listed.output
    assert json.loads((await run("--json")).output)[0]["wait_seconds"] == 5
    assert (await chat(coordinator, "fast"))[2] == "large"
    assert (await run("fast", "--rm")).exit_code == 0
    assert "No alias" in (await run()).output
    gone = await run("fast", "--rm")
    assert gone.exit_code == 1
    assert "there is no alias 'fast'" in gone.output
    assert (await run("fast")).exit_code == 1
