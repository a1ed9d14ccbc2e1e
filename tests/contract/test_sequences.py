"""The request sequences of the `ollama` command line, one Ollama and a fleet alike."""

import hashlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import pytest

from support.conformance import Aim, Endpoint, Reply
from support.coordinator import running
from support.ollama import Model, StandIn

CLI = {"User-Agent": "ollama/0.33.0 (amd64 linux) Go/go1.26", "Accept": "application/json"}
SCRATCH = "conformance-scratch"
REGISTRY = [Model("tiny", size_bytes=3_000_000)]


@pytest.fixture(params=["one Ollama", "a fleet"])
async def target(request: pytest.FixtureRequest, aim: Aim) -> AsyncIterator[Endpoint]:
    """A fresh endpoint of each sort; or the URL that the suite is aimed at, once."""
    alone = request.param == "one Ollama"
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        if aim.url is not None:
            if not alone:
                pytest.skip("aimed at a URL: there is nothing to compare it with")
            url = aim.url.rstrip("/")
        else:
            url = await stack.enter_async_context(_ollama() if alone else _fleet())
        yield Endpoint(url, aim, session)


@asynccontextmanager
async def _ollama() -> AsyncIterator[str]:
    async with StandIn(registry=REGISTRY) as ollama:
        yield ollama.url


@asynccontextmanager
async def _fleet() -> AsyncIterator[str]:
    async with (
        running() as coordinator,
        StandIn(registry=REGISTRY) as first,
        StandIn(registry=REGISTRY) as second,
    ):
        await coordinator.register(first, "first")
        await coordinator.register(second, "second")
        yield coordinator.url


async def _say(target: Endpoint, method: str, path: str, body: Any = None) -> Reply:
    reply = await target.say(method, path, body, headers=CLI)
    if method != "HEAD":
        return reply
    assert reply.status == 200
    return reply


def _with_tag(name: str) -> str:
    return name if ":" in name else f"{name}:latest"


async def _loaded(target: Endpoint) -> list[str]:
    """The digests of the model's rows in `ollama ps`."""
    listed = await _say(target, "GET", "/api/ps")
    wanted = _with_tag(target.aim.model)
    return [row["digest"] for row in listed.records[0]["models"] if row["name"] == wanted]


def _only_on_stand_ins(target: Endpoint) -> None:
    if target.aim.url is not None:
        pytest.skip("pulls, pushes and files are only tried on stand-ins")


@pytest.mark.spec("SURFACE-2")
async def test_run_with_a_prompt(target: Endpoint) -> None:
    await _say(target, "HEAD", "/")
    shown = await _say(target, "POST", "/api/show", {"model": "{model}"})
    assert shown.status == 200
    said = await _say(target, "POST", "/api/generate", {"model": "{model}", "prompt": "say"})
    assert said.records[-1]["done"] is True
    assert said.records[0]["model"] == target.aim.model


@pytest.mark.spec("SURFACE-2")
async def test_run_interactive_loads_first_and_keeps_alive(target: Endpoint) -> None:
    await _say(target, "HEAD", "/")
    loaded = await _say(
        target, "POST", "/api/generate", {"model": "{model}", "keep_alive": "10m", "prompt": ""}
    )
    assert loaded.records == [loaded.records[0]]
    assert loaded.records[0]["done_reason"] == "load"
    turns = [{"role": "user", "content": "hello"}]
    for _ in range(2):
        said = await _say(
            target,
            "POST",
            "/api/chat",
            {"model": "{model}", "messages": turns, "options": {"num_predict": 4}},
        )
        text = "".join(record["message"]["content"] for record in said.records)
        turns += [{"role": "assistant", "content": text}, {"role": "user", "content": "more"}]
    assert [len(digest) for digest in await _loaded(target)] == [64]


