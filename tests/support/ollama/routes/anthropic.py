"""`/v1/messages`: Anthropic's shape, whole or as named events that end with `message_stop`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from support.ollama.exchange import SSE, Exchange
from support.ollama.generation import Kind
from support.ollama.gojson import Fields
from support.ollama.reply import STREAM_HEADERS, Outcome, event, reply
from support.ollama.script import Request, ToolCall
from support.ollama.wire import ApiError

from . import options as read
from .lookup import require, require_all, require_name, resolve, single_quoted

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens"}


async def messages(exchange: Exchange) -> web.StreamResponse:
    fields = exchange.fields("MessagesRequest")
    asked, limit = fields.text("model"), fields.number("max_tokens") or 0
    turns = fields.objects("messages", "[]anthropic.MessageParam", "anthropic.MessageParam")
    if not asked:
        raise ApiError(400, "model is required", early=True)
    if limit <= 0:
        raise ApiError(400, "max_tokens is required and must be positive", early=True)
    if not turns:
        raise ApiError(400, "messages is required", early=True)
    require_name(asked)
    model = resolve(exchange.node, asked, single_quoted(asked))
    require(model, asked, "completion", "chat")
    tools = [_as_function(tool) for tool in read.tools(fields)]
    if tools:
        require_all(model, "tools")
    request = Request(
        model,
        _system(fields) + read.conversation(exchange, model, turns, {}),
        last_user=read.last_user(turns),
        num_predict=int(limit),
        exact=False,
        stop=read.stops(fields.raw.get("stop_sequences")),
        think=fields.mapping("thinking").get("type") == "enabled"
        and read.wants_thinking(model, True, asked),
        tools=tools,
        after_tool=_answers_tool(turns[-1]),
    )
    turn = read.turn(exchange, request, {})
    return await reply(exchange, turn, MessageEvents(asked), stream=fields.flag("stream"))


class MessageEvents:
    """A message in blocks: thinking, text, then tool use, each opened and closed."""

    content_type = SSE
    headers: Mapping[str, str] = STREAM_HEADERS
    garbage = b'event: content_block_delta\ndata: {"type":"content_bl\n\n'

    def __init__(self, asked: str) -> None:
        self._asked = asked
        self._index = -1
        self._open: Kind | None = None

    def opening(self) -> bytes:
        return event("message_start", message=self._message([], None, Outcome()))

    def piece(self, kind: Kind, text: str) -> bytes:
        before = b"" if kind == self._open else self._close_block() + self._open_block(kind)
        delta = (
            {"type": "text_delta", "text": text}
            if kind == "content"
            else {"type": "thinking_delta", "thinking": text}
        )
        return before + event("content_block_delta", index=self._index, delta=delta)

    def tool_calls(self, calls: list[ToolCall]) -> bytes:
        return self._close_block() + b"".join(self._tool(call) for call in calls)

    def closing(self, outcome: Outcome) -> bytes:
        delta = {"stop_reason": _stop_reason(outcome)}
        return (
            self._close_block()
            + event("message_delta", delta=delta, usage=_usage(outcome))
            + event("message_stop")
        )

    def error(self, text: str) -> bytes:
        """Swallowed: the body ends, and `message_stop` is missing."""
        return b""

    def whole(self, outcome: Outcome) -> dict[str, Any]:
        content: list[dict[str, Any]] = []
        if outcome.thinking:
            content.append({"type": "thinking", "thinking": outcome.thinking, "signature": ""})
        if outcome.content:
            content.append({"type": "text", "text": outcome.content})
        content += [
            {"type": "tool_use", "id": call.id, "name": call.name, "input": call.arguments}
            for call in outcome.tool_calls
        ]
        return self._message(content, _stop_reason(outcome), outcome)

    def _message(
        self, content: list[dict[str, Any]], reason: str | None, outcome: Outcome
    ) -> dict[str, Any]:
        return {
            "id": "msg_0123456789abcdef",
            "type": "message",
            "role": "assistant",
            "model": self._asked,
            "content": content,
            **({} if reason is None else {"stop_reason": reason}),
            "usage": _usage(outcome),
        }

    def _tool(self, call: ToolCall) -> bytes:
        self._index += 1
        block = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
        partial = json.dumps(call.arguments)
        delta = {"type": "input_json_delta", "partial_json": partial}
        return (
            event("content_block_start", index=self._index, content_block=block)
            + event("content_block_delta", index=self._index, delta=delta)
            + event("content_block_stop", index=self._index)
        )

    def _open_block(self, kind: Kind) -> bytes:
        self._index += 1
        self._open = kind
        block = (
            {"type": "text", "text": ""}
            if kind == "content"
            else {"type": "thinking", "thinking": "", "signature": ""}
        )
        return event("content_block_start", index=self._index, content_block=block)

    def _close_block(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        return event("content_block_stop", index=self._index)


def _stop_reason(outcome: Outcome) -> str | None:
    if not outcome.done:
        return None
    return "tool_use" if outcome.tool_calls else _STOP_REASONS[outcome.done_reason]


def _usage(outcome: Outcome) -> dict[str, int]:
    timings = outcome.timings
    return {"input_tokens": timings.prompt_eval_count, "output_tokens": timings.eval_count}


def _as_function(tool: dict[str, Any]) -> dict[str, Any]:
    return {"name": tool.get("name"), "parameters": tool.get("input_schema")}


def _system(fields: Fields) -> str:
    system = fields.raw.get("system")
    if isinstance(system, list):
        return "".join(str(block.get("text", "")) for block in system if isinstance(block, dict))
    return fields.text("system")


def _answers_tool(message: Fields) -> bool:
    content = message.raw.get("content")
    blocks = content if isinstance(content, list) else []
    return any(isinstance(block, dict) and block.get("type") == "tool_result" for block in blocks)
