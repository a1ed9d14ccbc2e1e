"""The rule for retries: which answers of an agent another agent may give better.

Only before the client has seen a byte. An error of the client's own making would be the same
everywhere and is passed on; an error that only *this agent* makes is tried elsewhere.
"""

import json

from ollama_coordinator.scheduler import Outcome, Result

CANNOT_RUN = (
    "llama-server process has terminated",
    "llama runner process has terminated",
    "timed out waiting for llama-server to start",
    "timed out waiting for llama runner to start",
    "model runner has unexpectedly stopped",
    "unable to load",
    "failed to load",
    "error loading model",
    "out of memory",
    "cudamalloc failed",
    "requires more system memory",
    "insufficient memory",
    "no kernel image is available",
)
"""Texts (lower case) in Ollama's 500s that mean a load failed, memory ran out or a runner died."""


def retryable(status: int, body: bytes) -> Outcome | None:
    """Why another agent should be asked in place of passing this answer on; `None`: pass it on.

    `body` is the whole body of an answer with an error status.
    """
    if status < 400:
        return None
    text = error_text(body)
    reason = f"answered {status}: {text}" if text else f"answered {status} with no text"
    if status == 403 and not body.strip():
        # Ollama's Host check: it is bound to loopback and does not take our name for it.
        return Outcome(Result.UNREACHABLE, f"{reason}; set OLLAMA_HOST=0.0.0.0 on that machine")
    if status == 404 and body.startswith(b"404 page not found"):
        return Outcome(Result.BUSY, "its Ollama is too old for this route")
    if status == 404:
        return Outcome(Result.MODEL_MISSING, reason) if "not found" in text else None
    if status in (429, 499, 502, 503, 504):
        return Outcome(Result.BUSY, reason)
    if status == 500 and cannot_run(text):
        return Outcome(Result.MODEL_FAILED, reason)
    return None


def cannot_run(text: str) -> bool:
    """Whether an error's text says that the agent could not load or run the model."""
    lowered = text.lower()
    return any(sign in lowered for sign in CANNOT_RUN)


def error_text(body: bytes) -> str:
    """The sentence in an error body of any dialect; the body itself where it is not JSON."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return body.decode(errors="replace").strip()[:500]
    error = value.get("error") if isinstance(value, dict) else None
    if isinstance(error, dict):
        error = error.get("message")
    return error if isinstance(error, str) else ""
