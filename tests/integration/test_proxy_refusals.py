"""What the coordinator answers by itself."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from support.coordinator import Running, running
from support.ollama import Model, StandIn

UNKNOWN = {
    "/api/chat": {"error": "model 'nope' not found"},
    "/api/generate": {"error": "model 'nope' not found"},
    "/api/embed": {"error": 'model "nope" not found, try pulling it first'},
    "/api/embeddings": {"error": 'model "nope" not found, try pulling it first'},
}


@pytest.mark.spec("PROXY-18")
@pytest.mark.parametrize("path", UNKNOWN)
async def test_an_unknown_model_is_ollamas_own_404(
    coordinator: Running, ollama: StandIn, path: str
) -> None:
    body = {"model": "nope", "prompt": "x", "input": "x", "messages": []}
    through = await coordinator.post(path, body)
    assert through == (404, UNKNOWN[path])
    async with coordinator.session.post(ollama.url + path, json=body) as response:
        assert (response.status, await response.json()) == through


@pytest.mark.spec("PROXY-18")
@pytest.mark.spec("PROXY-22")
@pytest.mark.parametrize(
    "path",
    [*UNKNOWN, "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/messages"],
)
@pytest.mark.parametrize("name", ["nope", "", "bad name"])
async def test_refusals_are_the_ones_of_the_agent_itself(
    coordinator: Running, ollama: StandIn, path: str, name: str
) -> None:
    body = {"model": name, "prompt": "x", "input": "x", "max_tokens": 1}
    body["messages"] = [{"role": "user", "content": "x"}]
    answers = []
    for url in (ollama.url, coordinator.url):
        async with coordinator.session.post(url + path, json=body) as response:
            answer = await response.json()
            answer.pop("request_id", None)
            answers.append((response.status, response.content_type, answer))
    assert answers[1] == answers[0]


@pytest.mark.spec("PROXY-19")
async def test_a_model_whose_agents_are_offline_is_503_naming_them(
    coordinator: Running, ollama: StandIn
) -> None:
    async with StandIn(["other"]) as second:
        await coordinator.register(second, "second")
        agent_id = next(a.id for a in coordinator.parts.registry if a.name == "first")
        await coordinator.heartbeat(agent_id, leaving=True)
        status, answer = await coordinator.chat()
        assert status == 503
        assert "first: offline" in answer["error"]
        assert "second" in answer["error"]


@pytest.mark.spec("PROXY-19")
async def test_without_any_agent_the_answer_says_how_to_start_one(coordinator: Running) -> None:
    status, answer = await coordinator.chat()
    assert status == 503
    assert "ollama-coordinator-agent run" in answer["error"]


@pytest.mark.spec("PROXY-20")
async def test_a_request_waits_for_the_only_agent_to_come_back(
    coordinator: Running, ollama: StandIn
) -> None:
    await ollama.kill()
    assert (await coordinator.chat())[0] == 503
    asked = asyncio.create_task(coordinator.chat())
    await coordinator.until(lambda: len(coordinator.parts.scheduler.waiting(0.0)) == 1)
    await ollama.start()
    assert (await asked)[0] == 200


@pytest.mark.spec("PROXY-20")
async def test_a_request_does_not_wait_for_ever(coordinator: Running, ollama: StandIn) -> None:
    await ollama.kill()
    assert (await coordinator.chat())[0] == 503
    status, answer = await coordinator.chat()
    assert status == 503
    assert "first: cannot connect" in answer["error"]
    assert coordinator.at_rest()


BROKEN = {
    b"": "missing request body",
    b"x": "invalid character 'x' looking for beginning of value",
    b"{x": "invalid character 'x' looking for beginning of object key string",
    b'{"model" 1}': "invalid character '1' after object key",
    b'{"model":"llama3.2"': "unexpected EOF",
    b"[]": "json: cannot unmarshal array into Go value of type api.ChatRequest",
    b'{"model":5}': "json: cannot unmarshal number into Go struct field ChatRequest.model"
    " of type string",
}


@pytest.mark.spec("PROXY-21")
@pytest.mark.parametrize("body", BROKEN)
async def test_a_body_that_is_not_json_is_400_in_gos_words(
    coordinator: Running, ollama: StandIn, body: bytes
) -> None:
    async with coordinator.session.post(f"{coordinator.url}/api/chat", data=body) as response:
        assert (response.status, await response.json()) == (400, {"error": BROKEN[body]})


@pytest.mark.spec("PROXY-21")
async def test_keys_match_in_any_case_and_what_follows_is_ignored(
    coordinator: Running, ollama: StandIn
) -> None:
    message = json.dumps([{"role": "user", "content": "x"}])
    body = f'{{"Model":"nope","MODEL":"llama3.2","messages":{message},"STREAM":false}} trailing'
    async with coordinator.session.post(
        f"{coordinator.url}/api/chat", data=body.encode()
    ) as response:
        assert response.status == 200


@pytest.mark.spec("PROXY-22")
async def test_errors_are_one_line_in_the_shape_of_the_route(coordinator: Running) -> None:
    shapes: dict[str, Callable[[Any], str]] = {
        "/api/chat": lambda body: body["error"],
        "/v1/chat/completions": lambda body: body["error"]["message"],
        "/v1/messages": lambda body: body["error"]["message"],
    }
    for path, sentence in shapes.items():
        body = {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}
        async with coordinator.session.post(coordinator.url + path, json=body) as response:
            assert response.status == 503
            assert response.content_type == "application/json"
            text = await response.text()
        assert text.find("\n") == (len(text) - 1 if path.startswith("/v1") else -1)
        assert "no agent is registered" in sentence(json.loads(text))


@pytest.mark.spec("PROXY-23")
async def test_a_model_pulled_a_moment_ago_is_found(coordinator: Running, ollama: StandIn) -> None:
    ollama.models.add(Model("fresh"))
    await asyncio.sleep(0.6)  # an agent is not asked again within half a second
    assert (await coordinator.chat("fresh"))[0] == 200


async def test_a_full_queue_answers_in_ollamas_words() -> None:
    async with running(max_queue=1) as coordinator, StandIn() as ollama:
        agent_id = await coordinator.register(ollama)
        await coordinator.heartbeat(agent_id, runner={"num_parallel": 1})
        ollama.hold()
        running_one = asyncio.create_task(coordinator.chat())
        await ollama.seen.wait_for(lambda seen: seen.held == 1)
        waiting_one = asyncio.create_task(coordinator.chat())
        await coordinator.until(lambda: len(coordinator.parts.scheduler.waiting(0.0)) == 1)
        async with coordinator.session.post(
            f"{coordinator.url}/api/chat", json={"model": "llama3.2", "messages": []}
        ) as response:
            assert response.status == 503
            assert int(response.headers["Retry-After"]) >= 1
            answer = await response.json()
        assert answer["error"].startswith("server busy, please try again.  maximum pending")
        ollama.release()
        assert {status for status, _ in await asyncio.gather(running_one, waiting_one)} == {200}
