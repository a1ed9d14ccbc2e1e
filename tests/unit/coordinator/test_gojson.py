"""Bodies of requests: as Go reads them, and changed in one place only."""

import asyncio
import json
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_coordinator.api.http.errors import HttpError
from ollama_coordinator.api.http.gojson import first_value, read_fields
from ollama_coordinator.api.http.json_edit import (
    AT_ONCE_BYTES,
    WINDOW_BYTES,
    edited,
    fields_of,
    is_small,
)
from ollama_coordinator.api.inference.audio import read_form
from ollama_coordinator.api.models.lists import is_older, lowest

GO = "api.ShowRequest"


@pytest.mark.spec("SURFACE-1")
@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "missing request body"),
        (b"  \n", "missing request body"),
        (b"{", "unexpected EOF"),
        (b'{"a', "unexpected EOF"),
        (b"x", "invalid character 'x' looking for beginning of value"),
        (b"'", "invalid character '\\'' looking for beginning of value"),
        (b"{'a'}", "invalid character '\\'' looking for beginning of object key string"),
        (b'{"a" 1}', "invalid character '1' after object key"),
        (b'{"a":1 "b"}', "invalid character '\"' after object key:value pair"),
        (b"NaN", "invalid character 'N' looking for beginning of value"),
        (b"[]", "json: cannot unmarshal array into Go value of type api.ShowRequest"),
        (b"7", "json: cannot unmarshal number into Go value of type api.ShowRequest"),
        (b"1.5e3 x", "json: cannot unmarshal number into Go value of type api.ShowRequest"),
        (b"1.", "unexpected EOF"),
        (b"-1.5e", "unexpected EOF"),
        (b"1E+", "unexpected EOF"),
        (b"[" * 100_000, "json: exceeded max depth"),
    ],
)
def test_complaints_are_those_of_go(body: bytes, text: str) -> None:
    with pytest.raises(HttpError) as raised:
        read_fields(body, GO)
    assert (raised.value.status, str(raised.value)) == (400, text)


@pytest.mark.spec("SURFACE-1")
def test_keys_in_any_case_the_last_wins_and_what_follows_is_ignored() -> None:
    fields = read_fields(b'{"Model":"a","MODEL":"b"} and more', GO)
    assert fields.model() == "b"
    assert read_fields(b'{"model":"","name":"c"}', GO).model() == "c"
    assert read_fields(b"null", GO).model() == ""
    assert read_fields(b'{"model":"\\ud800"}', GO).model() == "�"
    with pytest.raises(HttpError, match=r"ShowRequest\.verbose of type bool"):
        read_fields(b'{"verbose":"yes"}', GO).flag("verbose")
    with pytest.raises(HttpError, match=r"number into Go struct field ShowRequest\.files"):
        read_fields(b'{"files":{"a":1}}', GO).digests("files")


NAMES = st.text(st.characters(codec="utf-8"), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
)


@pytest.mark.spec("SURFACE-14")
@given(st.dictionaries(NAMES, JSON, max_size=5))
def test_only_the_named_field_of_a_body_changes(value: dict[str, Any]) -> None:
    body = json.dumps(value).encode()
    changed = asyncio.run(edited(body, {"options": b'{"num_ctx":8}'}))
    assert changed is not None
    others = {key: item for key, item in value.items() if key.lower() != "options"}
    after = json.loads(changed)
    key = next(key for key in after if key.lower() == "options")
    assert after.pop(key) == {"num_ctx": 8}
    assert after == others


@pytest.mark.spec("SURFACE-14")
async def test_every_other_byte_stays() -> None:
    body = b' {"a": 1.50e3, "Options": {"seed":  7, "num_ctx":1}, "b": "\\u00e9", "c":[ 1 ]} more'
    changed = await edited(body, {"options": b"{}"})
    assert changed == body.replace(b'{"seed":  7, "num_ctx":1}', b"{}")
    assert await edited(b"{}", {"options": b"{}"}) == b'{"options":{}}'
    assert await edited(b'{"a":1}', {"b": b"2"}) == b'{"b":2,"a":1}'
    assert await edited(b"[]", {"options": b"{}"}) is None


