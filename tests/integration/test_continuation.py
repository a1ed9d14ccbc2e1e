"""Answers that go on at another machine when theirs dies."""

import asyncio
import json
from typing import Any

import openai
import pytest

from support.coordinator import Running, running
from support.deadline import DEADLINE_SECONDS
from support.ollama import Model, StandIn

CHAT = [{"role": "user", "content": "tell me of the sea"}]
TOKENS = 60
SIXTY: dict[str, dict[str, Any]] = {
    "/api/chat": {"messages": CHAT, "options": {"num_predict": TOKENS}},
    "/api/generate": {"prompt": "tell me of the sea", "options": {"num_predict": TOKENS}},
    "/v1/chat/completions": {
        "messages": CHAT, "max_tokens": TOKENS, "stream_options": {"include_usage": True},
    },
}  # fmt: skip


def read(path: str, body: bytes) -> tuple[str, list[dict[str, Any]]]:
    """The text of a stream, and its records."""
    if path.startswith("/api"):
        records = [json.loads(line) for line in body.splitlines()]
        texts = [one.get("response", one.get("message", {}).get("content", "")) for one in records]
        return "".join(texts), records
    lines = [line[6:] for line in body.splitlines() if line.startswith(b"data: {")]
    records = [json.loads(line) for line in lines]
    choices = [one["choices"] for one in records if one.get("choices")]
    return "".join(each[0]["delta"]["content"] for each in choices), records


async def cut(
    coordinator: Running, nodes: tuple[StandIn, StandIn], path: str, after: int, **more: Any
) -> tuple[bytes, StandIn]:
    """A stream whose machine is killed after so many tokens, and that machine."""
    for node in nodes:
        node.hold(after=after)
    async with coordinator.stream(path, **{**SIXTY[path], **more}) as response:
        assert response.status == 200
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not (held := [node for node in nodes if node.seen.held]):
                await asyncio.sleep(0.002)
        for node in nodes:
            if node is not held[0]:
                node.release()
        await held[0].kill()
        body = await response.read()  # raises if the body did not end properly
    return body, held[0]


async def uncut(node: StandIn, coordinator: Running, path: str) -> tuple[str, dict[str, Any]]:
    """What one machine alone answers: its text, and its last record."""
    async with coordinator.session.post(
        node.url + path, json={"model": "llama3.2", "stream": True, **SIXTY[path]}
    ) as response:
        text, records = read(path, await response.read())
    return text, records[-1]


@pytest.mark.spec("PROXY-46")
@pytest.mark.spec("PROXY-47")
@pytest.mark.parametrize("path", SIXTY)
@pytest.mark.parametrize("after", [10, 25, 40])
async def test_an_answer_goes_on_where_its_machine_dies(
    coordinator: Running, ollama: StandIn, spare: StandIn, path: str, after: int
) -> None:
    text, last = await uncut(ollama, coordinator, path)
    body, lost = await cut(coordinator, (ollama, spare), path, after)
    told, records = read(path, body)
    assert told == text
    names = {"from": "first", "by": "spare"}
    if lost is spare:
        names = {"from": "spare", "by": "first"}
    if path.startswith("/api"):
        assert records[-1]["continued"] == [{**names, "tokens": after}]
        assert [record["done"] for record in records] == [False] * TOKENS + [True]
        for count in ("eval_count", "prompt_eval_count", "done_reason"):
            assert records[-1][count] == last[count], count
    else:
        comment = f": continued by agent {names['by']} after {after} tokens of agent"
        assert comment.encode() in body
        assert body.endswith(b"data: [DONE]\n\n")
        assert records[-2]["continued"] == [{**names, "tokens": after}]
        assert records[-2]["choices"][0]["finish_reason"] == "length"
        assert records[-1]["usage"] == last["usage"]
        assert {record["id"] for record in records} == {records[0]["id"]}
    await coordinator.until(coordinator.at_rest)
    finished = (await coordinator.get("/api/history"))["requests"][0]
    assert (finished["status"], finished["output_tokens"]) == ("served", TOKENS)
    assert finished["agent"] == names["by"]
    tried = (await coordinator.get(f"/api/requests/{finished['id']}"))["attempts"]
    assert [(one["agent"], one["result"], one.get("continues", 0)) for one in tried] == [
        (names["from"], "cut", 0), (names["by"], "served", after),
    ]  # fmt: skip


