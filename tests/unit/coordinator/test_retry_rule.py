"""Which answers of an agent another agent may give better."""

import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_coordinator.api.inference.retry_rule import error_text, judge, say_the_same
from ollama_coordinator.scheduler import Outcome, Result


def native(text: str) -> bytes:
    return json.dumps({"error": text}).encode()


def openai(text: str) -> bytes:
    return json.dumps({"error": {"message": text, "type": "api_error"}}).encode()


BUSY = "server busy, please try again.  maximum pending requests exceeded"


@pytest.mark.spec("PROXY-7")
@pytest.mark.parametrize("shape", [native, openai])
@pytest.mark.parametrize(
    ("status", "text", "result"),
    [
        (503, BUSY, Result.BUSY),
        (499, "request canceled", Result.BUSY),
        (404, "model 'm' not found", Result.MODEL_MISSING),
        (404, 'model "m" not found, try pulling it first', Result.MODEL_MISSING),
        (
            400,
            'do embedding request: Post "http://127.0.0.1:4/embedding": EOF',
            Result.MODEL_FAILED,
        ),
        (400, "EOF", Result.MODEL_FAILED),
        (400, "llama runner process no longer running: 2", Result.MODEL_FAILED),
        (400, '"m" does not support generate', Result.MODEL_FAILED),
        (400, "something never heard of", Result.MODEL_FAILED),
        (401, "unauthorized", Result.MODEL_FAILED),
        (403, "forbidden", Result.MODEL_FAILED),
        (405, "405 method not allowed", Result.MODEL_FAILED),
        (412, "requires a newer version of Ollama", Result.MODEL_FAILED),
        (413, "request entity too large", Result.MODEL_FAILED),
        (500, "CUDA error: an illegal memory access was encountered", Result.MODEL_FAILED),
        (500, "this GPU does not support flash attention", Result.MODEL_FAILED),
        (500, "invalid file magic", Result.MODEL_FAILED),
        (500, "failed to decode batch: could not find a kv cache slot", Result.MODEL_FAILED),
        (501, "not implemented", Result.MODEL_FAILED),
        (520, "unknown error", Result.MODEL_FAILED),
    ],
)
def test_an_error_is_the_agents_unless_it_is_known_to_be_the_requests(
    shape: Callable[[str], bytes], status: int, text: str, result: Result
) -> None:
    outcome = judge(status, shape(text))
    assert outcome is not None
    assert outcome.result is result
    assert outcome.reason == f"answered {status}: {text}"


@pytest.mark.spec("PROXY-7")
@pytest.mark.parametrize("status", [301, 400, 404, 500, 503])
def test_an_error_without_a_text_is_the_agents(status: int) -> None:
    outcome = judge(status, b"")
    assert outcome is not None
    assert outcome.reason == f"answered {status} with no text"


@pytest.mark.spec("PROXY-9")
@pytest.mark.parametrize(
    ("status", "text"),
    [
        (400, "invalid model name"),
        (400, "invalid character 'x' looking for beginning of value"),
        (400, "json: cannot unmarshal number into Go struct field ChatRequest.messages"),
        (400, 'time: missing unit in duration "300"'),
        (400, "registry.ollama.ai/library/m:latest does not support tools"),
        (400, '"m" does not support thinking'),
        (400, "raw mode does not support template, system, or context"),
        (400, "top_logprobs must be between 0 and 20"),
        (400, 'think must be a boolean or string ("high", "medium", "low", true, or false)'),
        (400, "invalid input type"),
        (400, "illegal base64 data at input byte 4"),
        (400, "the input length exceeds the context length"),
        (400, "input exceeds maximum context length and cannot be truncated further"),
        (400, "this model only supports one image while more than one image requested"),
        (400, "max_tokens is required and must be positive"),
        (400, "messages is required"),
        (400, "[] is too short - 'messages'"),
        (400, "Invalid value for 'encoding_format' = x. Supported values: ['float', 'base64']."),
        (400, "image URLs are not currently supported, please use base64 encoded data instead"),
        (400, "use either :local or :cloud, not both"),
        (400, 'unknown input item type: "x"'),
        (400, "Failed to parse grammar"),
        (403, "ollama cloud is disabled: remote model"),
        (500, 'option "num_ctx" must be of type integer'),
        (500, "json: cannot unmarshal string into Go struct field"),
        (500, 'invalid format: "x"; expected "json" or a valid JSON Schema object'),
    ],
)
def test_what_ollama_says_of_the_request_is_passed_on(status: int, text: str) -> None:
    for body in (native(text), openai(text)):
        assert judge(status, body) is None


