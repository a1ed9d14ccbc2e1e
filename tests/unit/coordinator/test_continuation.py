"""What is kept of a stream, and what becomes of the records that continue it."""

import json
from typing import Any

import pytest

from ollama_coordinator.api.http.dialects import INFERENCE_ROUTES
from ollama_coordinator.api.inference.continuation import (
    KEPT_BYTES,
    Continuing,
    Kept,
    Onward,
    Written,
)

ROUTES = {route.path: route for route in INFERENCE_ROUTES}
WRITTEN = Written("one two", 2, 1.5, "agent a: died")


def line(**fields: Any) -> bytes:
    return json.dumps(fields).encode() + b"\n"


def delta(**fields: Any) -> bytes:
    choice = {"index": 0, "delta": fields, "finish_reason": None}
    chunk = {"id": "chatcmpl-7", "created": 5, "model": "m", "choices": [choice]}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def kept(path: str, *parts: bytes) -> Written | None:
    keeping = Kept(ROUTES[path])
    for part in parts:
        keeping.add(part)
    return keeping.written(1.5, "agent a: died")


@pytest.mark.spec("PROXY-46")
def test_the_text_of_a_stream_is_read_after_a_cut() -> None:
    assert kept("/api/generate", line(response="one"), line(response=" two", done=False)) == WRITTEN
    said = [line(message={"role": "assistant", "content": text}) for text in ("one", " two")]
    assert kept("/api/chat", b"".join(said)) == WRITTEN
    written = kept(
        "/v1/chat/completions", b": hello\n\n", delta(content="one"), delta(content=" two")
    )
    assert written is not None
    assert (written.text, written.tokens) == ("one two", 2)
    assert written.head["id"] == "chatcmpl-7"
    assert written.then(WRITTEN).text == "one twoone two"
    assert written.then(WRITTEN).head == written.head


@pytest.mark.spec("PROXY-48")
@pytest.mark.parametrize(
    "record",
    [
        line(message={"content": "", "thinking": "hm"}),
        line(message={"content": "", "tool_calls": [{"function": {"name": "f"}}]}),
        line(message={"content": "x"}, logprobs=[{"token": "x"}]),
        line(message={"content": ""}, done=True),
        line(error="out of memory"),
        line(message={"content": 7}),
        b"<html>\n",
    ],
)
def test_what_has_more_than_text_is_not_continued(record: bytes) -> None:
    assert kept("/api/chat", line(message={"content": "one"}), record) is None


@pytest.mark.spec("PROXY-48")
def test_a_stream_without_text_or_a_long_one_is_not_continued() -> None:
    assert kept("/api/chat") is None
    assert kept("/api/chat", line(message={"content": ""})) is None
    long = line(message={"content": "x" * (KEPT_BYTES // 2)})
    assert kept("/api/chat", long) is not None
    assert kept("/api/chat", long, long, line(message={"content": "x"})) is None
    assert kept("/v1/chat/completions", delta(content="", reasoning="hm")) is None
    assert kept("/v1/chat/completions", b"data: [DONE]\n\n") is None


async def told(path: str, limit: int | None, *bodies: bytes, status: int = 200) -> bytes:
    sent = b""

    async def send(message: Any) -> None:
        nonlocal sent
        assert message["type"] == "http.response.body"
        sent += message["body"]

    onward = Onward(path, WRITTEN, "a", limit).by("b")
    continuing = Continuing(
        ROUTES[path], onward, b'{"stream_options":{"include_usage":true}}', send
    )
    await continuing({"type": "http.response.start", "status": status})
    for body in bodies:
        await continuing({"type": "http.response.body", "body": body, "more_body": True})
    await continuing({"type": "http.response.body", "body": b"", "more_body": False})
    return sent


END = {
    "response": "", "done": True, "done_reason": "stop", "total_duration": 10, "eval_count": 3,
    "prompt_eval_count": 12, "eval_duration": 7, "model": "m", "created_at": "now",
}  # fmt: skip


@pytest.mark.spec("PROXY-47")
async def test_records_become_those_of_the_clients_dialect() -> None:
    more = line(response=" three", model="m", created_at="now")
    chat = await told("/api/chat", None, more[:9], more[9:] + line(**END))
    first, last = map(json.loads, chat.splitlines())
    assert first == {
        "model": "m", "created_at": "now", "done": False,
        "message": {"role": "assistant", "content": " three"},
    }  # fmt: skip
    assert (last["eval_count"], last["prompt_eval_count"]) == (5, 10)
    assert (last["eval_duration"], last["total_duration"]) == (1_500_000_007, 1_500_000_010)
    assert last["continued"] == [{"from": "a", "by": "b", "tokens": 2}]
    openai = await told("/v1/chat/completions", None, more, line(**END))
    comment, first, last, usage, done, rest = openai.split(b"\n\n")
    assert comment == b": continued by agent b after 2 tokens of agent a"
    assert json.loads(first[6:])["choices"][0]["delta"]["content"] == " three"
    assert json.loads(last[6:])["choices"][0]["finish_reason"] == "stop"
    assert json.loads(usage[6:])["usage"]["total_tokens"] == 15
    assert (done, rest) == (b"data: [DONE]", b"")


@pytest.mark.spec("PROXY-47")
async def test_where_the_last_record_alone_was_missing_no_text_is_added() -> None:
    end = {**END, "response": "!", "done_reason": "length", "eval_count": 1}
    sent = await told("/api/generate", 2, line(response=" three"), line(**end))
    [last] = map(json.loads, sent.splitlines())
    assert (last["response"], last["eval_count"], last["done_reason"]) == ("", 2, "length")


@pytest.mark.spec("PROXY-48")
async def test_an_error_of_the_agent_that_continues_is_told_in_the_clients_dialect() -> None:
    assert json.loads(await told("/api/chat", None, line(error="no"))) == {"error": "no"}
    sent = await told("/v1/chat/completions", None, line(error="no"), status=400)
    assert json.loads(sent.removeprefix(b"data: "))["error"]["message"] == "no"
    assert b"error" in await told("/api/chat", None, b"<html>\n")