@pytest.mark.spec("PROXY-46")
async def test_a_client_of_openai_reads_one_answer(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    nodes = (ollama, spare)
    for node in nodes:
        node.faults.cut(after=7, paths=["/v1/*"], saying='"stream":true')
    async with openai.AsyncOpenAI(
        base_url=f"{coordinator.url}/v1", api_key="none", max_retries=0
    ) as client:
        chunks = await client.chat.completions.create(
            model="llama3.2", messages=[{"role": "user", "content": "hello"}], stream=True
        )
        read = [chunk.choices[0] async for chunk in chunks]
    assert len([one for one in read if one.delta.content]) == 16
    assert read[-1].finish_reason == "stop"


WITHOUT: dict[str, dict[str, Any]] = {
    "format": {"format": "json"},
    "tools": {"tools": [{"type": "function", "function": {"name": "tides"}}]},
    "thinking": {"think": True, "model": "thinker"},
    "images": {
        "messages": [{**CHAT[0], "images": ["aGVsbG8="]}],
        "model": "thinker",
        "think": False,
    },
}


@pytest.mark.spec("PROXY-48")
@pytest.mark.parametrize("case", WITHOUT)
async def test_what_cannot_go_on_ends_with_an_error(coordinator: Running, case: str) -> None:
    abilities = ("completion", "tools", "thinking", "vision")
    models = [
        Model("llama3.2", size_bytes=1000),
        Model("thinker", size_bytes=1000, capabilities=abilities, thinking_tokens=20),
    ]
    async with StandIn(models) as first, StandIn(models) as second:
        for node in (first, second):
            await coordinator.register(node)
            node.faults.cut(after=2, paths=["/api/chat"])
        async with coordinator.stream(**WITHOUT[case]) as response:
            lines = [json.loads(line) for line in (await response.read()).splitlines()]
        assert [line.get("done") for line in lines[:-1]] == [False] * 2
        assert "error" in lines[-1]
        assert first.seen.count("/api/generate") + second.seen.count("/api/generate") == 0
        await coordinator.until(coordinator.at_rest)


@pytest.mark.spec("PROXY-48")
@pytest.mark.parametrize("opted", ["header", "key", "setting"])
async def test_who_does_not_want_it_gets_the_error(opted: str) -> None:
    async with (
        running(continue_answers=opted != "setting") as coordinator,
        StandIn() as first,
        StandIn() as second,
    ):
        headers = {}
        if opted == "header":
            headers = {"X-Ollama-Coordinator-Continue": "off"}
        for node in (first, second):
            await coordinator.register(node)
            node.faults.cut(after=2, paths=["/api/chat"])
        if opted == "key":
            _, made = await coordinator.post("/api/keys", {"name": "anna", "continues": False})
            headers = {"Authorization": f"Bearer {made['key']}"}
        body = {"model": "llama3.2", "messages": CHAT}
        url = f"{coordinator.url}/api/chat"
        async with coordinator.session.post(url, json=body, headers=headers) as response:
            lines = [json.loads(line) for line in (await response.read()).splitlines()]
        assert (len(lines), list(lines[-1])) == (3, ["error"])
        if opted == "header":
            headers = {"X-Ollama-Coordinator-Continue": "perhaps"}
            async with coordinator.session.post(url, json=body, headers=headers) as response:
                assert response.status == 400
                assert "on or off" in (await response.json())["error"]


@pytest.mark.spec("PROXY-49")
async def test_a_version_that_does_not_render_is_asked_once(coordinator: Running) -> None:
    async with StandIn(version="0.11.0") as first, StandIn(version="0.11.0") as second:
        nodes = (first, second)
        for node in nodes:
            await coordinator.register(node)
            node.faults.cut(after=2, paths=["/api/chat"], saying='"stream": true')
        for _ in range(2):
            async with coordinator.stream() as response:
                lines = [json.loads(line) for line in (await response.read()).splitlines()]
            assert (len(lines), list(lines[-1])) == (3, ["error"])
            await coordinator.until(
                lambda: not any(one.model_cooldowns for one in coordinator.parts.registry)
            )
        asked = [one for node in nodes for one in node.seen.requests if "_debug" in str(one)]
        assert len(asked) == 1
        assert sum(node.seen.count("/api/generate") for node in nodes) == 0


@pytest.mark.spec("PROXY-46")
async def test_another_content_of_the_name_does_not_go_on_with_it(coordinator: Running) -> None:
    other = Model("llama3.2", digest="2" * 64, blob=f"sha256:{'3' * 64}")
    async with StandIn() as first, StandIn() as second, StandIn([other]) as third:
        for node in (first, second, third):
            await coordinator.register(node)
        body, _ = await cut(coordinator, (first, second), "/api/chat", 25)
        _, records = read("/api/chat", body)
        assert records[-1]["done"]
        assert third.seen.count("/api/chat") + third.seen.count("/api/generate") == 0


@pytest.mark.spec("PROXY-46")
async def test_a_dead_runner_and_a_second_death_are_told_in_one_stream(
    coordinator: Running,
) -> None:
    async with StandIn() as first, StandIn() as second, StandIn() as third:
        nodes = (first, second, third)
        for node in nodes:
            await coordinator.register(node)
            node.faults.error_line(after=5, paths=["/api/chat"], saying='"stream": true')
        lines = []
        with (
            first.faults.cut(after=3, paths=["/api/generate"], times=1),
            second.faults.cut(after=3, paths=["/api/generate"], times=1),
            third.faults.cut(after=3, paths=["/api/generate"], times=1),
        ):
            async with coordinator.stream(**SIXTY["/api/chat"]) as response:
                lines = (await response.read()).splitlines()
        for node in nodes:
            node.faults.clear()
        text, records = read("/api/chat", b"\n".join(lines[:-1]))
        assert (await uncut(third, coordinator, "/api/chat"))[0].startswith(text)
        assert len(records) == 5 + 3
        # Two machines died under it: no third one is given it.
        assert list(json.loads(lines[-1])) == ["error"]
        await coordinator.until(coordinator.at_rest)


@pytest.mark.spec("PROXY-48")
async def test_an_operator_can_end_an_answer_that_waits_to_go_on(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    nodes = (ollama, spare)
    for node in nodes:
        await node.load("llama3.2")
        node.faults.hang(paths=["/api/chat"], saying="_debug_render_only")
        node.faults.cut(after=3, paths=["/api/chat"], saying='"stream": true')
    async with coordinator.stream() as response:
        for _ in range(2):
            assert await response.content.readline()
        await coordinator.until(lambda: sum(node.seen.faulted for node in nodes))
        [row] = await coordinator.get("/api/requests")
        url = f"{coordinator.url}/api/requests/{row['id']}"
        async with coordinator.session.delete(url) as answer:
            assert answer.status in (200, 204)
        lines = (await response.read()).splitlines()
    assert list(json.loads(lines[-1])) == ["error"]
    await coordinator.until(coordinator.at_rest)
    finished = (await coordinator.get("/api/history"))["requests"][0]
    assert (finished["status"], finished["output_tokens"]) == ("cancelled", 3)


@pytest.mark.spec("PROXY-48")
@pytest.mark.parametrize("waits", ["while the prompt is rendered", "while it is continued"])
async def test_a_client_that_leaves_an_answer_which_goes_on_leaves_nothing(
    coordinator: Running, ollama: StandIn, spare: StandIn, waits: str
) -> None:
    nodes = (ollama, spare)
    for node in nodes:
        await node.load("llama3.2")
        if waits == "while the prompt is rendered":
            node.faults.hang(paths=["/api/chat"], saying="_debug_render_only")
        else:
            node.faults.hang(paths=["/api/generate"])
        node.faults.cut(after=3, paths=["/api/chat"], saying='"stream": true')
    async with coordinator.stream() as response:
        for _ in range(2):
            assert await response.content.readline()
        await coordinator.until(lambda: sum(node.seen.faulted for node in nodes))
        response.close()
    await coordinator.until(coordinator.at_rest)
    finished = (await coordinator.get("/api/history"))["requests"][0]
    assert (finished["status"], finished["output_tokens"]) == ("cancelled", 3)