@pytest.mark.spec("PROXY-9")
def test_a_missing_capability_is_the_requests_fault_if_no_listing_has_it() -> None:
    body = native('"m" does not support generate')
    assert judge(400, body, lists=lambda _: False) is None
    assert judge(400, body, lists=lambda _: True) is not None


@pytest.mark.spec("PROXY-9")
@pytest.mark.spec("SURFACE-50")
@pytest.mark.parametrize("shape", [native, openai])
def test_a_prompt_too_long_for_one_machine_is_asked_elsewhere_without_blame(
    shape: Callable[[str], bytes],
) -> None:
    text = "the prompt is longer than the context length currently available to the model"
    outcome = judge(400, shape(text))
    assert outcome is not None
    assert outcome.result is Result.REJECTED


@pytest.mark.parametrize("status", [401, 403])
def test_ollama_com_says_itself_who_may_use_its_models(status: int) -> None:
    assert judge(status, native("unauthorized"), of_cloud=True) is None
    assert judge(status, native("unauthorized")) is not None


@pytest.mark.spec("PROXY-28")
@pytest.mark.parametrize(
    ("text", "died"),
    [
        ("model runner has unexpectedly stopped, this may be due to resource limits", True),
        ("llama-server process has terminated: signal: killed", True),
        ("llama runner process no longer running: -1", True),
        ('Post "http://127.0.0.1:37017/completion": EOF', True),
        ("CUDA error: out of memory", False),
        ("invalid file magic", False),
    ],
)
def test_a_lost_runner_is_a_death(text: str, died: bool) -> None:
    outcome = judge(500, native(text))
    assert outcome is not None
    assert outcome.died is died


@pytest.mark.spec("FLEET-18")
def test_two_machines_say_the_same_in_spite_of_their_numbers_and_paths() -> None:
    def said(text: str) -> Outcome:
        return Outcome(Result.MODEL_FAILED, text)

    one = said("open /usr/share/ollama/blobs/sha256-00: 9.1 GiB of 8.0 at 0xc0001")
    assert say_the_same(one, said("open /home/x/blobs/sha256-00: 9.2 GiB of 7.9 at 0xc0ff1"))
    assert not say_the_same(one, said("invalid file magic"))


@pytest.mark.parametrize("body", [b"", b" \n"])
def test_an_ollama_that_refuses_our_name_for_it_is_out_of_reach(body: bytes) -> None:
    outcome = judge(403, body)
    assert outcome is not None
    assert outcome.result is Result.UNREACHABLE
    assert "OLLAMA_HOST=0.0.0.0" in outcome.reason


def test_an_ollama_too_old_for_a_route_does_not_lack_the_model() -> None:
    outcome = judge(404, b"404 page not found")
    assert outcome is None or outcome.result is not Result.MODEL_MISSING


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"error":"x"}', "x"),
        (b'{"error":{"message":"x"}}', "x"),
        (b'{"type":"error","error":{"type":"api_error","message":"x"}}', "x"),
        (b'{"error":7}', ""),
        (b'{"error":{"message":null}}', ""),
        (b"[]", ""),
        (b"null", ""),
        (b" plain text\n", "plain text"),
        (b"\xff", "\ufffd"),
        (b"x" * 1000, "x" * 500),
        (b"", ""),
    ],
)
def test_the_sentence_is_found_in_every_shape(body: bytes, text: str) -> None:
    assert error_text(body) == text


@given(st.binary() | st.sampled_from([b"[" * 100_000, b"1" * 5000]))
def test_any_body_has_a_text(body: bytes) -> None:
    assert isinstance(error_text(body), str)
    judge(500, body)