@pytest.mark.spec("SURFACE-7")
async def test_a_form_is_read_from_its_beginning_to_its_end() -> None:
    body = (
        b'before\r\n--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        b"\r\n--C\r\n"
        b'\r\n--B\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n--B--\r\n'
        b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\nother\r\n'
    )
    assert (await read_form('multipart/form-data; boundary="B"', body)).name == "whisper"
    wrong = {
        "": "isn't multipart/form-data",
        "application/json": "isn't multipart/form-data",
        "multipart/form-data": "no multipart boundary param",
        "multipart/form-data; boundary=": "no multipart boundary param",
    }
    for kind, said in wrong.items():
        with pytest.raises(HttpError, match=f"^failed to parse multipart form: .*{said}"):
            await read_form(kind, body)


VALUE, PAIR = "looking for beginning of value", "after object key:value pair"


@pytest.mark.spec("PROXY-21")
@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"\x1f\x8b", rf"'\x1f' {VALUE}"),
        (b"\xef\xbb\xbf{}", f"'\u00ef' {VALUE}"),
        (b"\xff\xfe", f"'\u00ff' {VALUE}"),
        (b"\x00", rf"'\x00' {VALUE}"),
        (b"\x07", rf"'\a' {VALUE}"),
        (b"\x7f", rf"'\x7f' {VALUE}"),
        (b"\x85", rf"'\u0085' {VALUE}"),
        (b"\xa0", rf"'\u00a0' {VALUE}"),
        (b"\\", rf"'\\' {VALUE}"),
        (b'{"a":\xc2\xab}', f"'\u00c2' {VALUE}"),
        (b'{"a":tru}', "'}' in literal true (expecting 'e')"),
        (b'{"a":fals\xff}', "'\u00ff' in literal false (expecting 'e')"),
        (b'{"a":nUll}', "'U' in literal null (expecting 'u')"),
        (b'{"a":-x}', "'x' in numeric literal"),
        (b'{"a":-Infinity}', "'I' in numeric literal"),
        (b'{"a":1.x}', "'x' after decimal point in numeric literal"),
        (b'{"a":1e}', "'}' in exponent of numeric literal"),
        (b'{"a":1e+}', "'}' in exponent of numeric literal"),
        (b'{"a":01}', f"'1' {PAIR}"),
        (b'{"a":[1 2]}', "'2' after array element"),
        (b'{"a":[{"[":1}],"b":2 3}', f"'3' {PAIR}"),
        (b"{\xe9}", "'\u00e9' looking for beginning of object key string"),
        (b'{"a"\xe9}', "'\u00e9' after object key"),
        (b'{"a":"\x01"}', r"'\x01' in string literal"),
        (b'{"a":"\\x"}', "'x' in string escape code"),
        (b'{"a":"\\u12g4"}', r"'g' in \u hexadecimal character escape"),
    ],
)
def test_what_is_no_json_is_refused_in_gos_words(body: bytes, said: str) -> None:
    """As a real Ollama 0.24 was seen to say it."""
    with pytest.raises(HttpError) as refusal:
        first_value(body, "")
    assert str(refusal.value) == f"invalid character {said}"


@pytest.mark.parametrize("body", [b'{"a":tru', b"nul", b'"', b"{", b'{"a":-', b'{"a":1.'])
def test_what_ends_too_early_is_an_unexpected_end(body: bytes) -> None:
    with pytest.raises(HttpError, match=r"^unexpected EOF$"):
        first_value(body, "")


FILE = b'--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nRIFF\r\n'


