"""The shapes and words of Ollama's three dialects."""

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_coordinator.api.http.dialects import (
    INFERENCE_ROUTES,
    Dialect,
    Ending,
    InferenceRoute,
    error_body,
    error_record,
    read_ending,
    swallowed_error,
)
from ollama_coordinator.scheduler import Timings

BY_PATH = {route.path: route for route in INFERENCE_ROUTES}
CHAT = BY_PATH["/api/chat"]
OPENAI = BY_PATH["/v1/chat/completions"]
COMPLETIONS = BY_PATH["/v1/completions"]
RESPONSES = BY_PATH["/v1/responses"]
ANTHROPIC = BY_PATH["/v1/messages"]

each_route = pytest.mark.parametrize("route", INFERENCE_ROUTES, ids=lambda route: route.path)


# ── errors ────────────────────────────────────────────────────────────────────────────────────


def test_a_native_error_is_a_text() -> None:
    assert json.loads(error_body(Dialect.NATIVE, 404, 'no "x"')) == {"error": 'no "x"'}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (404, "not_found_error"),
        (413, "api_error"),
        (500, "api_error"),
        (503, "api_error"),
    ],
)
def test_an_openai_error_has_a_type(status: int, kind: str) -> None:
    assert json.loads(error_body(Dialect.OPENAI, status, "x")) == {
        "error": {"message": "x", "type": kind, "param": None, "code": None}
    }


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (502, "api_error"),
        (503, "overloaded_error"),
        (529, "overloaded_error"),
    ],
)
def test_an_anthropic_error_has_a_type_and_a_request(status: int, kind: str) -> None:
    body = json.loads(error_body(Dialect.ANTHROPIC, status, "x"))
    assert re.fullmatch(r"req_\w+", body.pop("request_id"))
    assert body == {"type": "error", "error": {"type": kind, "message": "x"}}


def event(record: bytes) -> tuple[str | None, Any]:
    """The name and the data of one server-sent event."""
    assert record.endswith(b"\n\n")
    fields = dict(line.split(": ", 1) for line in record.decode().strip().split("\n"))
    return fields.get("event"), json.loads(fields["data"])


@each_route
def test_an_error_record_is_one_whole_record(route: InferenceRoute) -> None:
    record = error_record(route, "agent gpu-1:\nbroken")
    separator = route.dialect.separator
    assert record.endswith(separator)
    assert record.count(separator) == 1
    assert "broken" in record.decode()


def test_a_native_stream_ends_with_an_error_line() -> None:
    assert json.loads(error_record(CHAT, "x")) == {"error": "x"}


def test_an_openai_stream_ends_with_an_error_event() -> None:
    name, data = event(error_record(OPENAI, "x"))
    assert name is None
    assert data["error"]["message"] == "x"
    assert data["error"]["type"] == "api_error"


def test_an_anthropic_stream_ends_with_an_error_event() -> None:
    name, data = event(error_record(ANTHROPIC, "x"))
    assert name == data["type"] == "error"
    assert data["error"] == {"type": "api_error", "message": "x"}


def test_a_responses_stream_ends_with_its_own_error_event() -> None:
    name, data = event(error_record(RESPONSES, "x"))
    assert name == data["type"] == "error"
    assert data["message"] == "x"


# ── what an ending tells ──────────────────────────────────────────────────────────────────────

FINAL = {
    "model": "m",
    "message": {"role": "assistant", "content": ""},
    "done": True,
    "done_reason": "stop",
    "total_duration": 5_000_000_000,
    "load_duration": 1_000_000_000,
    "prompt_eval_count": 26,
    "prompt_eval_duration": 500_000_000,
    "eval_count": 290,
    "eval_duration": 3_000_000_000,
}
TIMINGS = Timings(
    prompt_tokens=26,
    output_tokens=290,
    total_seconds=5.0,
    load_seconds=1.0,
    prompt_seconds=0.5,
    output_seconds=3.0,
)


def line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def test_the_last_line_tells_the_timings() -> None:
    assert read_ending(CHAT, line(FINAL), 290) == Ending(timings=TIMINGS)
    assert read_ending(CHAT, line({"done": False}) + line(FINAL), 290) == Ending(timings=TIMINGS)
    assert read_ending(CHAT, line(FINAL).strip(), 0) == Ending(timings=TIMINGS)


