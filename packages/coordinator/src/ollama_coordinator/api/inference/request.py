"""A request as it comes in: its body, its routing fields, and the scheduler's view of it.

Its bytes stay as the client sent them.

Ollama's decoder (Go) takes keys in any letter case, ignores what follows the first JSON value, and
lets the last of several equal keys win; so does the slow path here. Every field but the model's
name is read leniently: whether it is right is for Ollama to say.
"""

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from math import inf
from secrets import token_hex
from typing import Any

import msgspec
import zstandard
from msgspec import Raw, Struct
from starlette.types import Message, Receive, Scope

from ollama_coordinator.access import caller_of
from ollama_coordinator.api.http.body_timeout import LENGTH_DIGITS
from ollama_coordinator.api.http.dialects import Dialect, InferenceRoute
from ollama_coordinator.api.http.errors import (
    ClientLeft,
    HttpError,
    NamesNoModel,
    NoSuchModel,
)
from ollama_coordinator.api.http.gojson import TooDeep, read_fields
from ollama_coordinator.api.http.json_edit import (
    WINDOW_BYTES,
    Body,
    Scan,
    Span,
    is_small,
    no_object,
)
from ollama_coordinator.batches import NO_OPENING, Opening
from ollama_coordinator.scheduler import (
    NO_OPTIONS,
    Form,
    Kind,
    Lane,
    Request,
    RequestId,
    RunnerOptions,
)
from ollama_coordinator_common.names import model_key

BYTES_PER_TOKEN = 4
"""About as English text has in the vocabularies of today's models; speeds are learned with it."""

TOKENS_PER_IMAGE = 768
"""Vision models take 256 to some thousand; the order of magnitude is enough for an estimate."""

INLINE_IMAGE_BYTES = 20_000
"""A message longer than this with a data URL in it is taken for an image, not for text."""


async def read_body(receive: Receive, limit: int, headers: Mapping[bytes, bytes]) -> Body:
    """The whole request body, in one piece that is never copied.

    Raises:
        HttpError: 413, as soon as more than `limit` bytes are announced or have come.
        ClientLeft: the client closed the connection before the end of its body.
    """
    announced = headers.get(b"content-length", b"")
    if announced.isdigit() and int(announced[:LENGTH_DIGITS]) > limit:
        raise _too_large(limit)
    first, more = await _part(receive)
    if not more and len(first) <= limit:
        return first
    body = bytearray(first)
    while more and len(body) <= limit:
        part, more = await _part(receive)
        body += part
    if len(body) > limit:
        raise _too_large(limit)
    return body


async def _part(receive: Receive) -> tuple[bytes, bool]:
    message: Message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientLeft
    return message.get("body", b""), message.get("more_body", False)


def _too_large(limit: int) -> HttpError:
    text = f"request body too large: the limit is {limit} bytes (COORDINATOR_MAX_BODY_MIB)"
    return HttpError(413, text)


ZSTD_ROUTES = frozenset(
    f"/v1/{route}"
    for route in ("chat/completions", "completions", "embeddings", "responses", "messages")
)
ZSTD_WINDOW_BYTES, ZSTD_PLAIN_BYTES = 8 * 1024 * 1024, 20 * 1024 * 1024
"""Ollama's own limits on the decoder's memory and on the decompressed body."""


ZSTD_SLICE_BYTES = 1024
"""Decompressed at once: at most 32 MiB, if each four bytes stand for a block of 128 KiB."""


class NotDecompressed(HttpError):
    """A compressed body cannot be read; its answer has the native shape on every route."""


async def plain_body(route: InferenceRoute, headers: Mapping[bytes, bytes], body: Body) -> Body:
    """The body as JSON text, decompressed where the route allows it.

    Raises:
        NotDecompressed: it is not zstd, or too large.
    """
    if headers.get(b"content-encoding") != b"zstd" or route.path not in ZSTD_ROUTES:
        return body
    return await asyncio.to_thread(_decompress, body)


