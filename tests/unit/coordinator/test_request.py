"""What is read of a request, by an eye as lenient as Ollama's."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from starlette.types import Message, Receive

from ollama_coordinator.api.http import json_edit
from ollama_coordinator.api.http.dialects import INFERENCE_ROUTES, Dialect, InferenceRoute
from ollama_coordinator.api.http.errors import ClientLeft, HttpError
from ollama_coordinator.api.inference.request import (
    TOKENS_PER_IMAGE,
    Routing,
    read_any,
    read_body,
    read_routing,
)
from ollama_coordinator.scheduler import Form, RunnerOptions

BY_PATH = {route.path: route for route in INFERENCE_ROUTES}
CHAT = BY_PATH["/api/chat"]
GENERATE = BY_PATH["/api/generate"]
EMBED = BY_PATH["/api/embed"]
OPENAI = BY_PATH["/v1/chat/completions"]
NATIVE = [route for route in INFERENCE_ROUTES if route.dialect is Dialect.NATIVE]


def routing(body: Any, route: InferenceRoute = CHAT) -> Routing:
    encoded = body if isinstance(body, bytes) else json.dumps(body).encode()
    return read_routing(route, encoded)


def refused(body: bytes, route: InferenceRoute = CHAT) -> tuple[int, str]:
    with pytest.raises(HttpError) as caught:
        read_routing(route, body)
    return caught.value.status, str(caught.value)


# ── the name ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"m"}',
        b' \r\n\t{ "model" : "m" }\n',
        b'{"model":"m"} and whatever follows',
        b'{"model":"m"}{"model":"n"}',
        b'{"model":"n","model":"m"}',
        b'{"MODEL":"m"}',
        b'{"Model":"n","mOdel":"m"}',
        b'{"mod\\u0065l":"m"}',
        b'{"model":"m","messages":"\xff"}',
        b'{"model":"m","unknown":{"a":[1,2,{"b":null}]}}',
        b'{"Model":"m","seed":' + b"1" * 5000 + b"}",
        b'{"Model":"m","messages":[{"content":"\\ud800"}]}',
    ],
)
def test_the_name_is_found_as_ollamas_decoder_finds_it(body: bytes) -> None:
    assert routing(body).name == "m"


def test_the_name_stays_as_the_client_wrote_it() -> None:
    assert routing({"model": "Library/Qwen3:4B"}).name == "Library/Qwen3:4B"


@pytest.mark.parametrize("route", INFERENCE_ROUTES, ids=lambda route: route.path)
@pytest.mark.parametrize(
    ("body", "name"),
    [
        *((body, "") for body in (b"{}", b"null", b'{"model":""}', b'{"model":null}', b'{"n":1}')),
        (b'{"model":" "}', " "),
    ],
)
def test_a_request_without_a_name_gets_its_routes_answer(
    route: InferenceRoute, body: bytes, name: str
) -> None:
    assert refused(body, route) == route.nameless(name)


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/api/chat", (400, "model is required")),
        ("/api/generate", (404, "model '' not found")),
        ("/api/embed", (404, "model '' not found")),
        ("/api/embeddings", (400, "model is required")),
    ],
)
def test_ollamas_routes_disagree_on_a_missing_name(path: str, answer: tuple[int, str]) -> None:
    assert BY_PATH[path].nameless("") == answer


@pytest.mark.spec("SCHED-54")
@pytest.mark.parametrize(
    ("fields", "native", "openai"),
    [
        ({}, Form.STREAM, Form.WHOLE),
        ({"stream": True}, Form.STREAM, Form.STREAM),
        ({"stream": False}, Form.WHOLE, Form.WHOLE),
        ({"stream": None, "tools": [], "format": ""}, Form.STREAM, Form.WHOLE),
        ({"stream": True, "tools": [{"type": "function"}]}, Form.TOOLS, Form.TOOLS),
        ({"stream": True, "format": "json"}, Form.FORMAT, Form.FORMAT),
        ({"stream": True, "response_format": {"type": "text"}}, Form.STREAM, Form.STREAM),
        ({"stream": True, "response_format": {"type": "json_object"}}, Form.FORMAT, Form.FORMAT),
        ({"Stream": True, "stream": False}, Form.WHOLE, Form.WHOLE),
    ],
)
def test_the_form_of_an_answer_is_read(fields: dict[str, Any], native: Form, openai: Form) -> None:
    body = {"model": "m", "messages": [], **fields}
    assert routing(body).form is native
    assert routing(body, OPENAI).form is openai


@pytest.mark.parametrize("body", [b"", b" \r\n"])
def test_an_empty_body_is_told_in_the_routes_words(body: bytes) -> None:
    assert refused(body) == (400, "missing request body")
    assert refused(body, OPENAI) == (400, "EOF")


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"xyz", "invalid character 'x' looking for beginning of value"),
        (b"'{model:m}'", r"invalid character '\'' looking for beginning of value"),
        (b"{model:1}", "invalid character 'm' looking for beginning of object key string"),
        (b'{"model" "m"}', "invalid character '\"' after object key"),
        (b'{"model":"m" "a":1}', "invalid character '\"' after object key:value pair"),
        (b'{"model":"m",}', "invalid character '}' looking for beginning of object key string"),
        (b'{"model":}', "invalid character '}' looking for beginning of value"),
        (b'{"Model":"a\nb"}', r"invalid character '\n' in string literal"),
        (b'{"Model":"a\\x"}', "invalid character 'x' in string escape code"),
        (b'{"model":["m",]}', "invalid character ']' looking for beginning of value"),
        (b'{"model":"m"', "unexpected EOF"),
        (b'{"model":"m', "unexpected EOF"),
        (b'{"model":', "unexpected EOF"),
        (b"{", "unexpected EOF"),
        (b'{"Model":NaN}', "invalid character 'N' looking for beginning of value"),
        (b"[]", "json: cannot unmarshal array into Go value of type api.ChatRequest"),
        (b'"m"', "json: cannot unmarshal string into Go value of type api.ChatRequest"),
        (b"7", "json: cannot unmarshal number into Go value of type api.ChatRequest"),
        (b"true", "json: cannot unmarshal bool into Go value of type api.ChatRequest"),
        (
            b'{"model":7}',
            "json: cannot unmarshal number into Go struct field ChatRequest.model of type string",
        ),
        (
            b'{"model":["m"]}',
            "json: cannot unmarshal array into Go struct field ChatRequest.model of type string",
        ),
        (
            b'{"model":{}}',
            "json: cannot unmarshal object into Go struct field ChatRequest.model of type string",
        ),
    ],
)
def test_bad_json_is_told_in_the_words_of_gos_decoder(body: bytes, text: str) -> None:
    assert refused(body) == (400, text)


@pytest.mark.parametrize("start", [b'{"model":"m","a":', b'{"model":"m","messages":', b""])
def test_nesting_without_an_end_is_refused_and_nothing_worse(start: bytes) -> None:
    status, _ = refused(start + b"[" * 200_000)
    assert status == 400


ODD: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(-1e9, 1e9) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    ["messages", "prompt", "input", "images", "options", "keep_alive", "shift", "max_tokens",
     "max_completion_tokens", "stream", "Messages", "OPTIONS"]
)  # fmt: skip


@given(st.dictionaries(FIELDS, ODD), st.sampled_from(INFERENCE_ROUTES), st.booleans())
def test_no_other_field_matters_whatever_it_holds(
    odd: dict[str, Any], route: InferenceRoute, slow: bool
) -> None:
    assert routing({**odd, "Model" if slow else "model": "m"}, route).name == "m"


@given(st.dictionaries(st.sampled_from(["num_ctx", "num_predict", "num_gpu", "use_mmap"]), ODD))
def test_no_option_matters_whatever_it_holds(options: dict[str, Any]) -> None:
    assert routing({"model": "m", "options": options}).name == "m"


@given(st.binary() | st.builds(lambda data: b'{"model":"m",' + data, st.binary()))
@example(b'{"model":"m","messages":[{"content":"\xff"}]}')
def test_any_bytes_are_read_or_refused_by_status(body: bytes) -> None:
    try:
        assert read_routing(CHAT, body).name
        status = 200
    except HttpError as error:
        status = error.status
    assert status in (200, 400)


# ── what estimates need ───────────────────────────────────────────────────────────────────────


def test_text_counts_by_its_length() -> None:
    assert routing({"model": "m", "prompt": "x" * 398}, GENERATE).prompt_tokens == 100
    assert routing({"model": "m", "input": ["x" * 398]}, EMBED).prompt_tokens == 100
    turns = [{"role": "user", "content": "x" * 398}] * 3
    assert routing({"model": "m", "messages": turns}).prompt_tokens == 300


def test_an_image_counts_as_an_image_and_not_as_its_bytes() -> None:
    image = "A" * 400_000
    native = {"role": "user", "content": "look", "images": [image, image]}
    assert routing({"model": "m", "messages": [native]}).prompt_tokens == 1 + 2 * TOKENS_PER_IMAGE
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}}
    inline = {"role": "user", "content": [{"type": "text", "text": "look"}, part]}
    assert routing({"model": "m", "messages": [inline]}, OPENAI).prompt_tokens == TOKENS_PER_IMAGE


MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from("us"), "content": st.text(max_size=5)}),
    max_size=6,
)


def chain(messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
    return routing({"model": "m", "messages": list(messages)}).prefix


@given(MESSAGES, MESSAGES)
def test_the_chain_of_a_conversation_begins_with_that_of_its_beginning(
    beginning: list[dict[str, str]], more: list[dict[str, str]]
) -> None:
    whole = chain(beginning + more)
    assert len(whole) == len(beginning) + len(more)
    assert whole[: len(beginning)] == chain(beginning)


@given(MESSAGES, MESSAGES)
def test_conversations_share_a_chain_as_far_as_they_share_messages(
    one: list[dict[str, str]], other: list[dict[str, str]]
) -> None:
    same = [a == b for a, b in zip(chain(one), chain(other), strict=False)]
    texts = [json.dumps(message) for message in one], [json.dumps(message) for message in other]
    shared = [texts[0][: i + 1] == texts[1][: i + 1] for i in range(len(same))]
    assert same == shared


@pytest.mark.parametrize(
    ("more", "limit"),
    [
        ({}, None),
        ({"options": {"num_predict": 9}}, 9),
        ({"options": {"num_predict": -1}}, None),
        ({"options": {"num_predict": "x"}}, None),
        ({"max_tokens": 9}, 9),
        ({"max_completion_tokens": 9}, 9),
        ({"max_tokens": None, "max_completion_tokens": 9}, 9),
        ({"max_tokens": 9, "max_completion_tokens": None}, 9),
        ({"max_tokens": 0}, 0),
    ],
)
def test_the_clients_own_bound_is_read(more: dict[str, Any], limit: int | None) -> None:
    assert routing({"model": "m", **more}).output_limit == limit


def test_the_options_that_decide_a_reload_are_read() -> None:
    options = {"num_ctx": 8192, "num_gpu": -1, "use_mmap": False, "temperature": 0.5, "stop": []}
    read = routing({"model": "m", "options": options}).options
    assert read == RunnerOptions(num_ctx=8192, num_gpu=-1, use_mmap=False)
    assert routing({"Model": "m", "Options": options}).options == read


@pytest.mark.parametrize(
    ("shift", "read"), [(True, True), (False, False), (None, None), ("x", None)]
)
def test_shift_is_read_where_it_is_said(shift: Any, read: bool | None) -> None:
    assert routing({"model": "m", "shift": shift}).options.shift is read


# ── load and unload ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("route", NATIVE, ids=lambda route: route.path)
@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"m"}',
        b'{"model":"m","stream":false,"options":{}}',
        b'{"model":"m","prompt":"","input":"","messages":[],"images":null}',
        b'{"model":"m","messages":[ ],"input":[\n]}',
        b'{"Model":"m","Messages":[]}',
    ],
)
def test_a_request_with_nothing_to_say_only_loads(route: InferenceRoute, body: bytes) -> None:
    read = routing(body, route)
    assert read.load_only
    assert not read.unload_only


@pytest.mark.parametrize(
    "more",
    [{"prompt": " "}, {"messages": [{}]}, {"input": ["x"]}, {"images": ["x"]}, {"input": [""]}],
)
def test_a_request_with_something_to_say_does_more(more: dict[str, Any]) -> None:
    assert not routing({"model": "m", "keep_alive": 0, **more}).load_only
    assert not routing({"model": "m", "keep_alive": 0, **more}).unload_only


def test_only_ollamas_own_routes_load_without_generating() -> None:
    assert not routing({"model": "m", "messages": []}, OPENAI).load_only


@pytest.mark.parametrize(
    "keep_alive", [b"0", b"0.0", b"-0", b'"0"', b'"0s"', b'"0m"', b'"0h0m0s"', b'"0ms"', b'"-0s"']
)
def test_a_keep_alive_of_nothing_unloads(keep_alive: bytes) -> None:
    assert routing(b'{"model":"m","keep_alive":' + keep_alive + b"}").unload_only


@pytest.mark.parametrize(
    "keep_alive",
    [b"1", b"-1", b"0.5", b'"5m"', b'"0h1m"', b'"-1"', b"null", b'""', b"false", b"[0]", b'"x0"',
     b'"' + b"0" * 100_000 + b'x"'],
)  # fmt: skip
def test_another_keep_alive_does_not(keep_alive: bytes) -> None:
    assert not routing(b'{"model":"m","keep_alive":' + keep_alive + b"}").unload_only


# ── the body ──────────────────────────────────────────────────────────────────────────────────


def receiving(*messages: Message) -> Receive:
    left = list(messages)

    async def receive() -> Message:
        return left.pop(0)

    return receive


def part(body: bytes, more: bool = False) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


async def test_a_body_is_joined_from_its_parts() -> None:
    assert await read_body(receiving(part(b"ab", True), part(b"", True), part(b"c")), 3, {}) == (
        b"abc"
    )
    assert await read_body(receiving({"type": "http.request"}), 3, {}) == b""


async def test_a_body_of_exactly_the_limit_is_taken() -> None:
    assert await read_body(receiving(part(b"abc")), 3, {b"content-length": b"3"}) == b"abc"


async def test_a_body_that_announces_too_much_is_refused_before_it_is_read() -> None:
    with pytest.raises(HttpError, match=r"the limit is 3 bytes \(COORDINATOR_MAX_BODY_MIB\)") as e:
        await read_body(receiving(), 3, {b"content-length": b"4"})
    assert e.value.status == 413


@pytest.mark.parametrize("length", [b"", b"-1", b"9,9", b"x"])
async def test_a_length_that_is_no_number_announces_nothing(length: bytes) -> None:
    assert await read_body(receiving(part(b"abc")), 3, {b"content-length": length}) == b"abc"


async def test_a_body_that_grows_too_large_is_refused_at_once() -> None:
    with pytest.raises(HttpError) as caught:
        await read_body(receiving(part(b"ab", True), part(b"cd", True)), 3, {})
    assert caught.value.status == 413


async def test_a_client_that_leaves_in_the_middle_of_its_body_is_gone() -> None:
    with pytest.raises(ClientLeft):
        await read_body(receiving(part(b"ab", True), {"type": "http.disconnect"}), 9, {})


# ── both ways of reading ──────────────────────────────────────────────────────────────────────

SPELLED = st.sampled_from(
    ["model", "Model", "MODEL", "prompt", "Prompt", "options", "keep_alive", "Keep_Alive", "other"]
)
VALUES = {
    "model": st.sampled_from(["a", "b", "c"]),
    "prompt": st.text("xyz ", max_size=60),
    "options": st.fixed_dictionaries({"num_predict": st.integers(0, 99)}),
    "keep_alive": st.sampled_from([0, "0s", "5m", -1]),
    "other": st.none() | st.integers(),
}
MEMBERS = st.lists(SPELLED.flatmap(lambda key: st.tuples(st.just(key), VALUES[key.lower()])))


def written(members: Sequence[tuple[str, Any]]) -> bytes:
    """An object with these members, also where their keys are alike."""
    pairs = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in members)
    return ("{" + ", ".join(pairs) + "}").encode()


@pytest.mark.spec("PROXY-21")
@example([("model", "a"), ("Model", "b")])
@example([("Model", "a"), ("model", "b")])
@example([("model", "a"), ("Model", "b"), ("model", "c")])
@example([("model", "a"), ("prompt", "x" * 60), ("Prompt", "")])
@given(MEMBERS.map(lambda members: [*members, ("model", "d")]) | MEMBERS)
def test_the_last_of_keys_alike_counts_however_it_is_read(members: list[tuple[str, Any]]) -> None:
    last = {key.lower(): value for key, value in members}
    if "model" not in last:
        return
    read = routing(written(members), GENERATE)
    assert read.name == last["model"]
    assert read.prompt_tokens == len(json.dumps(last.get("prompt", ""))) // 4 * ("prompt" in last)
    assert read.output_limit == last.get("options", {}).get("num_predict")
    slow = read_routing_slowly(written(members))
    assert read == slow


def read_routing_slowly(body: bytes) -> Routing:
    """The same by the slow path, which what follows the first value leads to."""
    return routing(body + b" and more", GENERATE)


# ── bodies of any size ────────────────────────────────────────────────────────────────────────

MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant"]),
        "content": st.text('xyz "\\[{é', max_size=60),
        "images": st.lists(st.text("AB", max_size=9), max_size=3),
    },
)
CONVERSATION = st.fixed_dictionaries(
    {"model": st.sampled_from(["a", "b"]), "messages": st.lists(MESSAGE, max_size=4)},
    optional={
        "options": st.fixed_dictionaries({"num_ctx": st.integers(1, 99)}),
        "prompt": st.text('xyz "\\[{é'),
        "keep_alive": st.sampled_from([0, "5m"]),
        "tools": st.recursive(
            st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner)
        ),
    },
)


@pytest.fixture
def in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every body counts as a large one."""
    monkeypatch.setattr(json_edit, "AT_ONCE_BYTES", 0)


