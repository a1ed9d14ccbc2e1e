"""What a test can have the stand-in answer: texts of its own, and a fault of a model's file."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import pytest

from support.ollama import Model, Script, StandIn
from support.ollama.models import CUT_FILE

TRY_PULLING = 'model "m" not found, try pulling it first'
HI = [{"role": "user", "content": "hi"}]


async def ask(
    http: aiohttp.ClientSession, node: StandIn, path: str, body: Any
) -> tuple[int, list[Any]]:
    async with http.post(node.url + path, json=body) as answer:
        return answer.status, [json.loads(line) for line in (await answer.read()).splitlines()]


async def test_a_test_can_write_the_answer(http: aiohttp.ClientSession) -> None:
    answers = iter(["two words", 3, Script(content=["own"], done_reason="length")])
    async with StandIn(answer=lambda request: next(answers)) as node:
        body = {"model": "llama3.2", "prompt": "a", "stream": False}
        text, tokens, script = [
            (await ask(http, node, "/api/generate", body))[1][0] for _ in range(3)
        ]
    assert text["response"] == "two words"
    assert tokens["eval_count"] == 3
    assert (script["response"], script["done_reason"]) == ("own", "length")


async def test_an_answer_follows_its_prompt_its_schema_and_its_stop(
    http: aiohttp.ClientSession,
) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}, "ok": {"enum": ["y"]}}}
    async with StandIn() as node:

        async def said(**rest: Any) -> str:
            body = {"model": "llama3.2", "prompt": "a", "stream": False, **rest}
            return str((await ask(http, node, "/api/generate", body))[1][0]["response"])

        whole = await said()
        assert await said() == whole != await said(prompt="b")
        assert json.loads(await said(format=schema)) == {"n": 7, "ok": "y"}
        stop = whole[20:24]
        assert await said(options={"stop": [stop]}) == whole[: whole.index(stop)]


async def test_a_repeating_model_ends_without_done(http: aiohttp.ClientSession) -> None:
    async with StandIn([Model("loop", repeats=True)]) as node:
        _, lines = await ask(http, node, "/api/chat", {"model": "loop", "messages": HI})
    assert len(lines) == 31
    assert not any(line["done"] for line in lines)


@pytest.mark.parametrize(
    ("broken", "path", "told"),
    [
        (Model("m", damage=CUT_FILE), "/api/chat", (500, CUT_FILE)),
        (Model("m", damage=CUT_FILE), "/api/show", (500, CUT_FILE)),
        (Model("m", missing=True), "/api/chat", (400, '"m" does not support chat')),
        (Model("m", missing=True), "/api/generate", (400, '"m" does not support generate')),
        (
            Model("m", missing=True),
            "/api/embed",
            (404, 'model "m" not found, try pulling it first'),
        ),
        (Model("m", missing=True), "/api/show", (404, "model 'm:latest' not found")),
    ],
)
async def test_a_model_whose_file_is_damaged_or_gone(
    http: aiohttp.ClientSession, broken: Model, path: str, told: tuple[int, str]
) -> None:
    body = {"model": "m", "prompt": "a", "input": "a", "messages": HI}
    async with StandIn([broken]) as node:
        status, lines = await ask(http, node, path, body)
    assert (status, lines[0]["error"]) == told


async def test_a_model_made_of_a_file_has_another_digest_where_models_are_elsewhere(
    http: aiohttp.ClientSession,
) -> None:
    blob = Model("there").blob
    digests = []
    for path in ("/usr/share/ollama/.ollama/models", "/home/ada/models"):
        async with StandIn(["there"], models_path=path) as node:
            wanted = {"model": "made", "files": {"a.gguf": blob}}
            await ask(http, node, "/api/create", wanted)
            await ask(http, node, "/api/create", {"model": "brief", "from": "made", "system": "s"})
            made, brief = node.models.find("made"), node.models.find("brief")
            assert made is not None
            assert brief is not None
            assert made.blob == blob
            digests.append((made.digest, brief.digest))
    (made_here, brief_here), (made_there, brief_there) = digests
    assert made_here != made_there
    assert brief_here == brief_there


async def test_an_older_version_lacks_routes_and_fields(http: aiohttp.ClientSession) -> None:
    async with StandIn(version="0.12.0", lacks=["/v1/messages"]) as node:
        async with http.post(node.url + "/v1/messages", json={}) as answer:
            assert answer.status == 404
        async with http.get(node.url + "/api/tags") as answer:
            assert "capabilities" not in (await answer.json())["models"][0]


async def test_a_pull_that_was_cut_goes_on_where_it_stopped(http: aiohttp.ClientSession) -> None:
    big = Model("big", size_bytes=30_000_000)
    async with StandIn([], registry=[big], download_bytes_per_second=1e8) as node:
        with node.faults.cut(after=3), pytest.raises(aiohttp.ClientError):
            await ask(http, node, "/api/pull", {"name": "big"})
        there = node.models.partial[big.blob]
        assert 0 < there < big.size_bytes
        _, lines = await ask(http, node, "/api/pull", {"name": "big"})
        assert (lines[1]["completed"], lines[1]["total"]) == (there, big.size_bytes)
        assert lines[-1] == {"status": "success"}


async def test_more_origins_can_be_allowed(http: aiohttp.ClientSession) -> None:
    async with StandIn(origins=["https://*.example.org"]) as node:
        for origin, status in (("https://a.example.org", 200), ("https://a.example.com", 403)):
            async with http.get(node.url + "/api/tags", headers={"Origin": origin}) as answer:
                assert answer.status == status


async def test_a_node_on_every_address_answers_to_any_host(http: aiohttp.ClientSession) -> None:
    async with StandIn(host="0.0.0.0") as node:
        async with http.get(node.url, headers={"Host": "example.com"}) as answer:
            assert answer.status == 200