@pytest.mark.spec("SURFACE-2")
async def test_run_of_what_is_not_there_pulls_it(target: Endpoint) -> None:
    _only_on_stand_ins(target)
    missing = await _say(target, "POST", "/api/show", {"model": "tiny"})
    assert missing.status == 404
    pulled = await _say(target, "POST", "/api/pull", {"name": "tiny", "model": ""})
    states = [record["status"] for record in pulled.records]
    assert states[0] == "pulling manifest"
    assert [state for state in states if state == "success"] == [states[-1]]
    shown = await _say(target, "POST", "/api/show", {"model": "tiny"})
    assert shown.status == 200
    said = await _say(target, "POST", "/api/generate", {"model": "tiny", "prompt": "say"})
    assert said.status == 200


@pytest.mark.spec("SURFACE-2")
async def test_stop_unloads(target: Endpoint) -> None:
    await _say(target, "POST", "/api/generate", {"model": "{model}"})
    assert (await _say(target, "POST", "/api/show", {"model": "{model}"})).status == 200
    stopped = await _say(target, "POST", "/api/generate", {"model": "{model}", "keep_alive": 0})
    assert stopped.records[0]["done_reason"] == "unload"
    assert await _loaded(target) == []


@pytest.mark.spec("SURFACE-2")
async def test_cp_and_rm(target: Endpoint) -> None:
    ends = {"source": "{model}", "destination": SCRATCH}
    copied = await _say(target, "POST", "/api/copy", ends)
    assert (copied.status, copied.body) == (200, b"")
    listed = (await _say(target, "GET", "/api/tags")).records[0]["models"]
    digests = {row["name"]: row["digest"] for row in listed}
    assert digests[f"{SCRATCH}:latest"] == digests[_with_tag(target.aim.model)]
    assert (await _say(target, "POST", "/api/show", {"name": SCRATCH, "model": ""})).status == 200
    stop = {"model": SCRATCH, "keep_alive": 0}
    assert (await _say(target, "POST", "/api/generate", stop)).status == 200
    removed = await _say(target, "DELETE", "/api/delete", {"name": SCRATCH, "model": ""})
    assert (removed.status, removed.body) == (200, b"")
    again = await _say(target, "DELETE", "/api/delete", {"name": SCRATCH, "model": ""})
    assert again.status == 404


@pytest.mark.spec("SURFACE-2")
async def test_create_from_a_model(target: Endpoint) -> None:
    wanted = {"model": SCRATCH, "from": "{model}", "system": "be brief"}
    made = await _say(target, "POST", "/api/create", wanted)
    assert made.records[-1] == {"status": "success"}
    shown = await _say(target, "POST", "/api/show", {"model": SCRATCH})
    assert shown.records[0]["system"] == "be brief"
    assert (await _say(target, "DELETE", "/api/delete", {"model": SCRATCH})).status == 200


@pytest.mark.spec("SURFACE-2")
async def test_create_from_files(target: Endpoint) -> None:
    _only_on_stand_ins(target)
    blob = b"GGUF" * 100_000
    digest = f"sha256:{hashlib.sha256(blob).hexdigest()}"
    assert (await target.say("POST", f"/api/blobs/{digest}", blob)).status == 201
    assert (await target.say("POST", f"/api/blobs/{digest}", blob)).status == 200
    assert (await target.say("HEAD", f"/api/blobs/{digest}")).status == 200
    made = await _say(target, "POST", "/api/create", {"model": SCRATCH, "files": {"a": digest}})
    assert made.records[-1] == {"status": "success"}
    assert (await target.say("HEAD", f"/api/blobs/{digest}")).status == 200
    assert (await target.say("POST", f"/api/blobs/{digest}", blob)).status == 200
    again = {"model": f"{SCRATCH}-2", "files": {"a": digest}}
    assert (await _say(target, "POST", "/api/create", again)).records[-1] == {"status": "success"}
    said = await _say(target, "POST", "/api/generate", {"model": SCRATCH, "prompt": "say"})
    assert said.status == 200


@pytest.mark.spec("SURFACE-2")
async def test_push(target: Endpoint) -> None:
    _only_on_stand_ins(target)
    pushed = await _say(target, "POST", "/api/push", {"name": "{model}", "model": ""})
    states = [record["status"] for record in pushed.records]
    assert (states[0], states[-1]) == ("retrieving manifest", "success")
