"""`/v1/responses`: whole, or as named events of which the last is `response.completed`."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from support.ollama.exchange import SSE, Exchange
from support.ollama.generation import Kind
from support.ollama.gojson import Fields
from support.ollama.reply import STREAM_HEADERS, Outcome, event, reply
from support.ollama.script import Request, ToolCall

from . import options as read
from .lookup import require, require_all, require_name, resolve, single_quoted

RESPONSE_ID = "resp_0123456789abcdef"
MESSAGE_ID = "msg_0123456789abcdef"
REASONING_ID = "rs_0123456789abcdef"

# What every response says, whatever was asked.
_CONSTANT = {
    "background": False,
    "frequency_penalty": 0,
    "max_tool_calls": None,
    "presence_penalty": 0,
    "previous_response_id": None,
    "prompt_cache_key": None,
    "reasoning": None,
    "safety_identifier": None,
    "service_tier": "default",
    "store": False,
    "temperature": 1,
    "text": {"format": {"type": "text"}},
    "top_logprobs": 0,
    "top_p": 1,
    "truncation": "disabled",
}


async def responses(exchange: Exchange) -> web.StreamResponse:
    fields = exchange.fields("ResponsesRequest")
    asked = fields.text("model")
    require_name(asked)
    model = resolve(exchange.node, asked, single_quoted(asked))
    require(model, asked, "completion", "chat")
    tools = read.tools(fields)
    if tools:
        require_all(model, "tools")
    turns = _turns(fields)
    limit = fields.number("max_output_tokens")
    request = Request(
        model,
        fields.text("instructions") + read.conversation(exchange, model, turns, {}),
        last_user=read.last_user(turns),
        num_predict=int(limit) if limit else None,
        think=read.wants_thinking(model, fields.mapping("reasoning").get("effort"), asked),
        tools=tools,
        format=_format(fields.mapping("text").get("format")),
        after_tool=bool(turns) and turns[-1].text("type") == "function_call_output",
    )
    turn = read.turn(exchange, request, {})
    return await reply(
        exchange, turn, ResponseEvents(asked, request.num_predict), stream=fields.flag("stream")
    )


class ResponseEvents:
    """A response in output items: reasoning, message, then function calls."""

    content_type = SSE
    headers: Mapping[str, str] = STREAM_HEADERS
    garbage = b'event: response.output_text.delta\ndata: {"type":"respon\n\n'

    def __init__(self, asked: str, limit: int | None) -> None:
        self._asked = asked
        self._limit = limit
        self._created = int(time.time())
        self._number = -1
        self._index = -1
        self._open: Kind | None = None
        self._text = ""
        self._items: list[dict[str, Any]] = []

    def opening(self) -> bytes:
        started = self._response("in_progress", [], None)
        return self._event("response.created", response=started) + self._event(
            "response.in_progress", response=started
        )

    def piece(self, kind: Kind, text: str) -> bytes:
        before = b"" if kind == self._open else self._close_item() + self._open_item(kind)
        self._text += text
        if kind == "thinking":
            return before + self._event(
                "response.reasoning_summary_text.delta",
                item_id=REASONING_ID,
                output_index=self._index,
                summary_index=0,
                delta=text,
            )
        return before + self._event("response.output_text.delta", **self._place(), delta=text)

    def tool_calls(self, calls: list[ToolCall]) -> bytes:
        return self._close_item() + b"".join(self._call(call) for call in calls)

    def closing(self, outcome: Outcome) -> bytes:
        end = self._close_item()
        completed = self._response("completed", self._items, _usage(outcome))
        return end + self._event("response.completed", response=completed)

    def error(self, text: str) -> bytes:
        """Swallowed: the body ends with neither a completed nor a failed event."""
        return b""

    def whole(self, outcome: Outcome) -> dict[str, Any]:
        items: list[dict[str, Any]] = []
        if outcome.thinking:
            items.append(_reasoning(outcome.thinking))
        if outcome.content:
            items.append(_message(outcome.content, "completed"))
        items += [_function_call(call, "completed") for call in outcome.tool_calls]
        return self._response("completed", items, _usage(outcome))

    def _event(self, kind: str, **data: Any) -> bytes:
        self._number += 1
        return event(kind, sequence_number=self._number, **data)

    def _response(
        self, status: str, items: list[dict[str, Any]], usage: dict[str, Any] | None
    ) -> dict[str, Any]:
        return {
            "id": RESPONSE_ID,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "model": self._asked,
            "output": items,
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "metadata": {},
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "usage": usage,
            "completed_at": None if usage is None else int(time.time()),
            "max_output_tokens": self._limit,
            **_CONSTANT,
        }

    def _place(self) -> dict[str, Any]:
        return {"item_id": MESSAGE_ID, "output_index": self._index, "content_index": 0}

    def _open_item(self, kind: Kind) -> bytes:
        self._index += 1
        self._open, self._text = kind, ""
        item = _reasoning("") if kind == "thinking" else _message(None, "in_progress")
        opened = self._event("response.output_item.added", output_index=self._index, item=item)
        if kind == "thinking":
            return opened
        return opened + self._event("response.content_part.added", **self._place(), part=_part(""))

    def _close_item(self) -> bytes:
        kind, self._open = self._open, None
        if kind is None:
            return b""
        if kind == "thinking":
            return self._item_done(_reasoning(self._text))
        text = self._text
        return (
            self._event("response.output_text.done", **self._place(), text=text, logprobs=[])
            + self._event("response.content_part.done", **self._place(), part=_part(text))
            + self._item_done(_message(text, "completed"))
        )

    def _call(self, call: ToolCall) -> bytes:
        self._index += 1
        place = {"item_id": f"fc_{call.id}", "output_index": self._index}
        done = _function_call(call, "completed")
        arguments = done["arguments"]
        added = {**_function_call(call, "in_progress"), "arguments": ""}
        return (
            self._event("response.output_item.added", output_index=self._index, item=added)
            + self._event("response.function_call_arguments.delta", **place, delta=arguments)
            + self._event(
                "response.function_call_arguments.done",
                **place,
                name=call.name,
                arguments=arguments,
            )
            + self._item_done(done)
        )

    def _item_done(self, item: dict[str, Any]) -> bytes:
        self._items.append(item)
        return self._event("response.output_item.done", output_index=self._index, item=item)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _message(text: str | None, status: str) -> dict[str, Any]:
    content = [] if text is None else [_part(text)]
    item = {"id": MESSAGE_ID, "type": "message", "status": status, "role": "assistant"}
    return {**item, "content": content}


def _reasoning(text: str) -> dict[str, Any]:
    summary = [{"type": "summary_text", "text": text}] if text else []
    return {"id": REASONING_ID, "type": "reasoning", "summary": summary}


def _function_call(call: ToolCall, status: str) -> dict[str, Any]:
    return {
        "id": f"fc_{call.id}",
        "type": "function_call",
        "status": status,
        "call_id": call.id,
        "name": call.name,
        "arguments": json.dumps(call.arguments),
    }


def _usage(outcome: Outcome) -> dict[str, Any]:
    timings = outcome.timings
    return {
        "input_tokens": timings.prompt_eval_count,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": timings.eval_count,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": timings.prompt_eval_count + timings.eval_count,
    }


def _turns(fields: Fields) -> list[Fields]:
    """`input` is one user message as text, or a list of items."""
    if isinstance(said := fields.raw.get("input"), str):
        return [Fields("Message", {"role": "user", "content": said})]
    return fields.objects("input", "[]openai.ResponsesInputItem", "openai.ResponsesInputItem")


def _format(wanted: Any) -> Any:
    if not isinstance(wanted, dict) or wanted.get("type") != "json_schema":
        return None
    return wanted.get("schema") or "json"
