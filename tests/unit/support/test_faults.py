"""Each way to fail, as a client meets it, and the way back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, Literal

import aiohttp
import ollama
import pytest

from support.ollama import HEALTH_PATHS, Model, StandIn
from support.ollama.wire import BUSY, OUT_OF_MEMORY, RUNNER_DIED

# Long enough for anything on loopback that happens at all; only spent where nothing may happen.
SILENCE_SECONDS = 0.3


@pytest.fixture
async def node() -> AsyncIterator[StandIn]:
    async with StandIn([Model("a"), Model("b")], control_port=0) as node:
        yield node


async def chat(http: aiohttp.ClientSession, node: StandIn, **body: Any) -> list[Any]:
    """The lines of a streamed chat, errors in transport raised."""
    sent = {"model": "a", "messages": [{"role": "user", "content": "hi"}], **body}
    async with http.post(node.url + "/api/chat", json=sent) as answer:
        answer.raise_for_status()
        return [json.loads(line) async for line in answer.content]


async def received(
    http: aiohttp.ClientSession, node: StandIn, path: str, **body: Any
) -> tuple[bytes, BaseException | None]:
    """What came before the end, and the error it ended with, if it did."""
    sent = {"model": "a", "messages": [{"role": "user", "content": "hi"}], "stream": True, **body}
    got = b""
    try:
        async with http.post(node.url + path, json=sent) as answer:
            async for chunk in answer.content.iter_any():
                got += chunk
    except aiohttp.ClientError as exc:
        return got, exc
    return got, None


async def silent(http: aiohttp.ClientSession, node: StandIn, path: str = "/api/version") -> bool:
    timeout = aiohttp.ClientTimeout(total=SILENCE_SECONDS)
    try:
        async with http.get(node.url + path, timeout=timeout):
            return False
    except TimeoutError:
        return True


async def test_refuse_closes_the_port_and_clearing_opens_it(
    http: aiohttp.ClientSession, node: StandIn
) -> None:
    await chat(http, node)
    with node.faults.refuse(), pytest.raises(aiohttp.ClientConnectionError):
        await chat(http, node)
    assert len(await chat(http, node)) == 17


async def test_refuse_lets_running_streams_end(http: aiohttp.ClientSession, node: StandIn) -> None:
    node.hold(after=1)
    running = asyncio.create_task(chat(http, node))
    await node.seen.wait_for(lambda seen: seen.held == 1)
    with node.faults.refuse():
        node.release()
        assert (await running)[-1]["done"]


async def test_reset_on_accept(http: aiohttp.ClientSession, node: StandIn) -> None:
    node.faults.reset_on_accept(times=1)
    with pytest.raises(aiohttp.ClientOSError):
        await received_or_raise(http, node)
    assert len(await chat(http, node)) == 17


async def received_or_raise(http: aiohttp.ClientSession, node: StandIn) -> None:
    """POST, which aiohttp does not repeat by itself."""
    async with http.post(node.url + "/api/show", json={"model": "a"}):
        pass


@pytest.mark.parametrize("kind", ["fin", "rst"])
async def test_a_connection_that_ends_before_headers(
    http: aiohttp.ClientSession, node: StandIn, kind: Literal["fin", "rst"]
) -> None:
    injected = node.faults.fin(times=1) if kind == "fin" else node.faults.rst(times=1)
    expected = aiohttp.ServerDisconnectedError if kind == "fin" else aiohttp.ClientOSError
    with pytest.raises(expected):
        await received_or_raise(http, node)
    assert injected.hits == 1
    assert node.seen.last.outcome == "failed"
    assert len(await chat(http, node)) == 17


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/chat", {"error": BUSY}),
        (
            "/v1/chat/completions",
            {"error": {"message": BUSY, "type": "api_error", "param": None, "code": None}},
        ),
    ],
)
async def test_a_status_for_the_next_requests_in_the_routes_shape(
    http: aiohttp.ClientSession, node: StandIn, path: str, body: Any
) -> None:
    node.faults.busy(times=2, headers={"Retry-After": "3"})
    for _ in range(2):
        async with http.post(node.url + path, json={"model": "a"}) as answer:
            assert (answer.status, await answer.json()) == (503, body)
            assert answer.headers["Retry-After"] == "3"
    assert len(await chat(http, node)) == 17


async def test_a_status_with_a_body_of_its_own(http: aiohttp.ClientSession, node: StandIn) -> None:
    with node.faults.status(502, raw="<h1>Bad gateway</h1>"):
        async with http.get(node.url + "/api/tags") as answer:
            assert (answer.status, await answer.text()) == (502, "<h1>Bad gateway</h1>")
    with node.faults.status(429, {"detail": "slow down"}):
        async with http.get(node.url + "/api/tags") as answer:
            assert (answer.status, await answer.json()) == (429, {"detail": "slow down"})


async def test_only_health_routes_fail(http: aiohttp.ClientSession, node: StandIn) -> None:
    with node.faults.unhealthy():
        for path in ("/api/tags", "/api/ps", "/api/version"):
            async with http.get(node.url + path) as answer:
                assert answer.status == 500
        assert len(await chat(http, node)) == 17


async def test_only_one_model_fails(http: aiohttp.ClientSession, node: StandIn) -> None:
    with node.faults.status(500, "broken", model="B:latest"):
        assert len(await chat(http, node)) == 17
        with pytest.raises(aiohttp.ClientResponseError):
            await chat(http, node, model="b")


async def test_paths_match_by_their_beginning_too(
    http: aiohttp.ClientSession, node: StandIn
) -> None:
    with node.faults.status(500, paths=["/v1/*"]):
        async with http.get(node.url + "/v1/models") as answer:
            assert answer.status == 500
        async with http.get(node.url + "/api/tags") as answer:
            assert answer.status == 200


async def test_a_probability_is_repeatable(http: aiohttp.ClientSession) -> None:
    async def statuses() -> list[int]:
        async with StandIn(seed=7) as node:
            node.faults.status(500, probability=0.5)
            got = []
            for _ in range(12):
                async with http.get(node.url + "/api/tags") as answer:
                    got.append(answer.status)
            return got

    first = await statuses()
    assert set(first) == {200, 500}
    assert await statuses() == first


async def test_a_hung_request_is_read_and_not_answered(
    http: aiohttp.ClientSession, node: StandIn
) -> None:
    hang = node.faults.hang(times=1)
    running = asyncio.create_task(chat(http, node))
    await node.seen.wait_for(lambda seen: seen.faulted == 1)
    assert node.seen.last.body_bytes > 0
    hang.clear()
    assert (await running)[-1]["done"]


async def test_leaving_a_hung_request_counts_as_cancelled(
    http: aiohttp.ClientSession, node: StandIn
) -> None:
    node.faults.hang()
    running = asyncio.create_task(chat(http, node))
    await node.seen.wait_for(lambda seen: seen.faulted == 1)
    running.cancel()
    await node.seen.wait_for(lambda seen: seen.cancelled == 1 and seen.faulted == 0)


async def test_a_slow_start_accepts_and_is_silent(
    http: aiohttp.ClientSession, node: StandIn
) -> None:
    with node.faults.slow_start():
        running = asyncio.create_task(chat(http, node))
        await node.seen.wait_for(lambda seen: seen.faulted == 1)
        assert node.seen.connections == 1
        assert node.seen.last.body_bytes == 0
    assert (await running)[-1]["done"]


async def test_a_black_hole_swallows_connects_and_silences_streams(
    http: aiohttp.ClientSession, node: StandIn
) -> None:
    node.hold(after=1)
    running = asyncio.create_task(chat(http, node))
    await node.seen.wait_for(lambda seen: seen.held == 1)
    accepted = node.seen.connections
    hole = node.faults.black_hole()
    node.release()
    async with aiohttp.ClientSession() as other:
        assert await silent(other, node)
    assert node.seen.connections == accepted
    assert not running.done()
    hole.clear()
    assert (await running)[-1]["done"]
    async with aiohttp.ClientSession() as other:
        assert len(await chat(other, node)) == 17


@pytest.mark.parametrize("stream", [True, False])
async def test_a_stall_goes_on_when_cleared(
    http: aiohttp.ClientSession, node: StandIn, stream: bool
) -> None:
    stall = node.faults.stall(after=3)
    running = asyncio.create_task(chat(http, node, stream=stream))
    await node.seen.wait_for(lambda seen: seen.faulted == 1)
    assert not running.done()
    stall.clear()
    assert (await running)[-1]["done"]


async def test_a_stall_goes_on_after_its_time(http: aiohttp.ClientSession, node: StandIn) -> None:
    node.faults.stall(after=3, seconds=0.01)
    assert (await chat(http, node))[-1]["done"]


@pytest.mark.parametrize("how", ["rst", "fin"])
async def test_a_cut_comes_after_so_many_pieces(
    http: aiohttp.ClientSession, node: StandIn, how: Literal["rst", "fin"]
) -> None:
    node.faults.cut(after=3, how=how, times=1)
    got, error = await received(http, node, "/api/chat")
    assert len(got.splitlines()) == 3
    assert isinstance(error, aiohttp.ClientError)
    assert node.seen.failed == 1
    assert node.seen.active == 0
    got, error = await received(http, node, "/api/chat")
    assert error is None


async def test_an_answer_that_is_not_streamed_is_cut_before_its_headers(
    http: aiohttp.ClientSession, node: StandIn
) -> None:
    node.faults.cut(after=3, how="fin")
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await chat(http, node, stream=False)
    assert node.seen.tokens == 4


async def test_a_malformed_line_is_followed_by_the_rest(
    http: aiohttp.ClientSession, node: StandIn
) -> None:
    node.faults.malformed(after=2, times=1)
    got, error = await received(http, node, "/api/chat")
    lines = got.splitlines()
    assert error is None
    assert len(lines) == 18
    with pytest.raises(json.JSONDecodeError):
        json.loads(lines[2])
    assert json.loads(lines[-1])["done"]


@pytest.mark.parametrize(
    ("path", "terminator"),
    [
        ("/api/chat", b'"done":true'),
        ("/v1/chat/completions", b"[DONE]"),
        ("/v1/responses", b"response.completed"),
        ("/v1/messages", b"message_stop"),
    ],
)
@pytest.mark.parametrize("kind", ["end_without_done", "error_line", "none"])
async def test_what_a_terminator_is_missing_from(
    http: aiohttp.ClientSession, node: StandIn, path: str, terminator: bytes, kind: str
) -> None:
    if kind == "end_without_done":
        node.faults.end_without_done(after=2)
    elif kind == "error_line":
        node.faults.error_line(after=2)
    body = {"input": "hi", "max_tokens": 9}
    got, error = await received(http, node, path, **body)
    assert error is None
    assert (terminator in got) == (kind == "none")
    told = json.dumps({"error": RUNNER_DIED}, separators=(",", ":")).encode()
    assert (told in got) == (kind == "error_line" and path == "/api/chat")


async def test_an_error_before_the_first_piece_is_a_status(
    http: aiohttp.ClientSession, node: StandIn
) -> None:
    node.faults.error_line(after=0)
    with pytest.raises(aiohttp.ClientResponseError) as caught:
        await chat(http, node)
    assert caught.value.status == 500


async def test_a_fault_longer_than_the_answer_strikes_at_its_end(
    http: aiohttp.ClientSession, node: StandIn
) -> None:
    node.faults.end_without_done(after=1000)
    lines = await chat(http, node)
    assert len(lines) == 16
    assert not lines[-1]["done"]


@pytest.mark.parametrize("kind", ["cut", "malformed", "error_line"])
async def test_stream_faults_also_strike_routes_that_do_not_stream(
    http: aiohttp.ClientSession, node: StandIn, kind: str
) -> None:
    if kind == "cut":
        node.faults.cut(paths=["/api/tags"], how="fin")
        with pytest.raises(aiohttp.ServerDisconnectedError):
            async with http.get(node.url + "/api/tags"):
                pass
        return
    inject = node.faults.malformed if kind == "malformed" else node.faults.error_line
    inject(paths=["/api/tags"])
    async with http.get(node.url + "/api/tags") as answer:
        assert answer.status == (200 if kind == "malformed" else 500)
        if kind == "malformed":
            with pytest.raises(json.JSONDecodeError):
                await answer.json()


async def test_pull_can_fail_on_the_way(http: aiohttp.ClientSession) -> None:
    async with StandIn([], registry=[Model("m")]) as node:
        node.faults.error_line("max retries exceeded: EOF", after=2, times=1)
        async with http.post(node.url + "/api/pull", json={"model": "m"}) as answer:
            lines = [json.loads(line) async for line in answer.content]
        assert lines[-1] == {"error": "max retries exceeded: EOF"}
        assert "m" not in node.models


async def test_a_load_that_fails(http: aiohttp.ClientSession, node: StandIn) -> None:
    node.faults.load_fails(model="a", times=1)
    client = ollama.AsyncClient(host=node.url)
    with pytest.raises(ollama.ResponseError, match="out of memory") as caught:
        await client.generate("a", "hi")
    assert caught.value.status_code == 500
    assert node.loaded == []
    assert (await client.generate("a", "hi")).done
    assert (node.seen.loads, node.seen.loads_failed) == (1, 1)
    await client._client.aclose()


async def test_running_out_of_memory_unloads_everything(
    http: aiohttp.ClientSession, node: StandIn
) -> None:
    await chat(http, node, model="b")
    node.faults.out_of_memory(after=2, times=1)
    lines = await chat(http, node)
    assert lines[-1] == {"error": OUT_OF_MEMORY}
    assert node.loaded == []


@pytest.mark.parametrize("how", ["rst", "fin"])
async def test_a_killed_node_cuts_everything_and_comes_back_empty(
    http: aiohttp.ClientSession, node: StandIn, how: Literal["rst", "fin"]
) -> None:
    node.hold(after=2)
    running = asyncio.create_task(received(http, node, "/api/chat"))
    await node.seen.wait_for(lambda seen: seen.held == 1)
    await node.kill(how)
    got, error = await running
    assert len(got.splitlines()) == 2
    assert error is not None
    with pytest.raises(aiohttp.ClientConnectorError):
        await chat(http, node)
    node.release()
    await node.start()
    assert node.loaded == []
    assert len(await chat(http, node)) == 17


async def test_the_control_port_is_immune_and_drives_everything(
    http: aiohttp.ClientSession, node: StandIn
) -> None:
    assert node.control is not None
    control = node.control.url

    async def call(method: str, path: str, body: Any = None) -> Any:
        async with http.request(method, control + path, json=body) as answer:
            assert answer.status == 200, await answer.text()
            return await answer.json()

    listed = await call("POST", "/faults", [{"kind": "refuse"}, {"kind": "status", "times": 1}])
    assert [fault["kind"] for fault in listed] == ["refuse", "status"]
    with pytest.raises(aiohttp.ClientConnectorError):
        await chat(http, node)
    assert await call("DELETE", "/faults") == []
    await call("POST", "/hold", {"after": 1})
    running = asyncio.create_task(chat(http, node))
    await node.seen.wait_for(lambda seen: seen.held == 1)
    assert (await call("GET", "/seen"))["active"] == 1
    await call("POST", "/release")
    assert len(await running) == 17
    seen = await call("GET", "/seen?requests")
    assert seen["paths"] == {"/api/chat": 1}
    assert seen["requests"][0]["outcome"] == "completed"
    assert (await call("POST", "/reset"))["completed"] == 0


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/faults", '{"kind":"earthquake"}', 400),
        ("POST", "/faults", '{"kind":"hang","typo":1}', 400),
        ("POST", "/faults", "hang", 400),
        ("GET", "/nope", None, 404),
    ],
)
async def test_the_control_port_says_what_it_did_not_understand(
    http: aiohttp.ClientSession, node: StandIn, method: str, path: str, body: Any, status: int
) -> None:
    assert node.control is not None
    async with http.request(method, node.control.url + path, data=body) as answer:
        assert answer.status == status
        assert (await answer.json())["error"]


async def test_what_befalls_an_answer_befalls_no_probe_unless_asked_to(
    http: aiohttp.ClientSession, node: StandIn
) -> None:
    node.faults.stall()
    for path in HEALTH_PATHS:
        assert not await silent(http, node, path)
    assert await silent(http, node, "/v1/models")
    node.faults.stall(paths=HEALTH_PATHS)
    for path in HEALTH_PATHS:
        assert await silent(http, node, path)