@pytest.mark.spec("SURFACE-7")
@pytest.mark.parametrize(
    ("rest", "answer"),
    [
        (b"--B\r\ncontent-disposition: form-data; name=model\r\n\r\nwhisper\r\n", "whisper"),
        (b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhis', "whis"),
        (b'--B\r\nContent-Disposition: form-data; name="mod', "model is required"),
        (b"--B\r\nno header\r\n\r\nwhisper\r\n--B--\r\n", "model is required"),
        (b"--B--\r\n", "model is required"),
        (
            b"--B\r\n" + b"X: y\r\n" * 99 + b"Content-Disposition: form-data; name=model\r\n\r\nw",
            "w",
        ),
    ],
)
async def test_a_form_that_breaks_off_is_read_as_far_as_it_goes(
    rest: bytes, answer: str, caplog: pytest.LogCaptureFixture
) -> None:
    try:
        read = (await read_form("multipart/form-data; boundary=B", FILE + rest)).name
    except HttpError as exc:
        read = str(exc)
    assert read == answer
    assert caplog.records == []


@pytest.mark.spec("OPERATION-30")
async def test_a_form_with_too_many_parts_is_refused_as_by_ollama() -> None:
    with pytest.raises(HttpError, match="multipart: message too large"):
        await read_form("multipart/form-data; boundary=B", FILE * 1001)


@pytest.mark.spec("OPERATION-30")
async def test_of_a_large_body_only_the_known_fields_are_read() -> None:
    text = b'"' + b"x" * AT_ONCE_BYTES + b'"'
    body = b'{"Name":"m","stream":false,"system":' + text + b',"from":' + text + b"}"
    fields = await fields_of(body, GO, asyncio.Lock())
    assert fields.values == {"name": "m", "stream": False}
    with pytest.raises(HttpError, match="cannot unmarshal array into Go value"):
        await fields_of(b"[" + text + b"]", GO, asyncio.Lock())


@pytest.mark.spec("SURFACE-8")
def test_versions_are_compared_by_their_numbers() -> None:
    assert lowest(["0.33.0", "0.9.6", "0.0.0", ""]) == "0.9.6"
    assert lowest(["0.0.0"]) is None
    assert is_older("0.9.6", "0.14.0")
    assert not is_older("0.14.0-rc1", "0.14.0")
    assert not is_older("0.0.0", "0.14.0")


@pytest.mark.spec("OPERATION-30")
async def test_a_number_of_any_length_is_passed_over() -> None:
    for digits in (WINDOW_BYTES - 1, WINDOW_BYTES, 3 * WINDOW_BYTES):
        number = b"9" * digits
        changed = await edited(b'{"a":%b,"model":"x"}' % number, {"model": b'"y"'})
        assert changed == b'{"a":%b,"model":"y"}' % number


def calls_of_a_complaint(depth: int, kind: str) -> int:
    """The calls of one kind for Go's sentence on 20,000 brackets that go so deep."""
    calls = 0

    def count(_: object, event: str, called: object) -> None:
        nonlocal calls
        calls += event == "c_call" and getattr(called, "__name__", "") == kind

    deep = b"[" * depth + b"]" * depth
    body = b'{"a":[' + b",".join([deep] * (10_000 // depth)) + b" x"
    sys.setprofile(count)
    try:
        with pytest.raises(HttpError, match="invalid character 'x' after array element"):
            first_value(body, "")
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.spec("OPERATION-30")
def test_deep_brackets_are_passed_over_once() -> None:
    assert calls_of_a_complaint(200, "replace") == calls_of_a_complaint(2, "replace") == 0
    assert calls_of_a_complaint(200, "raw_decode") <= 1


@pytest.mark.spec("SURFACE-1")
@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"a":"\xe2\x82" x', "invalid character 'x' after object key:value pair"),
        (b'{"a":\xff}', "invalid character 'ÿ' looking for beginning of value"),
    ],
)
def test_a_byte_that_is_no_utf_8_is_one_character(body: bytes, text: str) -> None:
    assert first_value(b'"\xe2\x82"', "") == "\ufffd\ufffd"
    with pytest.raises(HttpError) as caught:
        first_value(body, "")
    assert str(caught.value) == text


@pytest.mark.spec("OPERATION-30")
@pytest.mark.parametrize("many", [b",", b"[", b"{"])
def test_a_body_of_many_values_is_not_decoded_at_once(many: bytes) -> None:
    assert is_small(many * 10_000)
    assert not is_small(many * 10_001)