def _decompress(body: Body) -> bytes:
    frames = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES)
    parts: list[bytes] = []
    size, rest = 0, bytes(body)
    while rest:
        if len(rest) < len(zstandard.FRAME_HEADER):
            raise NotDecompressed(400, "unexpected EOF")
        if not rest.startswith(zstandard.FRAME_HEADER):
            raise NotDecompressed(400, "invalid input: magic number mismatch")
        frame = frames.decompressobj()
        at = 0
        try:
            while at < len(rest) and not frame.eof:
                parts.append(frame.decompress(rest[at : at + ZSTD_SLICE_BYTES]))
                at += ZSTD_SLICE_BYTES
                size += len(parts[-1])
                if size > ZSTD_PLAIN_BYTES:
                    raise NotDecompressed(413, "request body too large")
        except zstandard.ZstdError as exc:
            raise NotDecompressed(400, f"zstd: {exc}") from exc
        if not frame.eof:
            raise NotDecompressed(400, "unexpected EOF")
        rest = frame.unused_data + rest[at:]
    return b"".join(parts)


# ── the routing fields ────────────────────────────────────────────────────────────────────────

ABSENT = Raw()


CHECKS_EARLY = frozenset({"/v1/messages", "/v1/images/generations", "/v1/images/edits"})
"""Routes whose reader of bodies wants a model's name."""


class _Message(Struct):
    content: Raw = ABSENT
    images: list[Raw] | None = None


class _Fields(Struct):
    model: str = ""
    messages: Raw = ABSENT
    prompt: Raw = ABSENT
    suffix: Raw = ABSENT
    system: Raw = ABSENT
    context: Raw = ABSENT
    input: Raw = ABSENT
    images: Raw = ABSENT
    options: Raw = ABSENT
    keep_alive: Raw = ABSENT
    shift: Raw = ABSENT
    max_tokens: Raw = ABSENT
    max_completion_tokens: Raw = ABSENT
    stream: Raw = ABSENT
    tools: Raw = ABSENT
    format: Raw = ABSENT
    response_format: Raw = ABSENT


class _Limits(Struct):
    num_predict: int | None = None


_ZERO = re.compile(
    rb"[-+]?0+(?:\.0*)?(?:[eE][-+]?\d+)?"  # seconds
    rb'|"[-+]?(?:0|(?:0+(?:\.0*)?(?:[num]|\xc2\xb5)?[smh])+)"'  # Go's duration
)
"""A `keep_alive` of nothing: a number of seconds, or a duration as Go writes it."""


_NOTHING = re.compile(rb'|""|null|\[\s*\]')


_PLAIN_TEXT = re.compile(rb'\{\s*"type"\s*:\s*"text"\s*\}')
"""OpenAI's `response_format` of an ordinary answer."""


class Routing(Struct, frozen=True):
    """The fields of a request that the scheduler uses; see `scheduler.Request`.

    `unload_only`: it only asks to drop the model from memory (`keep_alive` 0).
    """

    name: str
    prompt_tokens: int = 0
    prefix: tuple[int, ...] = ()
    output_limit: int | None = None
    form: Form = Form.STREAM
    options: RunnerOptions = NO_OPTIONS
    load_only: bool = False
    unload_only: bool = False
    opening: Opening = NO_OPENING


_object = msgspec.json.Decoder(dict[str, Raw])
_text = msgspec.json.Decoder(str)
_messages = msgspec.json.Decoder(list[Raw])
_message = msgspec.json.Decoder(_Message)
_options = msgspec.json.Decoder(RunnerOptions)
_limits = msgspec.json.Decoder(_Limits)
_integer = msgspec.json.Decoder(int | None)


def read_routing(route: InferenceRoute, body: bytes) -> Routing:
    """Read the model's name and the fields for the estimates.

    Raises:
        HttpError: the body is empty or not JSON, or the model's name is missing or not a text;
            with Ollama's status and text.
    """
    fields = _read_plainly(body)
    if fields is None or not fields.model:
        fields = _read_as_go_does(route, body)
    tokens, prefix, first = _read_messages(fields.messages)
    for text in (fields.prompt, fields.input):
        tokens += _text_tokens(bytes(text))
    return _routing(route, fields, tokens, prefix, first)


def _routing(
    route: InferenceRoute, fields: _Fields, tokens: int, prefix: tuple[int, ...], first: bytes
) -> Routing:
    if not fields.model.strip():
        early = route.path in CHECKS_EARLY and not fields.model
        raise (NamesNoModel if early else NoSuchModel)(*route.nameless(fields.model), fields.model)
    load_only = route.dialect is Dialect.NATIVE and _is_empty(fields)
    return Routing(
        name=fields.model,
        prompt_tokens=tokens,
        prefix=prefix,
        output_limit=_output_limit(fields),
        form=_form(route, fields),
        options=_runner_options(fields),
        load_only=load_only,
        unload_only=load_only and _ZERO.fullmatch(bytes(fields.keep_alive)) is not None,
        opening=_opening(route, fields, prefix, first),
    )