async def read(body: bytes, route: InferenceRoute = CHAT) -> Routing:
    return await read_any(route, bytearray(body), asyncio.Lock())


@pytest.mark.spec("OPERATION-30")
@pytest.mark.usefixtures("in_slices")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CONVERSATION, st.sampled_from([None, 1]))
def test_a_large_body_is_read_as_a_small_one(body: dict[str, Any], indent: int | None) -> None:
    encoded = json.dumps(body, indent=indent).encode()
    assert asyncio.run(read(encoded)) == read_routing(CHAT, encoded)


async def test_a_long_message_is_the_same_in_a_small_and_in_a_large_body() -> None:
    image = [{"content": "look", "images": ["A" * 100_000]}]
    small = json.dumps({"model": "m", "messages": image}).encode()
    large = json.dumps({"model": "m", "messages": [*image, {"content": "x" * 300_000}]}).encode()
    read_small, read_large = await read(small), await read(large)
    assert read_small.prefix == read_large.prefix[:1]
    assert read_small.prompt_tokens == TOKENS_PER_IMAGE + 1


KEY = "looking for beginning of object key string"
FIELD = "Go struct field ChatRequest.model of type string"
BLANKS = b'{"model":"m"' + b" " * 100_000 + b"}"
GO, HAS = "json: cannot unmarshal", "request body has"
MANY_FIELDS = b"{" + b",".join(b'"%d":0' % n for n in range(10_002)) + b"}"
MANY_VALUES = b'{"model":"m","x":[' + b"[]," * 1_001_000 + b"[]]}"
LONG_NAME = b'{"model":"' + b"m" * 10_000_000 + b'"}'


