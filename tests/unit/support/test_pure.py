"""Names, Go-like JSON, durations and answers: what needs no socket."""

from __future__ import annotations

import json

import pytest

from support.ollama import Model, Request, gojson, names, script, wire
from support.ollama.runner import common_prefix


@pytest.mark.parametrize(
    ("text", "short", "canonical"),
    [
        ("llama3.2", "llama3.2:latest", "registry.ollama.ai/library/llama3.2:latest"),
        (" Llama3.2:3B ", "Llama3.2:3B", "registry.ollama.ai/library/llama3.2:3b"),
        ("me/own:v1", "me/own:v1", "registry.ollama.ai/me/own:v1"),
        ("hf.co:5000/a/b", "hf.co:5000/a/b:latest", "hf.co:5000/a/b:latest"),
        ("https://hf.co/a/b:Q4", "hf.co/a/b:Q4", "hf.co/a/b:q4"),
    ],
)
def test_a_name_has_one_short_and_one_canonical_form(text: str, short: str, canonical: str) -> None:
    name = names.parse(text)
    assert name is not None
    assert (name.short, name.canonical) == (short, canonical)


@pytest.mark.parametrize("text", ["", ":tag", "a:", "-a", "a/b/c/d", "a@sha256:1", "x" * 81, "a b"])
def test_what_is_no_name_is_refused(text: str) -> None:
    assert names.parse(text) is None


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "EOF"),
        (b"xyz", "invalid character 'x' looking for beginning of value"),
        (b'{"a":', "unexpected EOF"),
        (b'{"a":"b', "unexpected EOF"),
        (b'{"a" 1}', "invalid character '1' after object key"),
        (b'{"a":1 "b"}', "invalid character '\"' after object key:value pair"),
        (b"{a:1}", "invalid character 'a' looking for beginning of object key string"),
        (b'{"a":NaN}', "invalid character 'N' looking for beginning of value"),
        (b"\x1f\x8b\x08", r"invalid character '\u001f' looking for beginning of value"),
    ],
)
def test_bad_json_is_refused_in_gos_words(body: bytes, text: str) -> None:
    with pytest.raises(gojson.BadBody) as caught:
        gojson.first_value(body)
    assert str(caught.value) == text


def test_keys_match_in_any_case_and_the_last_wins() -> None:
    value = gojson.first_value(b'{"model":"a","MODEL":"b","Model":"c"} trailing')
    assert gojson.Fields("ChatRequest", value).text("model") == "c"


def test_a_wrong_type_is_refused_in_gos_words() -> None:
    with pytest.raises(gojson.BadBody) as caught:
        gojson.Fields("ChatRequest", {"model": 7}).text("model")
    told = "json: cannot unmarshal number into Go struct field ChatRequest.model of type string"
    assert str(caught.value) == told


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        (5, 5.0),
        (0, 0.0),
        (-1, wire.FOREVER_SECONDS),
        ("1m30s", 90.0),
        ("0", 0.0),
        ("250ms", 0.25),
        ("-1s", wire.FOREVER_SECONDS),
        ("1.5h", 5400.0),
    ],
)
def test_keep_alive_takes_numbers_and_go_durations(value: object, seconds: float | None) -> None:
    assert wire.keep_alive_seconds(value) == seconds


@pytest.mark.parametrize("value", ["300", "soon", "5 m", ""])
def test_a_keep_alive_without_unit_is_refused(value: str) -> None:
    with pytest.raises(wire.ApiError) as caught:
        wire.keep_alive_seconds(value)
    assert caught.value.status == 400


def test_digests_follow_from_the_name_and_survive_a_different_spelling() -> None:
    assert Model("llama3.2").digest == Model("LLAMA3.2:latest").digest
    assert len(Model("llama3.2").digest) == 64
    assert Model("a").blob != Model("b").blob


def test_the_same_prompt_gets_the_same_words() -> None:
    assert script.words("hello", 5) == script.words("hello", 5)
    assert script.words("hello", 5) != script.words("hellp", 5)
    assert len(script.words("hello", 0)) == 0


@pytest.mark.parametrize(
    ("own", "asked", "length", "reason"),
    [
        (None, None, 16, "stop"),
        (None, 40, 40, "length"),
        (None, -1, 16, "stop"),
        (30, 10, 10, "length"),
        (10, 30, 10, "stop"),
    ],
)
def test_an_answer_has_the_length_asked_for(
    own: int | None, asked: int | None, length: int, reason: str
) -> None:
    model = Model("m", output_tokens=own)
    made = script.answer(Request(model, "hi", num_predict=asked))
    assert (len(made.content), made.done_reason) == (length, reason)


def test_an_answer_ends_at_a_stop_sequence() -> None:
    whole = "".join(script.answer(Request(Model("m"), "hi")).content)
    cut = script.answer(Request(Model("m"), "hi", stop=(whole[20:24],)))
    assert "".join(cut.content) == whole[: whole.index(whole[20:24])]


def test_an_answer_follows_a_schema() -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}, "tags": {"type": "array"}, "ok": {"enum": ["y"]}},
    }
    made = script.answer(Request(Model("m"), "hi", format=schema))
    assert json.loads("".join(made.content)) == {"n": 7, "tags": ["amber"], "ok": "y"}


def test_the_common_beginning_of_two_prompts() -> None:
    assert common_prefix("abcdef", "abcxef") == 3
    assert common_prefix("", "abc") == 0
    assert common_prefix("abc" * 1000, "abc" * 1000 + "d") == 3000