async def read_any(route: InferenceRoute, body: Body, turn: asyncio.Lock) -> Routing:
    """As `read_routing`, for a body of any size: a large one is passed over in slices.

    One at a time has its `turn`, so that many large bodies together delay nobody for longer.

    Raises:
        HttpError: as `read_routing`; 413, it has too many values.
    """
    if is_small(body):
        with suppress(TooDeep):
            return read_routing(route, bytes(body))
    async with turn:
        return await _Large(route, body).read()


def _is_empty(fields: _Fields) -> bool:
    """Whether there is nothing to generate: Ollama then only loads or unloads the model."""
    given = (fields.messages, fields.prompt, fields.input, fields.images)
    return all(_NOTHING.fullmatch(bytes(part)) for part in given)


HEAD_BYTES = 16
"""Of a prompt's text: "Summarise this: " and the like. People's questions seldom share so much."""

EARLIER_TURNS = 3
"""So many messages are a question, its answer and the next question at least."""


def _opening(
    route: InferenceRoute, fields: _Fields, prefix: tuple[int, ...], first: bytes
) -> Opening:
    """How the prompt begins; none for embeddings, completions of code, and lists of items."""
    if route.kind is Kind.EMBED or len(fields.suffix) > 2:
        return NO_OPENING
    if len(prefix) >= EARLIER_TURNS:
        return Opening(conversation=prefix[1])
    if len(fields.context) > 2:
        return Opening(conversation=hash(bytes(fields.context)[:EARLIER_BYTES]))
    system, text = bytes(fields.system), first or bytes(fields.prompt) or bytes(fields.input)
    if text.startswith(b"[") and b'"text":' in text[:SMALL_BYTES]:
        text = text[text.index(b'"text":') + len(b'"text":') :].lstrip()
    if not text.startswith(b'"'):
        return NO_OPENING
    return Opening(head=hash((fields.model, system[:SMALL_BYTES], text[: HEAD_BYTES + 1])))


EARLIER_BYTES = 200
"""Of the tokens that an earlier answer of `/api/generate` ended with: some forty."""


def _read_messages(raw: Raw, before: Sequence[int] = ()) -> tuple[int, tuple[int, ...], bytes]:
    """The tokens of a conversation, a chain of hashes, and the content of the first message.

    The chain has one hash per message, over all before it. `before` is the end of the chain of the
    messages that came before these.
    """
    tokens, first = 0, b""
    chain: list[int] = []
    try:
        for message in _messages.decode(raw) if raw else ():
            read = _message.decode(message)
            first = first or bytes(read.content)
            tokens += _text_tokens(bytes(read.content)) + TOKENS_PER_IMAGE * len(read.images or ())
            chain.append(_link(chain or before, _hashed(bytes(message))))
    except msgspec.DecodeError:
        pass
    return tokens, tuple(chain), first


def _link(chain: Sequence[int], hashed: int) -> int:
    return hash((chain[-1] if chain else 0, hashed))


def _hashed(message: bytes) -> int:
    """The hash of a message; that of a long one is of its parts, as `Scan.hashed` makes it."""
    if len(message) <= WINDOW_BYTES:
        return hash(message)
    starts = range(0, len(message), WINDOW_BYTES)
    return hash(tuple(hash(message[start : start + WINDOW_BYTES]) for start in starts))


def _text_tokens(text: bytes) -> int:
    if len(text) > INLINE_IMAGE_BYTES and b";base64," in text:
        return TOKENS_PER_IMAGE * text.count(b";base64,")
    return len(text) // BYTES_PER_TOKEN


def _output_limit(fields: _Fields) -> int | None:
    """The client's own bound on the answer; negative (no bound) and unreadable are `None`."""
    limit: int | None = None
    try:
        if fields.options:
            limit = _limits.decode(fields.options).num_predict
        for raw in (fields.max_tokens, fields.max_completion_tokens):
            given = _integer.decode(raw) if raw else None
            limit = limit if given is None else given
    except msgspec.DecodeError:
        return None
    return limit if limit is not None and limit >= 0 else None


