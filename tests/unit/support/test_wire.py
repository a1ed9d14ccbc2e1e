"""Statuses, bodies and headers, to the letter of what a node sends."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from support.ollama import Model, Script, StandIn, zstd

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def node() -> AsyncIterator[StandIn]:
    models = [
        Model("llama3.2"),
        Model("embedder", capabilities=("embedding",)),
        Model("plain", capabilities=("completion",)),
        Model("loop", repeats=True),
    ]
    async with StandIn(models) as node:
        yield node


async def ask(
    http: aiohttp.ClientSession, node: StandIn, method: str, path: str, body: Any = None
) -> tuple[int, str]:
    data = body if body is None or isinstance(body, str) else json.dumps(body)
    async with http.request(method, node.url + path, data=data, allow_redirects=False) as answer:
        return answer.status, await answer.text()


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "text"),
    [
        ("POST", "/api/generate", {"model": "No"}, 404, "model 'No' not found"),
        ("POST", "/api/generate", {}, 404, "model '' not found"),
        ("POST", "/api/chat", {"model": "No", "messages": HI}, 404, "model 'No' not found"),
        ("POST", "/api/chat", {"messages": HI}, 400, "model is required"),
        ("POST", "/api/embed", {"model": "No", "input": "a"}, 404,
         'model "No" not found, try pulling it first'),
        ("POST", "/api/embed", {"input": "a"}, 404, "model '' not found"),
        ("POST", "/api/embeddings", {"model": "No"}, 404,
         'model "No" not found, try pulling it first'),
        ("POST", "/api/embeddings", {}, 400, "model is required"),
        ("POST", "/api/show", {"model": "No"}, 404, "model 'No:latest' not found"),
        ("POST", "/api/show", {"model": "", "name": ""}, 400, "model is required"),
        ("POST", "/api/show", {"model": "a b"}, 400, "invalid model name"),
        ("DELETE", "/api/delete", {"name": "No"}, 404, "model 'No' not found"),
        ("DELETE", "/api/delete", {}, 400, "model is required"),
        ("DELETE", "/api/delete", {"model": "a b"}, 400, 'name "a b" is invalid'),
        ("POST", "/api/copy", {"source": "No", "destination": "x"}, 404, 'model "No" not found'),
        ("POST", "/api/copy", {"source": "a b", "destination": "x"}, 400,
         'source "a b" is invalid'),
        ("POST", "/api/copy", {"source": "plain", "destination": "a b"}, 400,
         'destination "a b" is invalid'),
        ("POST", "/api/pull", {"model": ""}, 400, "invalid model name"),
        ("POST", "/api/push", {"model": ""}, 400, "model is required"),
        ("POST", "/api/pull", {"name": "No", "stream": False}, 500,
         "pull model manifest: file does not exist"),
        ("POST", "/api/chat", {"model": "embedder", "messages": HI}, 400,
         '"embedder" does not support chat'),
        ("POST", "/api/generate", {"model": "embedder", "prompt": "a"}, 400,
         '"embedder" does not support generate'),
        ("POST", "/api/chat", {"model": "plain", "messages": HI, "tools": [{}]}, 400,
         "registry.ollama.ai/library/plain:latest does not support tools"),
        ("POST", "/api/chat", {"model": "x:local:cloud", "messages": HI}, 400,
         'use either :local or :cloud, not both: "x:local:cloud"'),
        ("POST", "/api/chat", {"model": "gpt-oss:20b-cloud", "messages": HI}, 403,
         "ollama cloud is disabled: remote model is unavailable"),
        ("POST", "/api/chat", {"model": "plain", "messages": HI, "options": {"num_ctx": "8k"}},
         500, 'option "num_ctx" must be of type integer'),
        ("POST", "/api/chat", {"model": "plain", "keep_alive": "300"}, 400,
         'time: missing unit in duration "300"'),
        ("POST", "/api/chat", {"model": 5}, 400,
         "json: cannot unmarshal number into Go struct field ChatRequest.model of type string"),
        ("POST", "/api/chat", "", 400, "missing request body"),
        ("POST", "/api/chat", "model=x", 400,
         "invalid character 'm' looking for beginning of value"),
        ("POST", "/api/experimental/web_search", {}, 403,
         "ollama cloud is disabled: web search is unavailable"),
        ("POST", "/api/blobs/sha256:12", "", 400, "invalid digest format"),
    ],
)  # fmt: skip
async def test_a_refusal_has_its_status_and_text(
    http: aiohttp.ClientSession,
    node: StandIn,
    method: str,
    path: str,
    body: Any,
    status: int,
    text: str,
) -> None:
    assert await ask(http, node, method, path, body) == (
        status,
        json.dumps({"error": text}, separators=(",", ":")),
    )


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("/v1/chat/completions",
         {"error": {"message": "EOF", "type": "invalid_request_error", "param": None,
                    "code": None}}),
        ("/v1/messages",
         {"type": "error", "error": {"type": "invalid_request_error", "message": "EOF"},
          "request_id": "req_0123456789abcdef"}),
    ],
)  # fmt: skip
async def test_v1_errors_have_their_own_shapes(
    http: aiohttp.ClientSession, node: StandIn, path: str, shape: Any
) -> None:
    status, text = await ask(http, node, "POST", path, "")
    assert (status, json.loads(text)) == (400, shape)


@pytest.mark.parametrize(
    ("method", "path", "status", "text", "header"),
    [
        ("GET", "/", 200, "Ollama is running", None),
        ("HEAD", "/", 200, "", None),
        ("HEAD", "/api/tags", 200, "", None),
        ("GET", "/api/nope", 404, "404 page not found", None),
        ("GET", "/v1/models/a/b", 404, "404 page not found", None),
        ("POST", "/v1/messages/count_tokens", 404, "404 page not found", None),
        ("HEAD", "/api/ps", 405, "", ("Allow", "GET")),
        ("GET", "/api/chat", 405, "405 method not allowed", ("Allow", "POST")),
        ("GET", "/api/tags/", 301, "", ("Location", "/api/tags")),
        ("POST", "/api/chat/", 307, "", ("Location", "/api/chat")),
        ("POST", "/api/signout", 401, None, None),
        ("GET", "/api/version", 200, '{"version":"0.33.0"}', None),
        ("GET", "/api/status", 200, '{"cloud":{"disabled":true,"source":"env"}}', None),
    ],
)
async def test_paths_and_methods(
    http: aiohttp.ClientSession,
    node: StandIn,
    method: str,
    path: str,
    status: int,
    text: str | None,
    header: tuple[str, str] | None,
) -> None:
    async with http.request(method, node.url + path, allow_redirects=False) as answer:
        assert answer.status == status
        if text is not None:
            assert await answer.text() == text
        if header is not None:
            assert answer.headers[header[0]] == header[1]
        assert "Server" not in answer.headers


async def test_a_stream_is_ndjson_one_line_per_chunk(
    http: aiohttp.ClientSession, node: StandIn
) -> None:
    body = {"model": "llama3.2", "prompt": "a", "options": {"num_predict": 2}}
    async with http.post(node.url + "/api/generate", json=body) as answer:
        assert answer.headers["Content-Type"] == "application/x-ndjson"
        assert answer.headers["Transfer-Encoding"] == "chunked"
        lines = [json.loads(line) async for line in answer.content]
    assert [sorted(line) for line in lines[:2]] == [["created_at", "done", "model", "response"]] * 2
    assert lines[2]["done_reason"] == "length"
    assert all(isinstance(lines[2][key], int) for key in lines[2] if key.endswith("duration"))
    assert lines[2]["eval_count"] == 2


async def test_keys_in_any_case_and_any_content_type_will_do(
    http: aiohttp.ClientSession, node: StandIn
) -> None:
    body = '{"MODEL":"llama3.2","Prompt":"a","STREAM":false} and more'
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    async with http.post(node.url + "/api/generate", data=body, headers=headers) as answer:
        assert (await answer.json())["done"] is True


async def test_a_gzip_body_is_bad_json(http: aiohttp.ClientSession, node: StandIn) -> None:
    headers = {"Content-Encoding": "gzip"}
    async with http.post(node.url + "/api/chat", data=b"\x1f\x8b", headers=headers) as answer:
        assert answer.status == 400
        assert "looking for beginning of value" in (await answer.json())["error"]


@pytest.mark.skipif(not zstd.AVAILABLE, reason="no zstd library is installed")
async def test_zstd_bodies_are_read_on_v1(http: aiohttp.ClientSession, node: StandIn) -> None:
    library = importlib.import_module("zstandard")
    body = library.ZstdCompressor().compress(b'{"model":"llama3.2","prompt":"a"}')
    headers = {"Content-Encoding": "zstd"}
    async with http.post(node.url + "/v1/completions", data=body, headers=headers) as answer:
        assert answer.status == 200
    async with http.post(node.url + "/v1/completions", data=b"no", headers=headers) as answer:
        assert (answer.status, list(await answer.json())) == (400, ["error"])


@pytest.mark.skipif(zstd.AVAILABLE, reason="a zstd library is installed")
async def test_without_a_library_zstd_is_refused_in_the_native_shape(
    http: aiohttp.ClientSession, node: StandIn
) -> None:
    headers = {"Content-Encoding": "zstd"}
    url = node.url + "/v1/chat/completions"
    async with http.post(url, data=b"(\xb5/\xfd", headers=headers) as answer:
        assert (answer.status, list(await answer.json())) == (400, ["error"])


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
async def test_loading_and_unloading_answer_one_object(
    http: aiohttp.ClientSession, node: StandIn, path: str
) -> None:
    for keep_alive, reason in ((None, "load"), (0, "unload"), (0, "unload")):
        status, text = await ask(
            http, node, "POST", path, {"model": "plain", "keep_alive": keep_alive}
        )
        told = json.loads(text)
        assert (status, told["done"], told["done_reason"]) == (200, True, reason)
    assert node.loaded == []


async def test_a_repeating_model_ends_without_done(
    http: aiohttp.ClientSession, node: StandIn
) -> None:
    async with http.post(node.url + "/api/chat", json={"model": "loop", "messages": HI}) as answer:
        lines = [json.loads(line) async for line in answer.content]
    assert len(lines) == 31
    assert not any(line["done"] for line in lines)
    body = {"model": "loop", "messages": HI, "stream": False}
    _, text = await ask(http, node, "POST", "/api/chat", body)
    assert json.loads(text)["done"] is False
    assert "eval_count" not in json.loads(text)


async def test_tags_show_newest_first_with_full_digests(
    http: aiohttp.ClientSession, node: StandIn
) -> None:
    node.models.add(Model("fresh"))
    rows = json.loads((await ask(http, node, "GET", "/api/tags"))[1])["models"]
    assert rows[0]["name"] == rows[0]["model"] == "fresh:latest"
    assert all(len(row["digest"]) == 64 for row in rows)
    assert rows[0]["details"]["context_length"] == 131_072


async def test_v1_models_without_models_is_null(http: aiohttp.ClientSession) -> None:
    async with StandIn([]) as empty:
        assert json.loads((await ask(http, empty, "GET", "/v1/models"))[1])["data"] is None


async def test_a_missing_model_in_the_registry_is_a_200_when_streamed(
    http: aiohttp.ClientSession, node: StandIn
) -> None:
    status, text = await ask(http, node, "POST", "/api/pull", {"model": "", "name": "No"})
    assert status == 200
    assert text.splitlines() == [
        '{"status":"pulling manifest"}',
        '{"error":"pull model manifest: file does not exist"}',
    ]


async def test_a_pull_that_was_cut_goes_on_where_it_stopped(http: aiohttp.ClientSession) -> None:
    big = Model("big", size_bytes=30_000_000)
    async with StandIn([], registry=[big], download_bytes_per_second=1e8) as node:
        with node.faults.cut(after=3), pytest.raises(aiohttp.ClientError):
            await ask(http, node, "POST", "/api/pull", {"name": "big"})
        assert 0 < node.models.partial[big.blob] < big.size_bytes
        there = node.models.partial[big.blob]
        _, text = await ask(http, node, "POST", "/api/pull", {"name": "big"})
        lines = [json.loads(line) for line in text.splitlines()]
        assert lines[1]["completed"] == there
        assert lines[1]["total"] == big.size_bytes
        assert lines[-1] == {"status": "success"}
        assert "big" in node.models


async def test_blobs_are_verified_and_kept(http: aiohttp.ClientSession, node: StandIn) -> None:
    digest = f"sha256:{hashlib.sha256(b'weights').hexdigest()}"
    path = f"/api/blobs/{digest}"
    assert (await ask(http, node, "HEAD", path))[0] == 404
    status, text = await ask(http, node, "POST", path, "other")
    assert status == 400
    assert "digest mismatch, expected" in text
    assert (await ask(http, node, "POST", path, "weights"))[0] == 201
    assert (await ask(http, node, "HEAD", path.replace("sha256:", "sha256-")))[0] == 200


async def test_a_blob_that_is_there_is_not_read(http: aiohttp.ClientSession, node: StandIn) -> None:
    never = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        yield b"the first of it"
        await never.wait()

    blob = next(iter(node.models)).blob
    async with http.post(f"{node.url}/api/blobs/{blob}", data=endless()) as answer:
        assert answer.status == 200


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1:1", "a.localhost", "gpu.local", "10.1.2.3"]
)
async def test_a_loopback_node_answers_to_local_hosts(
    http: aiohttp.ClientSession, node: StandIn, host: str
) -> None:
    async with http.get(node.url, headers={"Host": host}) as answer:
        assert answer.status == 200


@pytest.mark.parametrize("host", ["example.com", "8.8.8.8", "ollama:11434"])
async def test_a_loopback_node_refuses_foreign_hosts(
    http: aiohttp.ClientSession, node: StandIn, host: str
) -> None:
    async with http.get(node.url, headers={"Host": host}) as answer:
        assert (answer.status, await answer.text()) == (403, "")


async def test_a_node_on_every_address_answers_to_any_host(http: aiohttp.ClientSession) -> None:
    async with StandIn(host="0.0.0.0") as node:
        async with http.get(node.url, headers={"Host": "example.com"}) as answer:
            assert answer.status == 200
        async with http.get(node.url) as answer:
            assert answer.status == 200


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:3000", 200),
        ("app://obsidian.md", 200),
        ("https://chat.example.org", 200),
        ("https://evil.example.com", 403),
    ],
)
async def test_origins_are_checked(http: aiohttp.ClientSession, origin: str, status: int) -> None:
    async with StandIn(origins=["https://*.example.org"]) as node:
        async with http.get(node.url + "/api/tags", headers={"Origin": origin}) as answer:
            assert answer.status == status
            allowed = answer.headers.get("Access-Control-Allow-Origin")
            assert allowed == (origin if status == 200 else None)
        async with http.options(node.url + "/api/chat", headers={"Origin": origin}) as answer:
            assert answer.status == (204 if status == 200 else 403)


async def test_a_test_can_write_the_answer(http: aiohttp.ClientSession) -> None:
    answers = iter(["two words", 3, Script(content=["own"], done_reason="length")])
    async with StandIn(answer=lambda request: next(answers)) as node:
        said = []
        for _ in range(3):
            body = {"model": "llama3.2", "prompt": "a", "stream": False}
            said.append(json.loads((await ask(http, node, "POST", "/api/generate", body))[1]))
    assert said[0]["response"] == "two words"
    assert said[1]["eval_count"] == 3
    assert (said[2]["response"], said[2]["done_reason"]) == ("own", "length")


async def test_accounts(http: aiohttp.ClientSession) -> None:
    async with StandIn(signed_in_as="ada", cloud_disabled=False) as node:
        assert json.loads((await ask(http, node, "POST", "/api/me"))[1])["name"] == "ada"
        assert await ask(http, node, "POST", "/api/signout") == (200, "null")
        status, text = await ask(http, node, "POST", "/api/me")
        assert status == 401
        assert "signin_url" in json.loads(text)
        assert (await ask(http, node, "POST", "/api/experimental/web_fetch", {}))[0] == 401
        assert (await ask(http, node, "DELETE", "/api/user/keys/abc"))[0] == 401


async def test_an_older_version_lacks_routes(http: aiohttp.ClientSession) -> None:
    async with StandIn(version="0.12.0", lacks=["/v1/messages"]) as node:
        assert (await ask(http, node, "POST", "/v1/messages", {}))[0] == 404
        assert (await ask(http, node, "GET", "/api/version"))[1] == '{"version":"0.12.0"}'


async def test_a_prompt_longer_than_the_context_is_refused_where_nothing_may_shift(
    http: aiohttp.ClientSession, node: StandIn
) -> None:
    body = {"model": "llama3.2", "prompt": "word " * 100, "options": {"num_ctx": 8}}
    assert (await ask(http, node, "POST", "/api/generate", {**body, "shift": False}))[0] == 400
    assert (await ask(http, node, "POST", "/api/generate", body))[0] == 200


async def test_a_test_can_load_a_model_by_hand(node: StandIn) -> None:
    await node.load("LLAMA3.2")
    assert node.loaded == ["llama3.2:latest"]
    with pytest.raises(LookupError, match="not on this node's disk"):
        await node.load("nope")
