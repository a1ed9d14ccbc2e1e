"""What routing reads of a request; its bytes stay as the client sent them.

Ollama's decoder (Go) takes keys in any letter case, ignores what follows the first JSON value, and
lets the last of several equal keys win; so does the slow path here. Every field but the model's
name is read leniently: whether it is right is for Ollama to say.
"""

import json
from typing import Any

import msgspec
from msgspec import Raw, Struct
from starlette.types import Message, Receive

from ollama_coordinator.scheduler import RunnerOptions

from .dialects import Dialect, Surface
from .wire import ClientLeft, HttpError

BYTES_PER_TOKEN = 4
TOKENS_PER_IMAGE = 768
INLINE_IMAGE_BYTES = 20_000
"""A message longer than this with a data URL in it is taken for an image, not for text."""


async def read_body(receive: Receive, limit: int, declared: int | None) -> bytes:
    """The whole request body, joined once.

    Raises:
        HttpError: 413, as soon as more than `limit` bytes are announced or have come.
        ClientLeft: the client closed the connection before the end of its body.
    """
    parts: list[bytes] = []
    size = 0
    _check_size(declared or 0, limit)
    more = True
    while more:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        part = message.get("body", b"")
        if part:
            parts.append(part)
            size += len(part)
            _check_size(size, limit)
        more = message.get("more_body", False)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise HttpError(
            413, f"request body too large: the limit is {limit} bytes (COORDINATOR_MAX_BODY_MIB)"
        )


class _Message(Struct):
    content: Raw = Raw(b"")
    images: list[Raw] | None = None


class _Fields(Struct):
    model: str = ""
    messages: Raw | None = None
    prompt: Raw | None = None
    input: Raw | None = None
    images: Raw | None = None
    options: Raw | None = None
    keep_alive: Raw | None = None
    shift: Raw | None = None
    max_tokens: Raw | None = None
    max_completion_tokens: Raw | None = None


class _Limits(Struct):
    num_predict: int | None = None


class Routing(Struct, frozen=True):
    """What the scheduler wants to know of a request; see `scheduler.Request`."""

    name: str
    prompt_tokens: int = 0
    prefix: tuple[int, ...] = ()
    output_limit: int | None = None
    options: RunnerOptions = RunnerOptions()
    load_only: bool = False
    keep_alive: bytes = b""

    @property
    def unload_only(self) -> bool:
        """Whether the request only asks to drop the model from memory (`keep_alive` 0)."""
        return self.load_only and self.keep_alive.strip(b'"') in (b"0", b"0s", b"0m", b"0h")


_fields = msgspec.json.Decoder(_Fields)
_messages = msgspec.json.Decoder(list[Raw])
_message = msgspec.json.Decoder(_Message)
_options = msgspec.json.Decoder(RunnerOptions)
_limits = msgspec.json.Decoder(_Limits)
_integer = msgspec.json.Decoder(int)


def read_routing(surface: Surface, body: bytes) -> Routing:
    """Read the model's name and what the estimates need.

    Raises:
        HttpError: the body is empty or not JSON, or the model's name is missing or not a text;
            with Ollama's status and text.
    """
    try:
        fields = _fields.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        fields = _Fields()
    if not fields.model:
        fields = _read_as_go_does(surface, body)
    if not fields.model.strip():
        raise HttpError(*surface.nameless)
    tokens, prefix = _read_messages(fields.messages)
    for text in (fields.prompt, fields.input):
        tokens += _text_tokens(bytes(text)) if text is not None else 0
    return Routing(
        name=fields.model,
        prompt_tokens=tokens,
        prefix=prefix,
        output_limit=_output_limit(fields),
        options=_runner_options(fields),
        load_only=surface.dialect is Dialect.NATIVE and _is_empty(fields),
        keep_alive=bytes(fields.keep_alive or b""),
    )


def _is_empty(fields: _Fields) -> bool:
    """Whether there is nothing to generate: Ollama then only loads or unloads the model."""
    empty = (b'""', b"[]", b"null")
    given = (fields.messages, fields.prompt, fields.input, fields.images)
    return all(part is None or bytes(part) in empty for part in given)


