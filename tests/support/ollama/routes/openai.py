"""`/v1/chat/completions`, `/v1/completions`, `/v1/embeddings` and `/v1/models`."""

from __future__ import annotations

import array
import base64
from typing import Any

from aiohttp import web

from support.ollama.exchange import Exchange
from support.ollama.gojson import Fields
from support.ollama.models import Model
from support.ollama.reply import reply
from support.ollama.script import Request
from support.ollama.wire import ApiError

from . import options as read
from .embed import inputs, vectors_of
from .lookup import double_quoted, require, require_name, require_tools, resolve, single_quoted
from .openai_encoding import ChatChunks, TextChunks

# What a `/v1` body calls it -> what `options` calls it.
_SAMPLING = {"temperature": "temperature", "top_p": "top_p", "seed": "seed"}


async def chat_completions(exchange: Exchange) -> web.StreamResponse:
    fields = exchange.fields("ChatCompletionRequest")
    asked = fields.text("model")
    messages = fields.objects("messages", "Message")
    if not messages:
        raise ApiError(400, "[] is too short - 'messages'")
    require_name(asked)
    model = resolve(exchange.node, asked, single_quoted(asked))
    require(model, asked, "completion", "chat")
    tools = read.tools(fields)
    if tools:
        require_tools(model)
    limit = fields.number("max_completion_tokens") or fields.number("max_tokens")
    request = Request(
        model,
        read.flatten(messages),
        last_user=read.last_user(messages),
        num_predict=int(limit) if limit else None,
        stop=read.stops(fields.raw.get("stop")),
        think=read.wants_thinking(model, _effort(fields), asked),
        tools=tools,
        format=_format(fields.mapping("response_format")),
        after_tool=messages[-1].text("role") == "tool",
    )
    turn = read.turn(exchange, request, _sampling(fields), images=_images(messages))
    encoder = ChatChunks(asked, include_usage=_include_usage(fields))
    return await reply(exchange, turn, encoder, stream=fields.flag("stream"))


async def completions(exchange: Exchange) -> web.StreamResponse:
    fields = exchange.fields("CompletionRequest")
    asked, prompt = fields.text("model"), fields.text("prompt")
    model = resolve(exchange.node, asked, single_quoted(asked))
    require(model, asked, "completion", "generate")
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
    asked, texts = fields.text("model"), inputs(fields.raw.get("input"))
    if not texts:
        raise ApiError(400, "invalid input")
    how = fields.text("encoding_format", "float")
    if how not in ("float", "base64"):
        raise ApiError(400, f"Invalid value for 'encoding_format' = {how}. Supported: \"float\"")
    missing = double_quoted(asked) if asked else single_quoted(asked)
    model = resolve(exchange.node, asked, missing)
    size = int(fields.number("dimensions") or 0) or model.embedding_length
    vectors, timings = await vectors_of(exchange, model, texts, {}, None, size)
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
