"""`/v1/chat/completions`, `/v1/completions`, `/v1/embeddings` and `/v1/models`."""

from __future__ import annotations

import array
import base64
import json
import time
import zlib
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from support.ollama.exchange import SSE, Exchange
from support.ollama.generation import Kind
from support.ollama.gojson import Fields
from support.ollama.models import Model
from support.ollama.reply import Outcome, reply
from support.ollama.script import Request, ToolCall
from support.ollama.wire import ApiError, encode

from . import options as read
from .embed import inputs, vectors_of
from .lookup import (
    require,
    require_all,
    require_file,
    require_name,
    resolve,
    single_quoted,
    try_pulling,
)

DONE = b"data: [DONE]\n\n"

# What a `/v1` body calls it -> what `options` calls it.
_SAMPLING = {"temperature": "temperature", "top_p": "top_p", "seed": "seed"}


async def chat_completions(exchange: Exchange) -> web.StreamResponse:
    fields = exchange.fields("ChatCompletionRequest")
    asked = fields.text("model")
    messages = fields.objects("messages", "[]openai.Message", "openai.Message")
    if not messages:
        raise ApiError(400, "[] is too short - 'messages'", early=True)
    require_name(asked)
    model = resolve(exchange.node, asked, single_quoted(asked))
    require(model, asked, "completion", "chat")
    tools = read.tools(fields)
    if tools:
        require_all(model, "tools")
    limit = fields.number("max_completion_tokens") or fields.number("max_tokens")
    prompt = read.conversation(exchange, model, messages, {})
    encoder = ChatChunks(asked, include_usage=_include_usage(fields))
    if read.only_renders(exchange, fields) and not fields.flag("stream"):
        wanted = read.settings(exchange, model, _sampling(fields))
        async with exchange.node.engine.runner(model, wanted, None):
            info = read.debug_info(prompt, _images(messages))
            return exchange.json({**encoder.whole(Outcome()), "_debug_info": info})
    request = Request(
        model,
        prompt,
        last_user=read.last_user(messages),
        num_predict=int(limit) if limit else None,
        stop=read.stops(fields.raw.get("stop")),
        think=read.wants_thinking(model, _effort(fields), asked),
        tools=tools,
        format=_format(fields.mapping("response_format")),
        after_tool=messages[-1].text("role") == "tool",
    )
    turn = read.turn(exchange, request, _sampling(fields), images=_images(messages))
    return await reply(exchange, turn, encoder, stream=fields.flag("stream"))


async def completions(exchange: Exchange) -> web.StreamResponse:
    fields = exchange.fields("CompletionRequest")
    asked, prompt = fields.text("model"), fields.text("prompt")
    model = resolve(exchange.node, asked, single_quoted(asked))
    require(model, asked, "completion", "generate")
    if fields.text("suffix"):
        require_all(model, "insert")
    limit = fields.number("max_tokens")
    request = Request(
        model,
        prompt,
        last_user=prompt,
        num_predict=int(limit) if limit else None,
        stop=read.stops(fields.raw.get("stop")),
    )
    turn = read.turn(exchange, request, _sampling(fields))
    encoder = TextChunks(asked, include_usage=_include_usage(fields))
    return await reply(exchange, turn, encoder, stream=fields.flag("stream"))


async def embeddings(exchange: Exchange) -> web.StreamResponse:
    fields = exchange.fields("EmbedRequest")
    asked, how = fields.text("model"), fields.text("encoding_format", "float")
    if how not in ("float", "base64"):
        supported = "Supported values: ['float', 'base64']."
        text = f"Invalid value for 'encoding_format' = {how}. {supported}"
        raise ApiError(400, text, early=True)
    given = fields.raw.get("input")
    if given is None or given == []:
        raise ApiError(400, "invalid input", early=True)
    texts = inputs(given) or [""]
    model = resolve(exchange.node, asked, try_pulling(asked))
    require_file(model, try_pulling(asked))
    size = max(int(fields.number("dimensions") or 0), 0) or model.embedding_length
    vectors, timings = await vectors_of(exchange, model, texts, {}, size=size)
    data = [
        {
            "object": "embedding",
            "embedding": packed(vector) if how == "base64" else vector,
            "index": index,
        }
        for index, vector in enumerate(vectors)
    ]
    count = timings.prompt_eval_count
    figures = {"prompt_tokens": count, "total_tokens": count}
    return exchange.json({"object": "list", "data": data, "model": asked, "usage": figures})


async def models(exchange: Exchange) -> web.StreamResponse:
    listed = [_listed(model, model.name) for model in exchange.node.store]
    return exchange.json({"object": "list", "data": listed or None})


async def model(exchange: Exchange) -> web.StreamResponse:
    asked = exchange.argument
    details = "remote model details are unavailable"
    require_name(asked)
    found = resolve(exchange.node, asked, single_quoted(asked), disabled=details)
    return exchange.json(_listed(found, asked))


def _listed(model: Model, name: str) -> dict[str, Any]:
    owner = model.name.split("/")[-2] if "/" in model.name else "library"
    created = int(model.modified_at)
    return {"id": name, "object": "model", "created": created, "owned_by": owner}


def packed(vector: list[float]) -> str:
    return base64.b64encode(array.array("f", vector).tobytes()).decode()


def _sampling(fields: Fields) -> dict[str, Any]:
    """No route of `/v1` can set num_ctx: only these reach the options."""
    found = {theirs: fields.raw.get(ours) for ours, theirs in _SAMPLING.items()}
    return {key: value for key, value in found.items() if value is not None}


def _effort(fields: Fields) -> Any:
    effort = fields.raw.get("reasoning_effort")
    return effort if effort is not None else fields.mapping("reasoning").get("effort")


def _format(wanted: dict[str, Any]) -> Any:
    match wanted.get("type"):
        case "json_object":
            return "json"
        case "json_schema":
            return (wanted.get("json_schema") or {}).get("schema") or "json"
    return None


def _include_usage(fields: Fields) -> bool:
    return bool(fields.mapping("stream_options").get("include_usage"))


def _images(messages: list[Fields]) -> int:
    contents = [message.raw.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return sum(1 for part in parts if isinstance(part, dict) and part.get("type") == "image_url")


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