def _read_messages(raw: Raw | None) -> tuple[int, tuple[int, ...]]:
    """The tokens of a conversation, and a chain of hashes: one per message, over all before it."""
    tokens = 0
    chain: list[int] = []
    try:
        for message in _messages.decode(raw) if raw is not None else ():
            read = _message.decode(message)
            tokens += _text_tokens(bytes(read.content)) + TOKENS_PER_IMAGE * len(read.images or ())
            chain.append(hash((chain[-1] if chain else 0, bytes(message))))
    except msgspec.DecodeError:
        pass
    return tokens, tuple(chain)


def _text_tokens(text: bytes) -> int:
    if len(text) > INLINE_IMAGE_BYTES and b";base64," in text:
        return TOKENS_PER_IMAGE * text.count(b";base64,")
    return len(text) // BYTES_PER_TOKEN


def _output_limit(fields: _Fields) -> int | None:
    """The client's own bound on the answer; negative (no bound) and unreadable are `None`."""
    limit: int | None = None
    try:
        if fields.options is not None:
            limit = _limits.decode(fields.options).num_predict
        for raw in (fields.max_tokens, fields.max_completion_tokens):
            limit = _integer.decode(raw) if raw is not None else limit
    except msgspec.DecodeError:
        return None
    return limit if limit is not None and limit >= 0 else None


def _runner_options(fields: _Fields) -> RunnerOptions:
    try:
        options = _options.decode(fields.options) if fields.options else RunnerOptions()
    except msgspec.DecodeError:
        return RunnerOptions()
    if fields.shift is None:
        return options
    return msgspec.structs.replace(options, shift=bytes(fields.shift) == b"true")


# ── as Go reads JSON ──────────────────────────────────────────────────────────────────────────

_GO_TEXTS = {
    "Expecting value": "looking for beginning of value",
    "Expecting property name enclosed in double quotes": (
        "looking for beginning of object key string"
    ),
    "Expecting ':' delimiter": "after object key",
    "Expecting ',' delimiter": "after object key:value pair",
    "Illegal trailing comma before end of object": "looking for beginning of object key string",
}
_GO_KINDS = {
    str: "string",
    bool: "bool",
    int: "number",
    float: "number",
    list: "array",
    dict: "object",
}


def _read_as_go_does(surface: Surface, body: bytes) -> _Fields:
    text = body.decode(errors="replace").lstrip(" \t\r\n")
    if not text:
        native = surface.dialect is Dialect.NATIVE
        raise HttpError(400, "missing request body" if native else "EOF")
    try:
        value, _ = json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as exc:
        raise HttpError(400, _go_text(exc)) from exc
    except RecursionError as exc:
        raise HttpError(400, "invalid JSON: exceeded max depth") from exc
    if value is None:
        return _Fields()
    if not isinstance(value, dict):
        kind = _GO_KINDS[type(value)]
        text = f"json: cannot unmarshal {kind} into Go value of type {surface.go_type}"
        raise HttpError(400, text)
    folded = {key.lower(): part for key, part in value.items()}
    model = folded.get("model")
    if model is not None and not isinstance(model, str):
        field = f"{surface.go_type.rpartition('.')[2]}.model"
        kind = _GO_KINDS[type(model)]
        raise HttpError(
            400, f"json: cannot unmarshal {kind} into Go struct field {field} of type string"
        )
    known: dict[str, Any] = {
        name: Raw(msgspec.json.encode(folded[name]))
        for name in _Fields.__struct_fields__
        if name != "model" and name in folded
    }
    return _Fields(model=model or "", **known)


def _go_text(error: json.JSONDecodeError) -> str:
    if error.pos >= len(error.doc) or error.msg.startswith("Unterminated"):
        return "unexpected EOF"
    where = _GO_TEXTS.get(error.msg, "looking for beginning of value")
    return f"invalid character {error.doc[error.pos]!r} {where}"
