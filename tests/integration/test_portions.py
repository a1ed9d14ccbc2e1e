"""Large embedding requests that several machines embed."""

import asyncio
import gc
from typing import Any

import pytest

from ollama_coordinator.api.inference.portions import (
    MOST_TEXTS,
    PORTION_TOKENS,
    TEXT_BYTES,
    Portion,
    PortionAnswer,
)
from ollama_coordinator.memory import SPARED, memory_share
from support.coordinator import Running
from support.deadline import DEADLINE_SECONDS
from support.ollama import Hardware, Model, StandIn

EMBEDDER = Model("embedder", size_bytes=300_000_000, capabilities=("embedding",))
TEXTS = [f"text {number:07d}: {'water ' * 16}"[:100] for number in range(4 * PORTION_TOKENS // 25)]
"""Four portions' worth."""

PATHS = ["/api/embed", "/v1/embeddings"]


@pytest.fixture
async def nodes(coordinator: Running) -> Any:
    speed = Hardware(prefill_tokens_per_second=500_000)
    async with (
        StandIn([EMBEDDER], hardware=speed) as one,
        StandIn([EMBEDDER], hardware=speed) as two,
    ):
        for name, node in (("one", one), ("two", two)):
            await coordinator.register(node, name)
            await node.load("embedder")
        parts = coordinator.parts
        agents = list(parts.registry)
        await parts.monitor.refresh(agents, older_than=0.0, seconds=DEADLINE_SECONDS)
        await coordinator.until(lambda: all(agent.inventory.loaded for agent in agents))
        yield one, two


def body(**more: Any) -> dict[str, Any]:
    return {"model": "embedder", "input": TEXTS, **more}


def without_times(answer: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in answer.items() if not key.endswith("_duration")}


@pytest.mark.spec("PROXY-50")
@pytest.mark.parametrize("path", PATHS)
async def test_the_answer_is_as_that_of_one_machine(
    coordinator: Running, nodes: tuple[StandIn, StandIn], path: str
) -> None:
    async with coordinator.session.post(nodes[0].url + path, json=body()) as response:
        one = await response.json()
        kind = response.headers["content-type"]
    asked = [node.seen.count(path) for node in nodes]
    async with coordinator.session.post(coordinator.url + path, json=body()) as response:
        assert response.status == 200
        assert without_times(await response.json()) == without_times(one)
        assert response.headers["content-type"] == kind
        by = response.headers["x-ollama-coordinator-agent"]
    assert sorted(by.split(", ")) == ["one", "two"]
    portions = [node.seen.count(path) - then for node, then in zip(nodes, asked, strict=True)]
    assert min(portions) >= 1
    assert sum(portions) == 4
    await coordinator.until(coordinator.at_rest)
    [row] = (await coordinator.get("/api/history"))["requests"]
    assert (row["status"], row["attempts"], row["prompt_tokens"]) == ("served", 4, 25 * len(TEXTS))
    assert row["output_tokens"] == 0


@pytest.mark.spec("PROXY-50")
async def test_a_portion_whose_machine_dies_is_embedded_by_the_other(
    coordinator: Running, nodes: tuple[StandIn, StandIn]
) -> None:
    nodes[0].faults.rst(paths=["/api/embed"])
    status, answer = await coordinator.post("/api/embed", body())
    assert (status, len(answer["embeddings"])) == (200, len(TEXTS))
    [row] = (await coordinator.get("/api/history"))["requests"]
    assert row["status"] == "served"


@pytest.mark.spec("PROXY-51")
async def test_an_error_is_the_whole_answer_and_nothing_goes_on(
    coordinator: Running, nodes: tuple[StandIn, StandIn]
) -> None:
    long = [*TEXTS[:-1], "x" * 40_000]
    wanted = body(input=long, truncate=False, options={"num_ctx": 2048})
    async with coordinator.session.post(f"{nodes[0].url}/api/embed", json=wanted) as response:
        one = response.status, await response.json()
    assert one[0] == 400
    for node in nodes:
        node.hold_prompts()
    assert await coordinator.post("/api/embed", wanted) == one
    await coordinator.until(coordinator.at_rest)
    for node in nodes:
        await node.seen.wait_for(lambda seen: seen.open == 0)
    [row] = (await coordinator.get("/api/history"))["requests"]
    assert (row["status"], row["http_status"]) == ("refused", 400)


@pytest.mark.spec("PROXY-51")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "answered",
    [
        '{"model":"embedder"}',
        '{"model":"embedder","embeddings":[[1.5]],"data":[{"index":0,"embedding":[1.5]}]}',
        f'{{"model":"embedder","embeddings":[[{"1.5," * 15_000_000}1]]}}',
    ],
    ids=["no vectors", "one vector", "long"],
)
async def test_a_part_that_is_none_of_ollamas_is_an_error(
    coordinator: Running, nodes: tuple[StandIn, StandIn], path: str, answered: str
) -> None:
    for node in nodes:
        node.faults.status(200, raw=answered, paths=[path])
    status, answer = await coordinator.post(path, body())
    assert status == 503
    assert "part of a large embedding" in str(answer["error"])
    await coordinator.until(coordinator.at_rest)
    [row] = (await coordinator.get("/api/history"))["requests"]
    assert (row["status"], row["http_status"]) == ("failed", 503)


@pytest.mark.spec("PROXY-52")
async def test_more_texts_than_are_kept_answers_for_go_out_whole(
    coordinator: Running, nodes: tuple[StandIn, StandIn]
) -> None:
    texts = [f"{number:050d}" for number in range(MOST_TEXTS + 1)]
    status, answer = await coordinator.post("/api/embed", body(input=texts))
    assert (status, len(answer["embeddings"])) == (200, len(texts))
    assert sum(node.seen.count("/api/embed") for node in nodes) == 1


@pytest.mark.spec("PROXY-51")
@pytest.mark.parametrize("end", ["client", "operator"])
async def test_all_portions_end_with_their_request(
    coordinator: Running, nodes: tuple[StandIn, StandIn], end: str
) -> None:
    for node in nodes:
        node.hold_prompts()
    asking = asyncio.ensure_future(coordinator.post("/api/embed", body()))
    await coordinator.until(lambda: len(list(coordinator.parts.dispatch.held())) == 4)
    if end == "client":
        asking.cancel()
    else:
        [row] = await coordinator.get("/api/requests")
        async with coordinator.session.delete(
            f"{coordinator.url}/api/requests/{row['id']}"
        ) as answer:
            assert answer.status in (200, 204)
        assert (await asking)[0] >= 400
    await coordinator.until(coordinator.at_rest)
    [row] = (await coordinator.get("/api/history"))["requests"]
    assert row["status"] == "cancelled"


@pytest.mark.spec("PROXY-52")
@pytest.mark.parametrize(
    "wanted",
    [
        {"input": TEXTS[: PORTION_TOKENS // 25]},
        {"input": "".join(TEXTS)},
        {"input": [*TEXTS, 7]},
        {"input": [TEXTS]},
    ],
    ids=["small", "one text", "a number", "a list"],
)
async def test_what_is_small_or_no_list_of_texts_goes_out_whole(
    coordinator: Running, nodes: tuple[StandIn, StandIn], wanted: dict[str, Any]
) -> None:
    before = [node.seen.count("/api/embed") for node in nodes]
    await coordinator.post("/api/embed", {"model": "embedder", **wanted})
    assert sum(node.seen.count("/api/embed") for node in nodes) == sum(before) + 1


@pytest.mark.spec("PROXY-52")
async def test_one_machine_gets_all_of_it(coordinator: Running) -> None:
    async with StandIn([EMBEDDER]) as node:
        await coordinator.register(node)
        assert (await coordinator.post("/api/embed", body()))[0] == 200
        assert node.seen.count("/api/embed") == 1


def kept() -> list[object]:
    """What is in memory of divided requests, before any garbage is collected."""
    return [each for each in gc.get_objects() if isinstance(each, Portion | PortionAnswer)]


@pytest.mark.spec("PROXY-53")
async def test_without_room_for_its_answers_a_request_goes_out_whole(
    coordinator: Running, nodes: tuple[StandIn, StandIn]
) -> None:
    for node in nodes:
        node.hold_prompts()
    room = coordinator.parts.room
    first = asyncio.ensure_future(coordinator.post("/api/embed", body()))
    await coordinator.until(lambda: len(list(coordinator.parts.dispatch.held())) == 4)
    for_one = room.used
    room.used += memory_share() // SPARED - 2 * for_one
    many = [asyncio.ensure_future(coordinator.post("/api/embed", body())) for _ in range(5)]
    await coordinator.until(lambda: len(coordinator.parts.observation.journal.live) == 6)
    assert room.used <= memory_share() // SPARED + 6 * for_one
    for node in nodes:
        node.release()
    answers = await asyncio.gather(first, *many)
    assert [(status, len(answer["embeddings"])) for status, answer in answers] == [
        (200, len(TEXTS))
    ] * 6
    await coordinator.until(coordinator.at_rest)
    rows = (await coordinator.get("/api/history"))["requests"]
    assert sorted(row["attempts"] for row in rows) == [1, 1, 1, 1, 4, 4]


@pytest.mark.spec("PROXY-53")
@pytest.mark.parametrize("end", ["answered", "left", "refused", "cut"])
async def test_the_room_of_portions_is_given_back_and_nothing_of_them_stays(
    coordinator: Running, nodes: tuple[StandIn, StandIn], end: str
) -> None:
    first, second = nodes
    first.hold_prompts()
    if end == "refused":
        second.faults.status(400, body="input is wrong", paths=["/api/embed"])
    elif end == "cut":
        second.faults.status(200, raw='{"model":"embedder"', paths=["/api/embed"])
    room = coordinator.parts.room
    gc.collect()
    gc.disable()
    try:
        asking = asyncio.ensure_future(coordinator.post("/api/embed", body()))
        if end in ("answered", "left"):
            await coordinator.until(lambda: 0 < room.used < (len(TEXTS) + 4) * TEXT_BYTES)
        if end == "left":
            asking.cancel()
        else:
            first.release()
        await asyncio.gather(asking, return_exceptions=True)
        await coordinator.until(lambda: room.used == 0)
        await coordinator.until(coordinator.at_rest)
        await coordinator.until(lambda: not kept())
    finally:
        gc.enable()
