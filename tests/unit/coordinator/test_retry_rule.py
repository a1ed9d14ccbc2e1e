"""Which answers of an agent another agent may give better."""

import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_coordinator.api.inference.retry_rule import (
    CANNOT_RUN,
    cannot_run,
    error_text,
    retryable,
)
from ollama_coordinator.scheduler import Result


def native(text: str) -> bytes:
    return json.dumps({"error": text}).encode()


def openai(text: str) -> bytes:
    return json.dumps({"error": {"message": text, "type": "api_error"}}).encode()


BUSY = "server busy, please try again.  maximum pending requests exceeded"


@pytest.mark.parametrize("shape", [native, openai])
@pytest.mark.parametrize(
    ("status", "text", "result"),
    [
        (503, BUSY, Result.BUSY),
        (499, "request canceled", Result.BUSY),
        (404, "model 'm' not found", Result.MODEL_MISSING),
        (404, 'model "m" not found, try pulling it first', Result.MODEL_MISSING),
        (500, "llama-server process has terminated: exit status 2", Result.MODEL_FAILED),
        (500, "llama runner process has terminated: signal: killed", Result.MODEL_FAILED),
        (500, "timed out waiting for llama-server to start", Result.MODEL_FAILED),
        (500, "model runner has unexpectedly stopped, this may be due to", Result.MODEL_FAILED),
        (500, "unable to load full model on GPU", Result.MODEL_FAILED),
        (500, "CUDA error: out of memory", Result.MODEL_FAILED),
        (500, "cudaMalloc failed: out of memory", Result.MODEL_FAILED),
        (500, "model requires more system memory (9 GiB) than is available", Result.MODEL_FAILED),
    ],
)
def test_what_this_agent_cannot_another_may(
    shape: Callable[[str], bytes], status: int, text: str, result: Result
) -> None:
    outcome = retryable(status, shape(text))
    assert outcome is not None
    assert outcome.result is result
    assert outcome.reason == f"answered {status}: {text}"


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, native("out of memory")),
        (301, b""),
        (400, native("invalid model name")),
        (400, native("registry.ollama.ai/library/m:latest does not support tools")),
        (400, native("model 'm' not found")),
        (400, b""),
        (401, native("unauthorized")),
        (403, native("ollama cloud is disabled: remote model")),
        (404, native("blob sha256-00")),
        (404, b""),
        (405, b"405 method not allowed"),
        (413, native("request body too large")),
        (422, native("x")),
        (500, native("json: cannot unmarshal string into Go struct field")),
        (500, native('option "num_ctx" must be of type integer')),
        (500, b""),
        (501, b""),
    ],
)
def test_what_would_be_the_same_everywhere_is_passed_on(status: int, body: bytes) -> None:
    assert retryable(status, body) is None


@pytest.mark.parametrize("body", [b"", b" \n"])
def test_an_ollama_that_refuses_our_name_for_it_is_out_of_reach(body: bytes) -> None:
    outcome = retryable(403, body)
    assert outcome is not None
    assert outcome.result is Result.UNREACHABLE
    assert "OLLAMA_HOST=0.0.0.0" in outcome.reason


def test_an_ollama_too_old_for_a_route_does_not_lack_the_model() -> None:
    outcome = retryable(404, b"404 page not found")
    assert outcome is None or outcome.result is not Result.MODEL_MISSING


@pytest.mark.parametrize("sign", CANNOT_RUN)
def test_signs_of_a_failed_load_are_found_in_any_letter_case(sign: str) -> None:
    assert sign == sign.lower()
    assert cannot_run(f"Error: {sign.upper()}!")


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
    retryable(500, body)