def test_durations_that_are_zero_are_left_out_by_ollama() -> None:
    told = {"done": True, "total_duration": 2_000_000_000}
    timings = read_ending(CHAT, line(told), 1).timings
    assert timings is not None
    assert (timings.total_seconds, timings.load_seconds, timings.prompt_tokens) == (2.0, 0.0, 0)


def test_the_last_line_may_be_an_error() -> None:
    last = line({"done": False}) + line({"error": "model runner has unexpectedly stopped"})
    assert read_ending(CHAT, last, 2) == Ending(error="model runner has unexpectedly stopped")


def test_an_error_before_the_last_line_is_not_the_end() -> None:
    assert read_ending(CHAT, line({"error": "x"}) + line(FINAL), 2).error is None


def test_a_stream_that_ollama_cut_short_tells_nothing() -> None:
    assert read_ending(CHAT, line({"message": {"content": "x"}, "done": False}), 31) == Ending()


def test_openai_tells_its_tokens_where_it_is_asked_to() -> None:
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}\n\n'
    told = Ending(timings=Timings(prompt_tokens=3, output_tokens=4))
    assert read_ending(OPENAI, usage + b"data: [DONE]\n\n", 9) == told
    whole = b'{"choices":[{}],"usage":{"prompt_tokens":3,"completion_tokens":4}}'
    assert read_ending(OPENAI, whole, 0) == told


def test_openai_records_stand_for_tokens_where_nothing_is_told() -> None:
    last = b'data: {"choices":[],"usage":null}\n\ndata: [DONE]\n\n'
    assert read_ending(OPENAI, last, 9) == Ending(timings=Timings(output_tokens=9))
    assert read_ending(OPENAI, b"data: [DONE]\n\n", 9).timings == Timings(output_tokens=9)


def test_anthropic_tells_its_tokens_before_it_stops() -> None:
    last = (
        b'event: message_delta\ndata: {"type":"message_delta","usage":{"input_tokens":3,'
        b'"output_tokens":4}}\n\nevent: message_stop\ndata: {"type":"message_stop"}\n\n'
    )
    assert read_ending(ANTHROPIC, last, 9).timings == Timings(prompt_tokens=3, output_tokens=4)


@each_route
@pytest.mark.parametrize(
    "last",
    [
        b"",
        b"\n",
        b"null",
        b"[]",
        b'{"error":7}',
        b'{"total_duration":"x"}',
        b'{"total_duration":' + b"9" * 400 + b"}",
        b'{"error":"\xff"}',
        b'data: {"usage":7}\n\n',
        b'data: {"usage":{"prompt_tokens":null}}\n\n',
        b'data: {"\xff":1}\n\n',
        b'data: {"a":' + b"[" * 100_000 + b"}\n\n",
        b'{"a":' + b"[" * 100_000 + b"}\n",
    ],
)
@pytest.mark.parametrize("records", [0, 1])
def test_an_ending_that_cannot_be_read_tells_nothing(
    route: InferenceRoute, last: bytes, records: int
) -> None:
    ending = read_ending(route, last, records)
    assert ending.error is None
    assert ending.timings in (None, Timings(), Timings(output_tokens=records))


PIECES = st.lists(
    st.binary(max_size=10)
    | st.sampled_from(
        [b"data: ", b"{", b"}", b"\n", b"\n\n", b'"usage":', b'{"error":"', b"[DONE]",
         b'"delta":{}', b'"finish_reason":null', b'"text":""', b'"total_duration":', b"1"]
    )
).map(b"".join)  # fmt: skip


@given(st.sampled_from(INFERENCE_ROUTES), PIECES, st.integers(0, 5))
def test_nothing_an_agent_sends_makes_reading_fail(
    route: InferenceRoute, last: bytes, records: int
) -> None:
    assert isinstance(read_ending(route, last, records), Ending)
    assert swallowed_error(route, last) in (True, False)


# ── an error that Ollama swallowed ────────────────────────────────────────────────────────────


def chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    body = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "model": "m",
        "choices": [choice],
    }
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def completion(text: str, finish: str | None = None) -> bytes:
    body = {"id": "cmpl-1", "choices": [{"text": text, "index": 0, "finish_reason": finish}]}
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


TEXT = chunk({"role": "assistant", "content": "Hi"})
EMPTY = chunk({"role": "assistant", "content": ""})


@pytest.mark.parametrize(
    "last", [EMPTY, TEXT + EMPTY, chunk({}), chunk({"content": ""}), chunk({"role": "assistant"})]
)
def test_an_empty_chunk_at_the_end_is_a_swallowed_error(last: bytes) -> None:
    assert swallowed_error(OPENAI, last)


def test_an_empty_completion_at_the_end_is_a_swallowed_error() -> None:
    assert swallowed_error(COMPLETIONS, completion("a") + completion(""))
    assert not swallowed_error(COMPLETIONS, completion("a"))
    assert not swallowed_error(COMPLETIONS, completion("", "stop") + b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    "last",
    [
        b"",
        TEXT,
        EMPTY + TEXT,
        EMPTY + b"data: [DONE]\n\n",
        chunk({"content": ""}, "stop"),
        chunk({"content": ""}, "stop") + b"data: [DONE]\n\n",
        chunk({"role": "assistant", "content": "", "reasoning": "Hm"}),
        chunk({"role": "assistant", "content": "", "tool_calls": [{}]}),
        chunk({"role": "assistant", "content": "x"}),
    ],
)
def test_an_end_with_something_to_say_is_none(last: bytes) -> None:
    assert not swallowed_error(OPENAI, last)


@pytest.mark.parametrize("route", [CHAT, RESPONSES, ANTHROPIC], ids=lambda s: s.path)
def test_only_two_routes_swallow_errors_in_this_way(route: InferenceRoute) -> None:
    assert not swallowed_error(route, EMPTY)


def test_every_route_of_the_table_is_there_once() -> None:
    assert len(BY_PATH) == len(INFERENCE_ROUTES)
    assert {path for path in BY_PATH if path.startswith("/api/")} == {
        "/api/chat", "/api/generate", "/api/embed", "/api/embeddings",
    }  # fmt: skip


# ── large and hostile ends ────────────────────────────────────────────────────────────────────

MEBIBYTE = 1024 * 1024


@pytest.mark.spec("OPERATION-31")
@pytest.mark.parametrize("vectors", [2, 400_000])
def test_the_counts_behind_the_vectors_of_a_large_answer_are_read(vectors: int) -> None:
    start = b'{"model":"m","embeddings":[[' + b",".join([b"0.25"] * vectors) + b"]],"
    native = start + b'"total_duration":2000000000,"prompt_eval_count":7}'
    ending = read_ending(BY_PATH["/api/embed"], native, 0)
    assert ending.timings is not None
    assert (ending.timings.prompt_tokens, ending.timings.total_seconds) == (7, 2.0)
    openai = start + b'"usage":{"prompt_tokens":7}}'
    ending = read_ending(BY_PATH["/v1/embeddings"], openai, 0)
    assert ending.timings is not None
    assert ending.timings.prompt_tokens == 7


@pytest.mark.spec("OPERATION-31")
@pytest.mark.parametrize(
    "last",
    [
        b'data: {"choices":[{' + b'"text":"",' * MEBIBYTE + b"}]}\n\n",
        b'data: {"choices":[{' + b'"text":"",' * MEBIBYTE + b'"finish_reason":nul}]}\n\n',
        b"data: {" + b"}" * MEBIBYTE + b"x\n\n",
        b"data: {}" + b" " * MEBIBYTE + b"x\n\n",
        b"data: {}\n" * MEBIBYTE,
        b"\n" * MEBIBYTE,
    ],
    ids=lambda last: str(last[:30]),
)
@pytest.mark.parametrize("route", [CHAT, OPENAI, COMPLETIONS, ANTHROPIC], ids=lambda r: r.path)
def test_a_hostile_end_is_passed_over_once(route: InferenceRoute, last: bytes) -> None:
    """A pattern that begins anew in every place takes hours for these."""
    assert not swallowed_error(route, last)
    assert read_ending(route, last, 3).error is None
