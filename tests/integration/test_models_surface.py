"""Compressed bodies, forms, old agents, accounts: the rest of the surface."""

import asyncio
import json
from typing import Any

import aiohttp
import pytest
import zstandard

from support.coordinator import Running
from support.ollama import Model, StandIn

CHAT = {"model": "llama3.2", "messages": [{"role": "user", "content": "hello"}]}


async def _send(coordinator: Running, path: str, body: bytes) -> tuple[int, Any]:
    async with coordinator.session.post(
        coordinator.url + path, data=body, headers={"Content-Encoding": "zstd"}
    ) as response:
        return response.status, await response.json(content_type=None)


@pytest.mark.spec("SURFACE-6")
async def test_a_compressed_body_is_routed_and_forwarded_as_it_came(
    coordinator: Running, ollama: StandIn
) -> None:
    async with StandIn([Model("other")]) as other:
        await coordinator.register(other, "other")
        sent = zstandard.compress(json.dumps({**CHAT, "model": "other"}).encode())
        status, _ = await _send(coordinator, "/v1/chat/completions", sent)
        assert status == 200
        assert other.seen.last.body == sent


@pytest.mark.spec("SURFACE-6")
@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"this is not zstd", 400),
        (zstandard.compress(json.dumps(CHAT).encode())[:-3], 400),
        (zstandard.compress(b" " * (20 * 2**20 + 1)), 413),
        (zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(
            window_log=25, enable_ldm=True
        )).compress(b"x" * 2**25), 400),
    ],
    ids=["not zstd", "cut off", "too large", "too large a window"],
)  # fmt: skip
async def test_what_cannot_be_decompressed_is_refused_in_the_native_shape(
    coordinator: Running, ollama: StandIn, body: bytes, status: int
) -> None:
    answer = await _send(coordinator, "/v1/messages", body)
    assert answer[0] == status
    assert isinstance(answer[1]["error"], str)
    assert ollama.seen.count("/v1/messages") == 0


@pytest.mark.spec("SURFACE-6")
async def test_several_compressed_frames_are_one_body(
    coordinator: Running, ollama: StandIn
) -> None:
    text = json.dumps(CHAT).encode()
    sent = zstandard.compress(text[:20]) + zstandard.compress(text[20:])
    await _send(coordinator, "/v1/chat/completions", sent)
    assert ollama.seen.last.body == sent


@pytest.mark.spec("SURFACE-6")
async def test_native_routes_decompress_nothing(coordinator: Running, ollama: StandIn) -> None:
    status, body = await _send(
        coordinator, "/api/chat", zstandard.compress(json.dumps(CHAT).encode())
    )
    assert status == 400
    assert "invalid character" in body["error"]


def _form(**fields: str) -> aiohttp.FormData:
    form = aiohttp.FormData()
    form.add_field("file", b"RIFF\r\n--not-a-boundary\r\n", filename="said.wav")
    for name, value in fields.items():
        form.add_field(name, value)
    return form


@pytest.mark.spec("SURFACE-7")
async def test_a_transcription_goes_to_the_agent_that_has_its_model(
    coordinator: Running, ollama: StandIn
) -> None:
    async with StandIn([Model("whisper")]) as other:
        await coordinator.register(other, "other")
        url = f"{coordinator.url}/v1/audio/transcriptions"
        async with coordinator.session.post(url, data=_form(model="whisper")) as response:
            assert response.status == 200
            assert set(await response.json(content_type=None)) == {"text"}
        form = _form(model="whisper", response_format="text")
        async with coordinator.session.post(url, data=form) as response:
            assert response.status == 200
            assert not (await response.read()).startswith(b"{")
        assert other.seen.count("/v1/audio/transcriptions") == 2