@pytest.mark.spec("OPERATION-30")
@pytest.mark.parametrize(
    ("body", "answer"),
    [
        (b'{"model":"m"', (400, "unexpected EOF")),
        (b'{"model":"m\\', (400, "unexpected EOF")),
        (b'{"model":"m\\"', (400, "unexpected EOF")),
        (b'{"model":"m","messages":[', (400, "unexpected EOF")),
        (b'{"model":"m",}', (400, f"invalid character '}}' {KEY}")),
        (b'{"model" "m"}', (400, "invalid character '\"' after object key")),
        (b'{"model":"m" 1}', (400, "invalid character '1' after object key:value pair")),
        (b'{"model":}', (400, "invalid character '}' looking for beginning of value")),
        (b'{"model":"m","messages":[1 2]}', (400, "invalid character '2' after array element")),
        (b"[]", (400, f"{GO} array into Go value of type api.ChatRequest")),
        (b" []", (400, f"{GO} array into Go value of type api.ChatRequest")),
        (b'"' + b"x" * 100_000 + b'"', (400, f"{GO} string into Go value of type api.ChatRequest")),
        (b"7", (400, f"{GO} number into Go value of type api.ChatRequest")),
        (b"x", (400, "invalid character 'x' looking for beginning of value")),
        (b"null", (400, "model is required")),
        (b"[1", (400, "unexpected EOF")),
        (b"[" * 10_001, (400, "invalid character '[' exceeded max depth")),
        (b"[" * 10_000, (400, "unexpected EOF")),
        (b'{"a":' * 10_001, (400, "invalid character '{' exceeded max depth")),
        (
            b'{"model":7}',
            (400, f"{GO} number into {FIELD}"),
        ),
        (b"{}", (400, "model is required")),
        (LONG_NAME, (400, "invalid model name")),
        (
            b'{"model":"m"' + b" " * 100_000 + b"}",
            (413, f"{HAS} 65536 bytes of white space in a row"),
        ),
        (MANY_FIELDS, (413, f"{HAS} too many fields: the limit is 10000")),
        (MANY_VALUES, (413, f"{HAS} too many values: the limit is 1000000")),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.usefixtures("in_slices")
async def test_a_large_body_that_is_wrong_is_refused(body: bytes, answer: tuple[int, str]) -> None:
    with pytest.raises(HttpError) as caught:
        await read(body)
    assert (caught.value.status, str(caught.value)) == answer


@pytest.mark.spec("PROXY-21")
async def test_what_only_go_reads_in_so_many_brackets_is_passed_over() -> None:
    deep = b'{"model":"m","more":%b1%b}' % (b"[" * 5000, b"]" * 5000)
    assert (await read(deep)).name == "m"


@pytest.mark.spec("OPERATION-30")
@pytest.mark.parametrize("many", [b"[],", b"{},", b'"",', b'{"a":"\\""},'])
async def test_other_tasks_run_while_a_large_body_is_read(many: bytes) -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    messages = many * 300_000
    routing = await read(b'{"model":"m","messages":[' + messages + many.rstrip(b",") + b"]}")
    counting.cancel()
    assert routing == Routing(name="m", prompt_tokens=(len(messages) + len(many) + 1) // 4)
    assert turns >= 10
