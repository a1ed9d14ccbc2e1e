"""`/api/generate` and `/api/chat`: NDJSON unless told otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aiohttp import web

from support.ollama.engine import Engine
from support.ollama.exchange import NDJSON, Exchange
from support.ollama.generation import Kind
from support.ollama.models import Model
from support.ollama.reply import Outcome, reply
from support.ollama.script import ANSWER, Request, ToolCall, beginning
from support.ollama.wire import ApiError, Stamp, encode, keep_alive_seconds

from . import options as read
from .lookup import require, require_all, require_name, resolve, single_quoted


async def generate(exchange: Exchange) -> web.StreamResponse:
    fields = exchange.fields("GenerateRequest")
    asked, prompt, stream = fields.text("model"), fields.text("prompt"), fields.flag("stream", True)
    chosen, keep_alive = read.chosen(fields), keep_alive_seconds(fields.raw.get("keep_alive"))
    wish, images, raw = read.think(fields), read.images(fields), fields.flag("raw")
    read.check_logprobs(fields)
    model = resolve(exchange.node, asked, single_quoted(asked))
    encoder = Native(asked, _GenerateShape(raw=raw))
    if not prompt and keep_alive == 0:
        return _unloaded(exchange, model, encoder)
    if raw and any(fields.raw.get(key) for key in ("template", "system", "context")):
        raise ApiError(400, "raw mode does not support template, system, or context")
    think = read.wants_thinking(model, wish, asked)
    require(model, asked, "completion", "generate")
    if fields.text("suffix"):
        require_all(model, "insert")
    shift, truncate = fields.flag("shift", True), fields.flag("truncate", True)
    if not prompt and not images:
        return await _loaded(exchange, model, chosen, keep_alive, encoder, shift=shift)
    written = ""
    if raw:
        prompt, written = beginning(prompt)
    else:
        prompt = fields.text("system", model.system) + prompt
    if read.only_renders(exchange, fields):
        return await _rendered(
            exchange, model, chosen, keep_alive, encoder, prompt + ANSWER, images
        )
    request = Request(
        model,
        prompt,
        last_user=fields.text("prompt"),
        written=written,
        num_predict=chosen.get("num_predict"),
        stop=read.stops(chosen.get("stop")),
        think=think,
        format=fields.raw.get("format"),
    )
    turn = read.turn(
        exchange,
        request,
        chosen,
        keep_alive=keep_alive,
        images=len(images),
        shift=shift,
        truncate=truncate,
    )
    return await reply(exchange, turn, encoder, stream=stream)


async def chat(exchange: Exchange) -> web.StreamResponse:
    fields = exchange.fields("ChatRequest")
    asked, stream = fields.text("model"), fields.flag("stream", True)
    messages = fields.objects("messages", "[]api.Message", "api.Alias")
    for said in messages:
        said.text("content")  # parts are only taken on `/v1`
    chosen, keep_alive = read.chosen(fields), keep_alive_seconds(fields.raw.get("keep_alive"))
    wish, images = read.think(fields), sum(len(read.images(said)) for said in messages)
    read.check_logprobs(fields)
    require_name(asked)
    model = resolve(exchange.node, asked, single_quoted(asked))
    encoder = Native(asked, _ChatShape())
    if not messages and keep_alive == 0:
        return _unloaded(exchange, model, encoder)
    think = read.wants_thinking(model, wish, asked)
    require(model, asked, "completion", "chat")
    tools = read.tools(fields)
    if tools:
        require_all(model, "tools")
    shift, truncate = fields.flag("shift", True), fields.flag("truncate", True)
    if not messages:
        return await _loaded(exchange, model, chosen, keep_alive, encoder, shift=shift)
    prompt = read.conversation(exchange, model, messages, chosen, truncate=truncate)
    if read.only_renders(exchange, fields):
        return await _rendered(exchange, model, chosen, keep_alive, encoder, prompt, images)
    request = Request(
        model,
        prompt,
        last_user=read.last_user(messages),
        num_predict=chosen.get("num_predict"),
        stop=read.stops(chosen.get("stop")),
        think=think,
        tools=tools,
        format=fields.raw.get("format"),
        after_tool=messages[-1].text("role") == "tool",
    )
    turn = read.turn(
        exchange,
        request,
        chosen,
        keep_alive=keep_alive,
        images=images,
        shift=shift,
        truncate=truncate,
    )
    return await reply(exchange, turn, encoder, stream=stream)


async def _rendered(
    exchange: Exchange,
    model: Model,
    chosen: Mapping[str, Any],
    keep_alive: float | None,
    encoder: Native,
    prompt: str,
    images: int | list[str],
) -> web.StreamResponse:
    """`_debug_render_only`: the prompt, once the model is in memory, and no answer."""
    count = images if isinstance(images, int) else len(images)
    async with exchange.node.engine.runner(
        model, read.settings(exchange, model, chosen), keep_alive
    ):
        return exchange.json(encoder.rendered(prompt, count))


def _unloaded(exchange: Exchange, model: Model, encoder: Native) -> web.StreamResponse:
    exchange.node.engine.unload(model)
    return exchange.json(encoder.notice("unload"))


async def _loaded(
    exchange: Exchange,
    model: Model,
    chosen: Mapping[str, Any],
    keep_alive: float | None,
    encoder: Native,
    *,
    shift: bool,
) -> web.StreamResponse:
    """An empty prompt only brings the model in; one object, whatever `stream` says."""
    engine: Engine = exchange.node.engine
    async with engine.runner(
        model, read.settings(exchange, model, chosen, shift=shift), keep_alive
    ):
        return exchange.json(encoder.notice("load"))


class _GenerateShape:
    """`response` at the top level."""

    content = (b'"response":', b',"done":false}\n')
    thinking = (b'"response":"","thinking":', b',"done":false}\n')

    def __init__(self, *, raw: bool) -> None:
        self._raw = raw

    def body(self, content: str, thinking: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        optional = {"thinking": thinking, "tool_calls": calls}
        return {"response": content, **{key: value for key, value in optional.items() if value}}

    def last(self, outcome: Outcome) -> dict[str, Any]:
        """The conversation so far, as token numbers a client may send back; not if raw."""
        if self._raw:
            return {}
        return {"context": list(range(1, min(outcome.timings.eval_count, 32) + 1))}


class _ChatShape:
    """A `message` object."""

    content = (b'"message":{"role":"assistant","content":', b'},"done":false}\n')
    thinking = (
        b'"message":{"role":"assistant","content":"","thinking":',
        b'},"done":false}\n',
    )

    def body(self, content: str, thinking: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        optional = {"thinking": thinking, "tool_calls": calls}
        kept = {key: value for key, value in optional.items() if value}
        return {"message": {"role": "assistant", "content": content, **kept}}

    def last(self, outcome: Outcome) -> dict[str, Any]:
        return {}


class Native:
    """Lines of `/api/generate` and `/api/chat`; what does not change is encoded once."""

    content_type = NDJSON
    headers: Mapping[str, str] = {}
    garbage = b'{"model":"stand-in","created_at":"20\n'

    def __init__(self, asked: str, shape: _GenerateShape | _ChatShape) -> None:
        self._asked = asked
        self._shape = shape
        self._stamp = Stamp()
        self._head = b'{"model":' + encode(asked) + b',"created_at":"'
        content, thinking = shape.content, shape.thinking
        self._content = (b'",' + content[0], content[1])
        self._thinking = (b'",' + thinking[0], thinking[1])

    def opening(self) -> bytes:
        return b""

    def piece(self, kind: Kind, text: str) -> bytes:
        before, after = self._content if kind == "content" else self._thinking
        return self._head + self._stamp() + before + encode(text) + after

    def tool_calls(self, calls: list[ToolCall]) -> bytes:
        return self._line(self._shape.body("", "", _calls(calls)), {"done": False})

    def closing(self, outcome: Outcome) -> bytes:
        return self._line(self._shape.body("", "", []), self._end(outcome))

    def error(self, text: str) -> bytes:
        return encode({"error": text}) + b"\n"

    def whole(self, outcome: Outcome) -> dict[str, Any]:
        calls = _calls(outcome.tool_calls)
        body = self._shape.body(outcome.content, outcome.thinking, calls)
        end = self._end(outcome) if outcome.done else {"done": False}
        return {**self._start(), **body, **end}

    def notice(self, reason: str) -> dict[str, Any]:
        """The one object that a load or an unload is answered with."""
        body = self._shape.body("", "", [])
        return {**self._start(), **body, "done": True, "done_reason": reason}

    def rendered(self, prompt: str, images: int) -> dict[str, Any]:
        """What is told of a prompt that is only rendered."""
        body = self._shape.body("", "", [])
        return {
            **self._start(),
            **body,
            "done": False,
            "_debug_info": read.debug_info(prompt, images),
        }

    def _start(self) -> dict[str, Any]:
        return {"model": self._asked, "created_at": self._stamp().decode()}

    def _line(self, body: dict[str, Any], end: dict[str, Any]) -> bytes:
        return encode({**self._start(), **body, **end}) + b"\n"

    def _end(self, outcome: Outcome) -> dict[str, Any]:
        return {
            "done": True,
            "done_reason": outcome.done_reason,
            **self._shape.last(outcome),
            **outcome.timings.fields(),
        }


def _calls(calls: list[ToolCall]) -> list[dict[str, Any]]:
    return [
        {
            "id": call.id,
            "function": {"index": index, "name": call.name, "arguments": call.arguments},
        }
        for index, call in enumerate(calls)
    ]