@pytest.mark.spec("PROXY-44")
async def test_an_image_of_nothing_is_tried_on_each_holder_and_passes(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    """As a text model answers; the agents serve it on."""
    path = "/v1/images/generations"
    asked = {"model": "llama3.2", "prompt": "a cat"}
    async with coordinator.session.post(coordinator.url + path, json=asked) as response:
        assert (response.status, await response.read()) == (200, b"")
        assert response.headers["x-ollama-coordinator-agent"]
    assert (ollama.seen.count(path), spare.seen.count(path)) == (1, 1)
    assert [row["avoided_models"] for row in await coordinator.get("/api/agents")] == [{}, {}]


@pytest.mark.spec("PROXY-43")
async def test_what_is_wrong_with_a_body_is_said_before_its_model_is(
    coordinator: Running, ollama: StandIn
) -> None:
    """Nothing runs for it, also where the model is there under another name."""
    for model in ("", "nope", "a b", None):
        named = {} if model is None else {"model": model}
        status, told = await coordinator.post("/api/chat", {**named, "messages": 7})
        assert (status, told["error"][:52]) == (
            400,
            "json: cannot unmarshal number into Go struct field C",
        )
    status, told = await coordinator.post("/api/generate", {"model": "nope", "prompt": "x"})
    assert (status, told) == (404, {"error": "model 'nope' not found"})
    large = {"model": "nope", "prompt": "x" * 300_000, "images": 7}
    assert (await coordinator.post("/api/generate", large))[0] == 404
    assert ollama.seen.count("/api/generate") == 1
    assert not ollama.loaded
    wrong = {"model": "nope", "messages": []}
    async with coordinator.session.post(
        f"{coordinator.url}/v1/chat/completions",
        data=zstandard.compress(json.dumps(wrong).encode()),
        headers={"Content-Encoding": "zstd"},
    ) as response:
        told = (await response.json(content_type=None))["error"]["message"]
        assert (response.status, told) == (400, "[] is too short - 'messages'")


@pytest.mark.spec("PROXY-43")
async def test_an_ollama_that_is_silent_delays_a_refusal_by_a_second(
    coordinator: Running, ollama: StandIn
) -> None:
    loop = asyncio.get_running_loop()
    ollama.faults.hang(paths=["/api/chat"])
    started = loop.time()
    assert (await coordinator.post("/api/chat", {"model": "nope", "messages": 7}))[0] == 404
    assert loop.time() - started < 10


@pytest.mark.spec("SURFACE-7")
@pytest.mark.parametrize(
    ("fields", "status", "text"),
    [({"model": "nope"}, 404, "model 'nope' not found"), ({}, 400, "model is required")],
)
async def test_a_transcription_is_refused_as_ollama_does(
    coordinator: Running, ollama: StandIn, fields: dict[str, str], status: int, text: str
) -> None:
    for url in (coordinator.url, ollama.url):
        async with coordinator.session.post(
            f"{url}/v1/audio/transcriptions", data=_form(**fields)
        ) as response:
            assert response.status == status
            assert (await response.json())["error"]["message"] == text


@pytest.mark.spec("SURFACE-8")
async def test_an_agent_too_old_for_a_route_is_not_asked_for_it(coordinator: Running) -> None:
    async with StandIn(version="0.12.0") as old, StandIn() as new:
        await coordinator.register(old, "old")
        await coordinator.register(new, "new")
        for _ in range(4):
            body = {**CHAT, "max_tokens": 4}
            assert (await coordinator.post("/v1/messages", body))[0] == 200
        assert (old.seen.count("/v1/messages"), new.seen.count("/v1/messages")) == (0, 4)
        assert (await coordinator.get("/api/version"))["version"] == "0.12.0"


@pytest.mark.spec("SURFACE-8")
async def test_a_route_that_an_agent_lacks_does_not_cost_it_its_models(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    ollama.faults.status(404, raw="404 page not found", paths=["/v1/responses"])
    for _ in range(4):
        status, _ = await coordinator.post("/v1/responses", {"model": "llama3.2", "input": "x"})
        assert status == 200
    holders = (await coordinator.get("/api/models"))["models"][0]["holders"]
    assert len(holders) == 2


@pytest.mark.spec("SURFACE-10")
async def test_the_cloud_is_disabled_when_it_is_so_on_every_agent(
    coordinator: Running, ollama: StandIn
) -> None:
    assert (await coordinator.get("/api/status"))["cloud"]["disabled"] is True
    async with StandIn(cloud_disabled=False) as other:
        await coordinator.register(other, "other")
        assert (await coordinator.get("/api/status"))["cloud"]["disabled"] is False
        status, _ = await coordinator.post("/api/experimental/web_search", {"query": "x"})
        assert (status, other.seen.count("/api/experimental/web_search")) == (401, 1)
        assert ollama.seen.count("/api/experimental/web_search") == 0


@pytest.mark.spec("SURFACE-10")
async def test_the_account_is_that_of_an_agent_labelled_cloud(
    coordinator: Running, ollama: StandIn
) -> None:
    async with StandIn(signed_in_as="ada") as other:
        agent_id = await coordinator.register(other, "other")
        status, refusal = await coordinator.post("/api/me", {})
        assert (status, "run `ollama signin` on one of" in refusal["error"]) == (403, True)
        labels = {"labels": ["cloud"]}
        url = f"{coordinator.url}/api/agents/{agent_id}"
        async with coordinator.session.patch(url, json=labels) as response:
            assert response.status == 200
        status, account = await coordinator.post("/api/me", {})
        assert (status, account["name"]) == (200, "ada")
        assert (await coordinator.post("/api/signout", {}))[0] == 403
        assert other.seen.count("/api/signout") == 0


@pytest.mark.spec("SURFACE-10")
async def test_recommendations_come_from_anyone_or_are_none(coordinator: Running) -> None:
    path = "/api/experimental/model-recommendations"
    assert await coordinator.get(path) == {"recommendations": []}
