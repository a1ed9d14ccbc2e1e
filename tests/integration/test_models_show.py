"""What a model is, asked of the fleet; and unloading it everywhere."""

from contextlib import AsyncExitStack

import aiohttp
import pytest

from ollama_coordinator.api.inference import unload
from support.coordinator import Running
from support.ollama import Model, StandIn


@pytest.mark.spec("SURFACE-4")
async def test_show_is_remembered_while_the_content_is_the_same(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    first = await coordinator.post("/api/show", {"model": "llama3.2"})
    assert first == await coordinator.post("/api/show", {"model": "llama3.2"})
    assert ollama.seen.count("/api/show") + spare.seen.count("/api/show") == 1
    _, verbose = await coordinator.post("/api/show", {"model": "llama3.2", "verbose": True})
    assert "tensors" in verbose
    for each in (ollama, spare):
        each.models.add(Model("llama3.2", digest="c" * 64, system="be kind"))
    await coordinator.parts.monitor.refresh(coordinator.parts.registry, older_than=-1, seconds=2)
    _, changed = await coordinator.post("/api/show", {"model": "llama3.2"})
    assert changed["system"] == "be kind"


@pytest.mark.spec("SURFACE-4")
async def test_show_passes_over_an_agent_that_does_not_answer(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    ollama.faults.fin(paths=["/api/show"])
    spare.faults.fin(paths=["/api/show"], times=2)  # on the kept connection, and on a new one
    assert (await coordinator.post("/api/show", {"model": "llama3.2"}))[0] == 503
    assert (await coordinator.post("/api/show", {"model": "llama3.2"}))[0] == 200


@pytest.mark.spec("SURFACE-4")
async def test_show_of_a_model_whose_holders_are_away_is_503_and_names_them(
    coordinator: Running, ollama: StandIn
) -> None:
    agent_id = next(agent.id for agent in coordinator.parts.registry)
    await coordinator.heartbeat(agent_id, leaving=True)
    status, body = await coordinator.post("/api/show", {"model": "llama3.2"})
    assert status == 503
    assert "first: offline" in body["error"]


@pytest.mark.spec("SURFACE-4")
async def test_show_of_a_model_that_left_its_agent_is_404(
    coordinator: Running, ollama: StandIn
) -> None:
    ollama.models.remove("llama3.2")
    status, body = await coordinator.post("/api/show", {"model": "llama3.2"})
    assert (status, body) == (404, {"error": "model 'llama3.2:latest' not found"})


@pytest.mark.spec("SURFACE-5")
@pytest.mark.parametrize(
    ("path", "field"), [("/api/generate", "response"), ("/api/chat", "message")]
)
@pytest.mark.parametrize("keep_alive", [0, "0s", "0", 0.0])
async def test_unloading_reaches_every_agent_and_is_answered_once(
    coordinator: Running,
    ollama: StandIn,
    spare: StandIn,
    path: str,
    field: str,
    keep_alive: object,
) -> None:
    for each in (ollama, spare):
        await coordinator.session.post(f"{each.url}/api/generate", json={"model": "llama3.2"})
    await coordinator.get("/api/ps")
    await coordinator.parts.monitor.refresh(coordinator.parts.registry, older_than=-1, seconds=2)
    status, body = await coordinator.post(path, {"model": "llama3.2", "keep_alive": keep_alive})
    assert (status, body["done_reason"], body["model"]) == (200, "unload", "llama3.2")
    assert field in body
    assert (ollama.loaded, spare.loaded) == ([], [])
    assert (await coordinator.get("/api/ps"))["models"] == []


@pytest.mark.spec("SURFACE-5")
async def test_unloading_goes_only_where_the_model_is_loaded(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    await coordinator.chat()
    loaded, idle = (ollama, spare) if ollama.loaded else (spare, ollama)
    await coordinator.post("/api/generate", {"model": "llama3.2", "keep_alive": 0})
    assert (loaded.seen.count("/api/generate"), idle.seen.count("/api/generate")) == (1, 0)
    assert coordinator.at_rest()


@pytest.mark.spec("SURFACE-5")
@pytest.mark.parametrize("trouble", ["in use", "refuses", "closed"])
async def test_who_still_has_a_model_in_memory_is_named(
    coordinator: Running,
    ollama: StandIn,
    spare: StandIn,
    trouble: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(unload, "UNLOADED_SECONDS", 0.5)
    for node in (ollama, spare):
        await node.load("llama3.2")
    await coordinator.parts.monitor.refresh(coordinator.parts.registry, older_than=-1, seconds=2)
    if trouble == "refuses":
        ollama.faults.status(500, "llama-server does not stop", paths=["/api/generate"])
    elif trouble == "closed":
        ollama.faults.fin(paths=["/api/generate"])
    else:
        ollama.hold(after=1)
    body = {"model": "llama3.2", "prompt": "x"}
    async with AsyncExitStack() as stack:
        if trouble == "in use":
            owner = await stack.enter_async_context(aiohttp.ClientSession())
            asked = owner.post(f"{ollama.url}/api/generate", json=body)
            response = await stack.enter_async_context(asked)
            await response.content.readline()
        stop = {"model": "llama3.2", "keep_alive": 0}
        status, answer = await coordinator.post("/api/generate", stop)
    assert status == 503
    assert "model 'llama3.2' is still in memory on first: " in answer["error"]
    assert "spare" not in answer["error"]
    assert spare.loaded == []
    ollama.release()


@pytest.mark.spec("SURFACE-5")
async def test_a_model_that_a_request_uses_goes_when_the_request_ends(
    coordinator: Running, ollama: StandIn
) -> None:
    ollama.hold(after=1)
    async with coordinator.stream() as response:
        await response.content.readline()
        status, answer = await coordinator.post(
            "/api/generate", {"model": "llama3.2", "keep_alive": 0}
        )
        assert (status, answer["done_reason"]) == (200, "unload")
        ollama.release()
        await response.read()
    await ollama.seen.wait_for(lambda _: not ollama.loaded)
