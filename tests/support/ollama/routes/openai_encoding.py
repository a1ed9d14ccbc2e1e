"""Chat and text completions as OpenAI's clients read them: chunks that end with `[DONE]`."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Mapping
from typing import Any

from support.ollama.exchange import SSE
from support.ollama.generation import Kind
from support.ollama.reply import Outcome
from support.ollama.script import ToolCall
from support.ollama.wire import encode

DONE = b"data: [DONE]\n\n"


def usage(outcome: Outcome) -> dict[str, int]:
    timings = outcome.timings
    return {
        "prompt_tokens": timings.prompt_eval_count,
        "completion_tokens": timings.eval_count,
        "total_tokens": timings.prompt_eval_count + timings.eval_count,
    }


def _event(value: Any) -> bytes:
    return b"data: " + encode(value) + b"\n\n"


class _Chunks:
    """What chat and text chunks have in common."""

    content_type = SSE
    headers: Mapping[str, str] = {}
    garbage = b'data: {"id":"chatcmpl-\n\n'
    chunk_object = ""
    whole_object = ""

    def __init__(self, asked: str, *, include_usage: bool) -> None:
        self._include_usage = include_usage
        created = int(time.time())
        self._base = {
            "id": f"chatcmpl-{zlib.crc32(f'{asked}{created}'.encode()) % 1000}",
            "object": self.chunk_object,
            "created": created,
            "model": asked,
            "system_fingerprint": "fp_ollama",
        }
        self._head = b"data: " + encode(self._base)[:-1] + b',"choices":[{"index":0,'

    def opening(self) -> bytes:
        return b""

    def closing(self, outcome: Outcome) -> bytes:
        end = _event({**self._base, "choices": [self._last(outcome)]})
        if self._include_usage:
            end += _event({**self._base, "choices": [], "usage": usage(outcome)})
        return end + DONE

    def whole(self, outcome: Outcome) -> dict[str, Any]:
        return {
            **self._base,
            "object": self.whole_object,
            "choices": [self._choice(outcome)],
            "usage": usage(outcome),
        }

    def _last(self, outcome: Outcome) -> dict[str, Any]:
        raise NotImplementedError

    def _choice(self, outcome: Outcome) -> dict[str, Any]:
        raise NotImplementedError


class ChatChunks(_Chunks):
    """`chat.completion.chunk` and `chat.completion`."""

    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def piece(self, kind: Kind, text: str) -> bytes:
        if kind == "thinking":
            delta = b'"delta":{"role":"assistant","content":"","reasoning":'
        else:
            delta = b'"delta":{"role":"assistant","content":'
        return self._head + delta + encode(text) + b'},"finish_reason":null}]}\n\n'

    def tool_calls(self, calls: list[ToolCall]) -> bytes:
        delta = {"role": "assistant", "content": "", "tool_calls": _calls(calls)}
        choice = {"index": 0, "delta": delta, "finish_reason": None}
        return _event({**self._base, "choices": [choice]})

    def error(self, text: str) -> bytes:
        """The error line, mistaken for an empty chunk; no finish and no `[DONE]` follow."""
        return self.piece("content", "")

    def _last(self, outcome: Outcome) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": 0, "delta": delta, "finish_reason": _finish(outcome)}

    def _choice(self, outcome: Outcome) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": outcome.content}
        if outcome.thinking:
            message["reasoning"] = outcome.thinking
        if outcome.tool_calls:
            message["tool_calls"] = _calls(outcome.tool_calls)
        return {"index": 0, "message": message, "finish_reason": _finish(outcome)}


class TextChunks(_Chunks):
    """`text_completion`, streamed or whole."""

    chunk_object = "text_completion"
    whole_object = "text_completion"

    def piece(self, kind: Kind, text: str) -> bytes:
        shown = text if kind == "content" else ""
        return self._head + b'"text":' + encode(shown) + b',"finish_reason":null}]}\n\n'

    def tool_calls(self, calls: list[ToolCall]) -> bytes:
        return b""

    def error(self, text: str) -> bytes:
        return self.piece("content", "")

    def _last(self, outcome: Outcome) -> dict[str, Any]:
        return {"index": 0, "text": "", "finish_reason": _finish(outcome)}

    def _choice(self, outcome: Outcome) -> dict[str, Any]:
        return {"index": 0, "text": outcome.content, "finish_reason": _finish(outcome)}


def _finish(outcome: Outcome) -> str | None:
    if not outcome.done:
        return None
    return "tool_calls" if outcome.tool_calls else outcome.done_reason


def _calls(calls: list[ToolCall]) -> list[dict[str, Any]]:
    return [
        {
            "id": call.id,
            "index": index,
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments)},
        }
        for index, call in enumerate(calls)
    ]
