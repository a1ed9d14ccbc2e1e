"""Contexts: a larger one in memory serves a smaller request."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from support.coordinator import Running, running
from support.ollama import Model, StandIn

HEADER = "X-Ollama-Coordinator-Runner"
ASKED = [{"role": "user", "content": "hello"}]


async def _chat(coordinator: Running, **options: Any) -> str | None:
    body = {"model": "llama3.2", "messages": ASKED, "stream": False, "options": options}
    async with coordinator.session.post(f"{coordinator.url}/api/chat", json=body) as response:
        assert response.status == 200, await response.text()
        return response.headers.get(HEADER)


@pytest.mark.spec("SURFACE-14")
async def test_a_larger_context_in_memory_serves_a_smaller_request(
    coordinator: Running, ollama: StandIn
) -> None:
    assert await _chat(coordinator, num_ctx=8192) is None
    assert await _chat(coordinator, num_ctx=4096, seed=7) == "num_ctx=8192; wanted=4096"
    assert await _chat(coordinator, num_ctx=8192) is None
    assert (ollama.seen.loads, ollama.seen.reloads) == (1, 0)
    sent = json.loads(ollama.seen.of("/api/chat")[1].body)
    assert sent["options"] == {"num_ctx": 8192, "seed": 7}
    assert sent["messages"] == ASKED


@pytest.mark.spec("SURFACE-14")
async def test_the_record_of_the_request_tells_of_the_larger_context(
    coordinator: Running, ollama: StandIn
) -> None:
    await _chat(coordinator, num_ctx=8192)
    body = {"model": "llama3.2", "prompt": "x", "options": {"num_ctx": 512}, "stream": False}
    async with coordinator.session.post(f"{coordinator.url}/api/generate", json=body) as response:
        request_id = response.headers["X-Ollama-Coordinator-Request"]
    record = await coordinator.get(f"/api/requests/{request_id}")
    assert record["attempts"][0]["runner"] == "num_ctx=8192; wanted=512"


@pytest.mark.spec("SURFACE-14")
@pytest.mark.parametrize("wish", ["truncate", "shift", "Truncate"])
async def test_who_wants_an_error_for_what_does_not_fit_keeps_the_context(
    coordinator: Running, ollama: StandIn, wish: str
) -> None:
    await _chat(coordinator, num_ctx=8192)
    body = {"model": "llama3.2", "prompt": "x", "options": {"num_ctx": 512}, "stream": False}
    async with coordinator.session.post(
        f"{coordinator.url}/api/generate", json={**body, wish: False}
    ) as response:
        assert HEADER not in response.headers
    assert json.loads(ollama.seen.of("/api/generate")[0].body)["options"] == {"num_ctx": 512}


@pytest.mark.spec("SURFACE-14")
@pytest.mark.parametrize("path", ["/api/embed", "/api/embeddings"])
async def test_a_text_to_embed_is_cut_where_its_client_said(
    coordinator: Running, ollama: StandIn, path: str
) -> None:
    await _chat(coordinator, num_ctx=8192)
    body = {"model": "llama3.2", "prompt": "x", "input": "x", "options": {"num_ctx": 64}}
    async with coordinator.session.post(coordinator.url + path, json=body) as response:
        assert HEADER not in response.headers
    assert json.loads(ollama.seen.of(path)[0].body)["options"] == {"num_ctx": 64}


GIB = 2**30


async def _grows(coordinator: Running, vram_bytes: int) -> tuple[StandIn, list[str | None]]:
    """A conversation that asks for 200 tokens more each turn, on a machine of so much memory."""
    model = Model("llama3.2:latest", size_bytes=2 * GIB, kv_bytes_per_token=2**17)
    async with StandIn([model]) as ollama:
        agent = coordinator.agent(await coordinator.register(ollama))
        gpu = {"name": "gpu", "memory_total_bytes": vram_bytes}
        await coordinator.heartbeat(agent.id, gpus=[gpu], runner={"num_parallel": 1})
        notes = [await _chat(coordinator, num_ctx=4096)]
        await coordinator.parts.monitor.look_at(agent, seconds=60.0)
        notes += [await _chat(coordinator, num_ctx=4296 + 200 * turn) for turn in range(8)]
    return ollama, notes


@pytest.mark.spec("SURFACE-57")
async def test_a_context_that_grows_is_rounded_up_where_memory_allows() -> None:
    async with running() as coordinator:
        ollama, notes = await _grows(coordinator, 24 * GIB)
        assert ollama.seen.reloads == 1
        assert notes[:3] == [None, "num_ctx=8192; wanted=4296", "num_ctx=8192; wanted=4496"]


@pytest.mark.spec("SURFACE-57")
async def test_a_context_that_grows_stays_as_wanted_where_memory_does_not_allow_more() -> None:
    async with running() as coordinator:
        ollama, notes = await _grows(coordinator, 3 * GIB)
        assert notes == [None] * 9
        assert ollama.seen.reloads == 8


@pytest.mark.spec("SURFACE-57")
async def test_a_context_is_not_rounded_up_beyond_what_the_model_was_trained_with() -> None:
    model = Model("llama3.2:latest", context_length=5000)
    async with running() as coordinator, StandIn([model]) as ollama:
        agent = coordinator.agent(await coordinator.register(ollama))
        await coordinator.heartbeat(agent.id, gpus=[{"name": "g", "memory_total_bytes": 24 * GIB}])
        await _chat(coordinator, num_ctx=4096)
        await coordinator.parts.monitor.look_at(agent, seconds=60.0)
        assert await _chat(coordinator, num_ctx=4200) == "num_ctx=5000; wanted=4200"


@pytest.mark.spec("SURFACE-14")
async def test_a_larger_request_is_not_cut_to_what_is_loaded(
    coordinator: Running, ollama: StandIn
) -> None:
    await _chat(coordinator, num_ctx=2048)
    assert await _chat(coordinator, num_ctx=4096) is None
    assert ollama.seen.reloads == 1


@pytest.mark.spec("SURFACE-14")
async def test_where_something_else_forces_a_reload_the_context_is_the_clients(
    coordinator: Running, ollama: StandIn
) -> None:
    await _chat(coordinator, num_ctx=8192)
    assert await _chat(coordinator, num_ctx=4096, num_batch=64) is None
    assert json.loads(ollama.seen.last.body)["options"]["num_ctx"] == 4096


@pytest.mark.spec("SURFACE-14")
async def test_keep_alive_passes_with_the_changed_body(
    coordinator: Running, ollama: StandIn
) -> None:
    await _chat(coordinator, num_ctx=8192)
    body = {"model": "llama3.2", "prompt": "x", "options": {"num_ctx": 512}, "keep_alive": "1h"}
    await coordinator.post("/api/generate", {**body, "stream": False})
    assert json.loads(ollama.seen.last.body)["keep_alive"] == "1h"
    assert ollama.seen.reloads == 0


def _default_context(agent_id: str) -> dict[str, Any]:
    return {"agent_id": agent_id, "runner": {"context_length": 4096, "num_parallel": 1}}


@pytest.mark.spec("SURFACE-15")
async def test_without_num_ctx_the_agents_known_default_counts(coordinator: Running) -> None:
    async with StandIn(default_context=4096) as ollama:
        agent_id = await coordinator.register(ollama, "first")
        await coordinator.heartbeat(**_default_context(agent_id))
        await _chat(coordinator, num_ctx=8192)
        assert await _chat(coordinator) == "num_ctx=8192; wanted=default"
        assert ollama.seen.reloads == 0


@pytest.mark.spec("SURFACE-15")
async def test_without_num_ctx_and_an_unknown_default_the_body_stays(
    coordinator: Running, ollama: StandIn
) -> None:
    await _chat(coordinator, num_ctx=8192)
    assert await _chat(coordinator) is None


@pytest.mark.spec("SURFACE-15")
async def test_a_model_that_sets_a_context_itself_is_left_alone(coordinator: Running) -> None:
    model = Model("llama3.2", parameters={"num_ctx": 16384})
    async with StandIn([model], default_context=4096) as ollama:
        agent_id = await coordinator.register(ollama, "first")
        await coordinator.heartbeat(**_default_context(agent_id))
        await _chat(coordinator, num_ctx=8192)
        assert await _chat(coordinator) is None
        assert b"num_ctx" not in ollama.seen.of("/api/chat")[-1].body


@pytest.mark.spec("SURFACE-15")
async def test_the_setting_leaves_every_body_alone() -> None:
    async with running(larger_context=False) as coordinator, StandIn() as ollama:
        await coordinator.register(ollama, "first")
        await _chat(coordinator, num_ctx=8192)
        assert await _chat(coordinator, num_ctx=4096) is None
        assert ollama.seen.reloads == 1


@pytest.mark.spec("FLEET-16")
async def test_nobody_waits_for_an_agent_that_hangs_to_learn_of_a_context(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    await _chat(coordinator, num_ctx=8192)
    ollama.faults.hang(paths=["/api/show"])
    spare.faults.hang(paths=["/api/show"])
    async with asyncio.timeout(20):
        await _chat(coordinator)


@pytest.mark.spec("SURFACE-14")
async def test_a_larger_context_is_kept_where_another_agent_has_the_smaller(
    coordinator: Running,
) -> None:
    async with StandIn(default_context=4096) as one, StandIn(default_context=4096) as other:
        for name, ollama in (("one", one), ("other", other)):
            agent_id = await coordinator.register(ollama, name)
            await coordinator.heartbeat(**_default_context(agent_id))
        assert await _chat(coordinator, num_ctx=8192) is None
        (large,) = [ollama for ollama in (one, other) if ollama.seen.loads]
        small = other if large is one else one
        large.hold()
        busy = asyncio.create_task(_chat(coordinator, num_ctx=8192))
        await large.seen.wait_for(lambda seen: seen.held == 1)
        assert await _chat(coordinator, num_ctx=4096) is None
        assert small.seen.loads == 1
        large.release()
        await busy
        notes = await asyncio.gather(*(_chat(coordinator) for _ in range(8)))
        assert {*notes} == {None, "num_ctx=8192; wanted=default"}
        assert (large.seen.reloads, small.seen.reloads) == (0, 0)


@pytest.mark.spec("SURFACE-14")
async def test_what_is_raised_for_one_agent_is_as_wanted_for_the_next(
    coordinator: Running,
) -> None:
    async with StandIn(default_context=4096) as one, StandIn(default_context=4096) as other:
        for name, ollama in (("one", one), ("other", other)):
            await coordinator.register(ollama, name)
        assert await _chat(coordinator, num_ctx=8192) is None
        (large,) = [ollama for ollama in (one, other) if ollama.seen.loads]
        small = other if large is one else one
        large.faults.status(500, times=1, paths=["/api/chat"])
        body = {"model": "llama3.2", "stream": False, "options": {"num_ctx": 4096}}
        sent = json.dumps({**body, "messages": LONG}).encode()

        async def pieces() -> AsyncIterator[bytes]:  # what comes so is changed in place
            for at in range(0, len(sent), 16_384):
                yield sent[at : at + 16_384]
                await asyncio.sleep(0)

        url = f"{coordinator.url}/api/chat"
        async with coordinator.session.post(url, data=pieces()) as response:
            assert response.status == 200, await response.text()
            assert HEADER not in response.headers
        assert json.loads(large.seen.of("/api/chat")[-1].body)["options"] == {"num_ctx": 8192}
        assert small.seen.of("/api/chat")[-1].body == sent


LONG = [{"role": "user", "content": "word " * 20_000}]
"""Some 25,000 tokens."""


async def _long(coordinator: Running, path: str = "/api/chat", **more: Any) -> tuple[str, str]:
    """Which agent served a long prompt without `num_ctx`, and what the header says of contexts."""
    body = {"model": "llama3.2", "messages": LONG, "stream": False, **more}
    async with coordinator.session.post(coordinator.url + path, json=body) as response:
        assert response.status == 200, await response.text()
        headers = response.headers
        return headers["X-Ollama-Coordinator-Agent"], headers.get(HEADER, "")


@pytest.mark.spec("SURFACE-50")
@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
async def test_a_long_prompt_goes_where_it_fits(coordinator: Running, path: str) -> None:
    async with StandIn(default_context=4096) as small, StandIn(default_context=131_072) as large:
        for name, ollama, context in (("small", small, 4096), ("large", large, 131_072)):
            agent_id = await coordinator.register(ollama, name)
            await coordinator.heartbeat(agent_id, runner={"context_length": context})
        for _ in range(6):
            assert await _long(coordinator, path) == ("large", "")
        assert small.seen.of(path) == []


@pytest.mark.spec("SURFACE-50")
async def test_a_machine_without_an_agent_is_asked_before_a_long_prompt(
    coordinator: Running,
) -> None:
    async with StandIn(default_context=4096) as small, StandIn(default_context=131_072) as large:
        for name, ollama in (("small", small), ("large", large)):
            await coordinator.register(ollama, name)
            await ollama.load("llama3.2")
        assert {await _long(coordinator) for _ in range(4)} == {("large", "")}


@pytest.mark.spec("SURFACE-50")
@pytest.mark.parametrize("known", [True, False])
async def test_where_those_fail_that_it_fits_in_another_one_is_asked(
    coordinator: Running, known: bool
) -> None:
    async with StandIn(default_context=4096) as small, StandIn(default_context=131_072) as large:
        for name, ollama in (("small", small), ("large", large)):
            await coordinator.register(ollama, name)
        await small.load("llama3.2")
        if known:
            await large.load("llama3.2")
        large.faults.status(500, "model runner has unexpectedly stopped", paths=["/api/chat"])
        agent, note = await _long(coordinator)
        assert (agent, note.split(";")[0]) == ("small", "num_ctx=4096")
        assert large.seen.count("/api/chat") == 1


async def _last_id(coordinator: Running) -> str:
    return str(coordinator.parts.observation.journal.recent[-1].request.id)


@pytest.mark.spec("SURFACE-50")
async def test_where_no_context_is_large_enough_the_largest_serves_and_the_answer_says_so(
    coordinator: Running,
) -> None:
    async with StandIn(default_context=4096) as small, StandIn(default_context=8192) as larger:
        for name, ollama, context in (("small", small, 4096), ("larger", larger, 8192)):
            agent_id = await coordinator.register(ollama, name)
            await coordinator.heartbeat(agent_id, runner={"context_length": context})
        agent, note = await _long(coordinator)
        assert (agent, note.split(";")[0]) == ("larger", "num_ctx=8192")
        assert "prompt=25" in note
        record = await coordinator.get(f"/api/requests/{await _last_id(coordinator)}")
        assert record["attempts"][0]["runner"] == note
        assert "too small for a prompt" in record["attempts"][0]["refused"]["small"]


@pytest.mark.spec("SURFACE-50")
async def test_a_request_that_asks_for_a_context_itself_goes_anywhere(coordinator: Running) -> None:
    async with StandIn(default_context=4096) as small:
        agent_id = await coordinator.register(small, "small")
        await coordinator.heartbeat(agent_id, runner={"context_length": 4096})
        assert await _long(coordinator, options={"num_ctx": 32_768}) == ("small", "")
