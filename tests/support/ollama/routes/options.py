"""Reading what a request asks of the runner and of the answer, native and `/v1` alike."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from support.ollama.exchange import Exchange
from support.ollama.generation import Turn
from support.ollama.gojson import BadBody, Fields
from support.ollama.models import Model
from support.ollama.runner import Settings
from support.ollama.script import (
    IMAGE_TOKENS,
    TOKEN_CHARACTERS,
    Request,
    Script,
    answer,
    count_tokens,
    tokens_in,
)
from support.ollama.wire import ApiError

_INTEGERS = frozenset(
    {
        *("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "draft_num_predict"),
        *("num_predict", "num_keep", "seed", "top_k", "repeat_last_n"),
    }
)
_NUMBERS = frozenset(
    {
        *("temperature", "top_p", "min_p", "typical_p"),
        *("repeat_penalty", "presence_penalty", "frequency_penalty"),
    }
)


_BASE64 = re.compile(r"[A-Za-z0-9+/\r\n]*=*")

TOO_LONG = "the input length exceeds the context length"
KEPT_TOKENS = 5  # at a prompt's beginning, when its middle is cut: num_keep, and the first one


def chosen(fields: Fields) -> dict[str, Any]:
    """The request's `options`; a `null` counts as not given, which some clients rely on."""
    return {key: value for key, value in fields.mapping("options").items() if value is not None}


def check(options: Mapping[str, Any]) -> None:
    """A wrong type inside `options` is a 500: it surfaces after the body was accepted."""
    for key, value in options.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key in _INTEGERS and not number:
            raise ApiError(500, f'option "{key}" must be of type integer')
        if key in _NUMBERS and not number:
            raise ApiError(500, f'option "{key}" must be of type float32')
        if key == "stop" and not isinstance(value, list):
            raise ApiError(500, f'option "{key}" must be of type array')
        if key == "stop" and not all(isinstance(stop, str) for stop in value):
            raise ApiError(500, f'option "{key}" must be of an array of strings')
        if key == "use_mmap" and not isinstance(value, bool):
            raise ApiError(500, f'option "{key}" must be of type boolean')


def settings(
    exchange: Exchange, model: Model, options: Mapping[str, Any], *, shift: bool = True
) -> Settings:
    check(options)
    return exchange.node.engine.settings(model, options, shift=shift)


RENDERS_SINCE = (0, 11, 5)


def only_renders(exchange: Exchange, fields: Fields) -> bool:
    """Whether the prompt is wanted and no answer; old versions do not know that."""
    version = tuple(int(part) for part in exchange.node.settings.version.split(".")[:3])
    return version >= RENDERS_SINCE and fields.flag("_debug_render_only")


def debug_info(prompt: str, images: int) -> dict[str, Any]:
    told: dict[str, Any] = {"rendered_template": prompt}
    return {**told, "image_count": images} if images else told


THINKING = '("high", "medium", "low", "max", true, or false)'


def think(fields: Fields) -> Any:
    """`think` as sent; what is neither a flag nor a level is refused before the model is found."""
    wish = fields.raw.get("think")
    if isinstance(wish, str) and wish not in ("high", "medium", "low", "max"):
        must = THINKING.replace("(", "(must be ", 1)
        raise BadBody(f"invalid think value: {json.dumps(wish, ensure_ascii=False)} {must}")
    if not isinstance(wish, bool | str | None):
        raise BadBody(f"think must be a boolean or string {THINKING}")
    return wish


def images(fields: Fields) -> list[str]:
    """The `images` of a prompt or a message, in base64."""
    given = [str(image) for image in fields.array("images", "[]api.ImageData")]
    for image in given:
        right = _BASE64.match(image)
        if right is not None and right.end() < len(image):
            raise BadBody(f"illegal base64 data at input byte {right.end()}")
    return given


def check_logprobs(fields: Fields) -> None:
    if not 0 <= (fields.number("top_logprobs") or 0) <= 20:
        raise ApiError(400, "top_logprobs must be between 0 and 20")


