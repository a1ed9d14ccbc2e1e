"""The request sequences of the `ollama` command line, one Ollama and a fleet alike."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import pytest

from support.conformance import Aim, Endpoint, Reply
from support.coordinator import running
from support.deadline import DEADLINE_SECONDS
from support.ollama import Model, StandIn

CLI = {"User-Agent": "ollama/0.33.0 (amd64 linux) Go/go1.26", "Accept": "application/json"}
SCRATCH = "conformance-scratch"
VERSION = "0.24.0"
MODELS = [Model("llama3.2"), Model("nomic-embed-text", capabilities=("embedding",))]
REGISTRY = [Model("tiny", size_bytes=3_000_000)]


@pytest.fixture(params=["one Ollama", "a fleet"])
async def target(request: pytest.FixtureRequest, aim: Aim) -> AsyncIterator[Endpoint]:
    """A fresh endpoint of each sort; or the URL that the suite is aimed at, once.

    A test marked `fleet_lacks(reason)` shows what a fleet does not do yet: there it must fail.
    """
    lacks = request.node.get_closest_marker("fleet_lacks")
    if lacks is not None and request.param == "a fleet":
        request.applymarker(pytest.mark.xfail(reason=lacks.args[0], strict=True))
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
    async with StandIn(MODELS, registry=REGISTRY, version=VERSION) as ollama:
        yield ollama.url


@asynccontextmanager
async def _fleet() -> AsyncIterator[str]:
    async with (
        running() as coordinator,
        StandIn(MODELS, registry=REGISTRY, version=VERSION) as first,
        StandIn(MODELS, registry=REGISTRY, version=VERSION) as second,
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


async def _rows(target: Endpoint) -> list[dict[str, Any]]:
    """The model's rows in `ollama ps`."""
    listed = await _say(target, "GET", "/api/ps")
    wanted = _with_tag(target.aim.model)
    return [row for row in listed.records[0]["models"] if row["name"] == wanted]


async def _gone(target: Endpoint) -> bool:
    """Whether the model leaves memory: Ollama answers an unload before the process has ended."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while await _rows(target):
            await asyncio.sleep(0.05)
    return True


async def _generate(target: Endpoint, **more: Any) -> Any:
    """The one object of an answer of one token."""
    options = {"num_predict": 1, **more.pop("options", {})}
    body = {"model": "{model}", "prompt": "say", "stream": False, "options": options, **more}
    return (await _say(target, "POST", "/api/generate", body)).records[0]


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
    assert [len(row["digest"]) for row in await _rows(target)] == [64]


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
    assert await _gone(target)
    assert (await _generate(target))["done"]


@pytest.mark.spec("SURFACE-2")
async def test_a_context_sticks_until_another_is_asked_for(target: Endpoint) -> None:
    """`ps` shows the context that a model was loaded with; who asks for the same shares it."""
    for asked, shown in ((512, 512), (512, 512), (1024, 1024)):
        await _generate(target, options={"num_ctx": asked})
        assert shown in [row["context_length"] for row in await _rows(target)]


@pytest.mark.spec("SURFACE-2")
async def test_keep_alive_sticks(target: Endpoint) -> None:
    await _generate(target, keep_alive=-1)
    await _generate(target)
    assert all(int(row["expires_at"][:4]) > 2200 for row in await _rows(target))
    await _generate(target, keep_alive="5m")


@pytest.mark.spec("SURFACE-2")
async def test_two_names_of_one_file_share_a_runner(target: Endpoint) -> None:
    ends = {"source": "{model}", "destination": SCRATCH}
    await _say(target, "POST", "/api/copy", ends)
    try:
        await _generate(target, options={"num_ctx": 512})
        both = await _generate(target, model=SCRATCH, options={"num_ctx": 512})
        assert both["model"] == SCRATCH
        await _say(target, "POST", "/api/generate", {"model": SCRATCH, "keep_alive": 0})
        assert await _gone(target)
    finally:
        await _say(target, "DELETE", "/api/delete", {"model": SCRATCH})


@pytest.mark.spec("SURFACE-2")
async def test_a_text_is_cut_to_the_context_that_was_asked_for(target: Endpoint) -> None:
    """Also where the model is in memory with a larger one: the vectors differ."""
    body = {"model": "{embeds}", "input": "word " * 300}
    counts = []
    for length in (512, 64):
        asked = {**body, "options": {"num_ctx": length}}
        answer = (await _say(target, "POST", "/api/embed", asked)).records[0]
        counts.append(answer["prompt_eval_count"])
    assert counts[0] > counts[1] <= 64


@pytest.mark.spec("SURFACE-52")
async def test_a_name_in_another_case_costs_nobody_the_model(target: Endpoint) -> None:
    """The older embedding route alone minds the case of a name."""
    asked = {"model": "{MODEL}", "prompt": "a"}
    assert (await target.say("POST", "/api/embeddings", asked)).status == 404
    said = await target.say("POST", "/api/generate", {"model": "{model}", "prompt": "say"})
    assert said.status == 200


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