def _form(route: InferenceRoute, fields: _Fields) -> Form:
    """How the answer reaches its receiver; Ollama's own dialect streams where none is asked for."""
    if not _NOTHING.fullmatch(bytes(fields.tools)):
        return Form.TOOLS
    shaped = (bytes(fields.format), bytes(fields.response_format))
    if not all(_NOTHING.fullmatch(part) or _PLAIN_TEXT.fullmatch(part) for part in shaped):
        return Form.FORMAT
    streams = bytes(fields.stream) == b"true"
    if route.dialect is Dialect.NATIVE:
        streams = bytes(fields.stream) != b"false" and route.kind is not Kind.EMBED
    return Form.STREAM if streams else Form.WHOLE


def _runner_options(fields: _Fields) -> RunnerOptions:
    try:
        options = _options.decode(fields.options) if fields.options else NO_OPTIONS
    except msgspec.DecodeError:
        return NO_OPTIONS
    if bytes(fields.shift) not in (b"true", b"false"):
        return options
    return msgspec.structs.replace(options, shift=bytes(fields.shift) == b"true")


_RAW = tuple(name for name in _Fields.__struct_fields__ if name != "model")


def _read_plainly(body: bytes) -> _Fields | None:
    """The fast path; `None` for a body that Go reads otherwise, such as `Model` for `model`."""
    try:
        given = _object.decode(body)
        for key in given:
            if key != key.lower():
                return None
        model = _text.decode(given["model"])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError):
        return None
    return _Fields(model, **{name: given[name] for name in _RAW if name in given})


def _read_as_go_does(route: InferenceRoute, body: bytes) -> _Fields:
    """The slow path, for a body that the fast one cannot read, or finds no name in."""
    native = route.dialect is Dialect.NATIVE
    fields = read_fields(body, route.go_type, "missing request body" if native else "EOF")
    known: dict[str, Any] = {
        name: Raw(json.dumps(fields.values[name]).encode())
        for name in _Fields.__struct_fields__
        if name != "model" and name in fields.values
    }
    return _Fields(model=fields.text("model"), **known)


# ── large bodies ──────────────────────────────────────────────────────────────────────────────

SMALL_BYTES = 4096
"""Fields of a large body that are no longer are read as in a small one; most have 20 bytes."""

MOST_MESSAGES = 10_000
"""In a longer conversation its messages are not told apart: it fits into no model."""

MOST_IMAGES = 1000
"""In one message; more are counted as one text."""

SOMETHING = Raw(b'"..."')
"""In place of a field that is too large to be read, and hence not empty."""


class _Large:
    """Reads one large body; of its fields only small ones are copied."""

    def __init__(self, route: InferenceRoute, body: Body) -> None:
        self._route = route
        self._body = body
        self._scan = Scan(body)

    async def read(self) -> Routing:
        """The routing fields."""
        members = await self._scan.members()
        if members is None:
            await no_object(self._body, self._route.go_type)
            members = {}
        fields = _Fields(self._name(members.get("model")))
        for name in _RAW:
            if name in members:
                small = len(members[name]) <= SMALL_BYTES
                setattr(fields, name, Raw(members[name].of(self._body)) if small else SOMETHING)
        tokens, prefix, first = await self._messages(members.get("messages"))
        for name in ("prompt", "input"):
            tokens += await self._tokens(members.get(name))
            first = first or self._start(members.get(name))
        return _routing(self._route, fields, tokens, prefix, first)

    def _name(self, span: Span | None) -> str:
        if span is None:
            return ""
        if len(span) > SMALL_BYTES:
            raise HttpError(400, "invalid model name")
        only = b'{"model":' + span.of(self._body) + b"}"
        return read_fields(only, self._route.go_type).text("model")

    def _start(self, span: Span | None) -> bytes:
        """The first bytes of a value."""
        if span is None:
            return b""
        return bytes(self._body[span.start : min(span.end, span.start + SMALL_BYTES)])

    async def _messages(self, span: Span | None) -> tuple[int, tuple[int, ...], bytes]:
        """As `_read_messages`."""
        if span is None:
            return 0, (), b""
        messages = await self._scan.items(span, MOST_MESSAGES)
        if messages is None:
            return len(span) // BYTES_PER_TOKEN, (), b""
        tokens, first = 0, b""
        chain: list[int] = []
        for message in messages:
            if len(message) <= WINDOW_BYTES:
                one = Raw(b"[" + message.of(self._body) + b"]")
                more, links, content = _read_messages(one, chain[-1:])
                if not links:
                    break
                first = first or content
                tokens += more
                chain.append(links[0])
                await self._scan.pause()
                continue
            members = await self._scan.members(message)
            if members is None:
                break
            tokens += await self._tokens(members.get("content"))
            first = first or self._start(members.get("content"))
            images = members.get("images")
            listed = None if images is None else await self._scan.items(images, MOST_IMAGES)
            tokens += TOKENS_PER_IMAGE * len(listed or ())
            chain.append(_link(chain, await self._scan.hashed(message)))
        return tokens, tuple(chain), first

    async def _tokens(self, span: Span | None) -> int:
        """As `_text_tokens`."""
        if span is None:
            return 0
        images = 0
        if len(span) > INLINE_IMAGE_BYTES:
            images = await self._scan.count(b";base64,", span)
        return TOKENS_PER_IMAGE * images if images else len(span) // BYTES_PER_TOKEN