def wants_thinking(model: Model, asked: Any, name: str) -> bool:
    """`think` as sent: a flag or a level; models that can think do so unless told not to."""
    able = "thinking" in model.capabilities
    if asked is None:
        return able
    if asked is not False and asked != "none" and not able:
        raise ApiError(400, f'"{name}" does not support thinking')
    return asked is not False and asked != "none"


def turn(
    exchange: Exchange,
    request: Request,
    options: Mapping[str, Any],
    *,
    keep_alive: float | None = None,
    images: int = 0,
    shift: bool = True,
    truncate: bool = True,
) -> Turn:
    """Everything the engine needs, from what the route understood."""
    wanted = settings(exchange, request.model, options, shift=shift)
    extra = images * IMAGE_TOKENS
    tokens = count_tokens(request.prompt) + extra
    if tokens > wanted.num_ctx:
        request = replace(request, prompt=middle_cut(request.prompt, wanted.num_ctx))
    refusal = None
    if isinstance(request.format, str) and request.format not in ("", "json"):
        quoted = json.dumps(json.dumps(request.format))
        text = f'invalid format: {quoted}; expected "json" or a valid JSON Schema object'
        refusal = (500, text)
    elif tokens > wanted.num_ctx and not truncate:
        refusal = (400, TOO_LONG)
    own = exchange.node.settings.answer
    script = answer(request, own)
    if request.written:
        whole = answer(replace(request, written="", num_predict=len(request.written)), own)
        extra += tokens_in(whole.content, request.written) or count_tokens(request.written)
    if not shift:
        script = _ended_by(script, max(wanted.num_ctx - tokens, 0) + 1)
    return Turn(
        model=request.model,
        prompt=request.prompt,
        script=script,
        settings=wanted,
        keep_alive=keep_alive,
        extra_tokens=extra,
        refusal=refusal,
    )


def middle_cut(prompt: str, num_ctx: int) -> str:
    """What is evaluated of a prompt that is too long: its first tokens and its end."""
    most, kept = num_ctx * TOKEN_CHARACTERS, min(KEPT_TOKENS, num_ctx - 1) * TOKEN_CHARACTERS
    return prompt[:kept] + prompt[kept - most :]


def _ended_by(script: Script, tokens: int) -> Script:
    """Where nothing may shift, an answer ends when the context is full."""
    if len(script.content) <= tokens:
        return script
    return replace(script, content=script.content[:tokens], done_reason="length")


def tools(fields: Fields) -> list[dict[str, Any]]:
    """The request's tools; a `null` among them is one without a name."""
    return [tool.raw for tool in fields.objects("tools", "api.Tools", "api.Tool")]


def stops(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    return tuple(str(stop) for stop in value) if isinstance(value, list) else ()


def conversation(
    exchange: Exchange,
    model: Model,
    messages: Sequence[Fields],
    options: Mapping[str, Any],
    *,
    truncate: bool = True,
) -> str:
    """The prompt of a chat: without its oldest messages if all do not fit, but the system's."""
    prompt = flatten(messages)
    most = settings(exchange, model, options).num_ctx if truncate else math.inf
    for first in range(1, len(messages)):
        if count_tokens(prompt) <= most:
            break
        system = [said for said in messages[:first] if said.text("role") == "system"]
        prompt = flatten([*system, *messages[first:]])
    return prompt


def flatten(messages: Sequence[Fields]) -> str:
    """The conversation as the prompt a runner would see: with its answer, a prefix of the next."""
    said = [f"<|{message.text('role')}|>\n{content_text(message)}" for message in messages]
    return "\n".join([*said, "<|assistant|>\n"])


def content_text(message: Fields) -> str:
    """`content` as plain text, also where it is a list of parts."""
    content = message.raw.get("content")
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict)]
        return "".join(str(part.get("text") or "") for part in parts)
    return message.text("content")


def last_user(messages: Sequence[Fields]) -> str:
    said = [content_text(message) for message in messages if message.text("role") == "user"]
    return said[-1] if said else ""