# ── for the scheduler ─────────────────────────────────────────────────────────────────────────

MAX_WAIT = b"x-ollama-coordinator-max-wait"
LANE = b"x-ollama-coordinator-lane"
PACE = b"x-ollama-coordinator-pace"
LANES = {b"": Lane.INTERACTIVE, b"interactive": Lane.INTERACTIVE, b"batch": Lane.BATCH}

_kept_key = lru_cache(maxsize=1024)(model_key)
"""Few names are asked for again and again, and parsing one takes several steps."""

KEPT_NAME_CHARACTERS = 200
"""A longer name is parsed each time: clients may send any."""


WAITED = "waited"
"""The key in an ASGI scope of the seconds that a request waited before it came here."""


def schedulable(
    route: InferenceRoute, routing: Routing, scope: Scope, now: float, *, pace: float
) -> Request:
    """The request as the scheduler takes it; the name of its client is for fairness.

    Embeddings have a lane of their own; other requests name theirs, and how long they wait for a
    place, in headers, as well as the pace at which a stream is read, where it is not `pace`.

    Raises:
        InvalidModelName: the model's name cannot be one.
        HttpError: a header that is wrong.
        Denied: its client's key may not use the model.
    """
    headers, caller = dict(scope["headers"]), caller_of(scope)
    key, reason = caller.key, ""
    lane = Lane.EMBEDDING if route.kind is Kind.EMBED else LANES.get(headers.get(LANE, b""))
    if lane is not Lane.EMBEDDING and LANE not in headers and key is not None and key.lane:
        lane, reason = Lane(key.lane), f"the key '{key.name}' has this lane"
    if lane is None:
        raise HttpError(400, "X-Ollama-Coordinator-Lane: give interactive or batch")
    short = len(routing.name) <= KEPT_NAME_CHARACTERS
    model = (_kept_key if short else model_key)(routing.name)
    if key is not None:
        caller.check_model(model)
    return Request(
        id=RequestId(token_hex(8)),
        model=model,
        name=routing.name,
        arrived_at=now,
        kind=route.kind,
        lane=lane,
        lane_reason=reason,
        form=routing.form,
        pace=_pace(headers[PACE]) if PACE in headers else pace,
        client=caller.name,
        weight=1.0 if key is None else key.weight,
        key="" if key is None else key.name,
        prompt_tokens=routing.prompt_tokens,
        prefix=routing.prefix,
        output_limit=routing.output_limit,
        options=routing.options,
        load_only=routing.load_only,
        deadline=now + _seconds(headers[MAX_WAIT]) if MAX_WAIT in headers else None,
    )


def _pace(text: bytes) -> float:
    try:
        pace = float(text)
    except ValueError:
        pace = 0.0
    if not 0 < pace < inf:
        raise HttpError(400, "X-Ollama-Coordinator-Pace: give tokens a second, more than 0")
    return pace


def _seconds(text: bytes) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < inf:
        raise HttpError(400, "X-Ollama-Coordinator-Max-Wait: give a number of seconds, 0 or more")
    return seconds
