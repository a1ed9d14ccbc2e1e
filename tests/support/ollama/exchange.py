"""One request and its answer, with the faults that befall it between the two."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
from collections.abc import Mapping
from typing import Any, Literal

from aiohttp import hdrs, web

from . import wire
from .faults import REQUEST_KINDS, STREAM_KINDS, Injected
from .gojson import BadBody, Fields, first_value, fold
from .node import Node
from .seen import Record

JSON = "application/json; charset=utf-8"
PLAIN_JSON = "application/json"
NDJSON = "application/x-ndjson"
SSE = "text/event-stream"
TEXT = "text/plain"

ZSTD_PATHS = frozenset(
    f"/v1/{route}"
    for route in ("chat/completions", "completions", "embeddings", "responses", "messages")
)


MAX_BODY_BYTES = 20 * 2**20


class Severed(Exception):
    """The connection is to be cut here, and nothing more sent."""

    def __init__(self, how: Literal["rst", "fin"]) -> None:
        self.how: Literal["rst", "fin"] = how


class EndEarly(Exception):
    """The body ends properly, but without its last line."""


class Garbled(Exception):
    """A line that is no JSON goes out."""


class _Anonymous(web.StreamResponse):
    """Ollama names no server; aiohttp does unless told otherwise."""

    async def _prepare_headers(self) -> None:
        await super()._prepare_headers()
        self.headers.popall(hdrs.SERVER, None)


class Answer(web.Response, _Anonymous):
    """A whole answer."""


class Stream(_Anonymous):
    """An answer in pieces."""


class Exchange:
    """What a route is given: the request's body, and the ways to answer."""

    def __init__(self, node: Node, request: web.BaseRequest, record: Record) -> None:
        self.node = node
        self.request = request
        self.record = record
        self.path = request.path
        self.dialect = wire.dialect_of(request.path)
        self.argument = ""  # the last path segment of routes that take one
        self.cors: dict[str, str] = {}
        self._value: Any = None
        self._bad: str | None = None
        self._trouble: Injected | None = None
        self._pieces = 0

    async def read(self) -> None:
        """The body, decoded as far as it is JSON; complaints wait until a route asks."""
        self.record.body = body = await self.request.read()
        if self.request.headers.get("Content-Encoding") == "zstd" and self.path in ZSTD_PATHS:
            body = decompressed(body)
        try:
            self._value = first_value(body)
        except BadBody as exc:
            self._bad = str(exc)
            return
        if isinstance(self._value, dict):
            named = fold(self._value)
            self.record.model = str(named.get("model") or named.get("name") or "")

    def fields(self, struct: str) -> Fields:
        if self._bad is not None:
            empty = self._bad == "EOF" and self.dialect == "native"
            raise BadBody("missing request body" if empty else self._bad)
        return Fields(struct, self._value)

    # Answers

    def json(self, value: Any, status: int = 200, content_type: str = "") -> Answer:
        """Handlers of `/v1` end the line and name no charset, the native ones do otherwise."""
        if content_type or self.dialect == "native":
            return self._answer(status, wire.encode(value), content_type or JSON)
        return self._answer(status, wire.encode(value) + b"\n", PLAIN_JSON)

    def text(self, text: str | bytes, status: int = 200, content_type: str = TEXT) -> Answer:
        body = text.encode() if isinstance(text, str) else text
        return self._answer(status, body, content_type)

    def error(self, status: int, text: str, content_type: str = "", **extra: Any) -> Answer:
        return self.json(wire.error_body(self.dialect, status, text, **extra), status, content_type)

    def refusal(self, error: wire.ApiError) -> Answer:
        if error.native:
            self.dialect = "native"
        kind = JSON if error.early else PLAIN_JSON if error.begun else ""
        return self.error(error.status, error.text, kind, **error.extra)

    def nothing(self, status: int = 200) -> Answer:
        return Answer(status=status, headers=self.cors)

    def _answer(self, status: int, body: bytes, content_type: str) -> Answer:
        headers = {"Content-Type": content_type, **self.cors}
        return Answer(status=status, body=body, headers=headers)

    def sink(self, content_type: str, headers: Mapping[str, str] | None = None) -> Sink:
        return Sink(self, {"Content-Type": content_type, **self.cors, **(headers or {})})

    # Faults, in the order a request meets them

    async def before_answer(self) -> Answer | None:
        """A fault's own answer, or None; also decides what will befall the stream."""
        faults = self.node.faults
        concerned = self.path, self.record.model, self.record.body
        hit = faults.pick(REQUEST_KINDS, *concerned)
        if hit is None:
            self._trouble = faults.pick(STREAM_KINDS, *concerned)
            return None
        kind = hit.fault.kind
        if kind == "fin" or kind == "rst":
            raise Severed(kind)
        if kind == "garbage":
            transport = self.request.transport
            assert transport is not None
            transport.write(b"SSH-2.0-OpenSSH_9.6\r\n")
            raise Severed("fin")
        if kind == "hang":
            await self.parked(hit)
            return None
        return self._status(hit)

    def _status(self, hit: Injected) -> Answer:
        fault = hit.fault
        if fault.raw == "":  # as of a handler that panicked
            answer = self.nothing(fault.status)
        elif fault.raw is not None:
            answer = self.text(fault.raw, fault.status)
        elif isinstance(fault.body, dict):
            answer = self.json(fault.body, fault.status)
        else:
            answer = self.error(fault.status, fault.body or "injected failure")
        answer.headers.update(fault.headers)
        return answer

    async def parked(self, hit: Injected, seconds: float | None = None) -> None:
        """Stops here until the fault is cleared or its time is over."""
        seen = self.node.seen
        seen.faulted += 1
        seen.changed()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await hit.released.wait()
        finally:
            seen.faulted -= 1
            seen.changed()

    @property
    def troubled(self) -> bool:
        return self._trouble is not None

    async def passed(self) -> None:
        """Called before each piece of an answer; the place where a stream's fault strikes."""
        if self._trouble is not None and self._pieces >= self._trouble.fault.after:
            await self._strike()
        self._pieces += 1

    async def ending(self) -> None:
        """Called before the last piece: an answer too short for its fault meets it here."""
        if self._trouble is not None:
            await self._strike()

    async def _strike(self) -> None:
        hit, self._trouble = self._trouble, None
        if hit is None:
            return
        match hit.fault.kind:
            case "stall":
                await self.parked(hit, hit.fault.seconds)
            case "cut":
                raise Severed(hit.fault.how)
            case "malformed":
                raise Garbled
            case "end_without_done":
                raise EndEarly
            case _:
                if hit.fault.unloads:
                    self.node.engine.unload_all()
                raise wire.StreamError(hit.fault.text)


class Sink:
    """A streamed answer; the headers go out with the first piece, as Ollama's do."""

    def __init__(self, exchange: Exchange, headers: Mapping[str, str]) -> None:
        self._exchange = exchange
        self._node = exchange.node
        self._headers = headers
        self._response: Stream | None = None

    @property
    def opened(self) -> bool:
        return self._response is not None

    async def write(self, chunk: bytes) -> None:
        if not self._node.audible.is_set():
            await self._node.audible.wait()
        response = self._response or await self._open()
        await response.write(chunk)

    async def close(self) -> Stream:
        """Ends the body properly."""
        response = self._response or await self._open()
        await response.write_eof()
        return response

    async def _open(self) -> Stream:
        self._response = response = Stream(headers=self._headers)
        response.enable_chunked_encoding()
        self._exchange.record.status = 200
        await response.prepare(self._exchange.request)
        return response


def _zstd() -> Any | None:
    try:
        return importlib.import_module("zstandard")
    except ImportError:
        return None


def decompressed(body: bytes) -> bytes:
    """A zstd body, read; refused in the native shape, as no route has been reached yet."""
    library = _zstd()
    if library is None:
        raise wire.ApiError(400, "this stand-in has no zstd library", native=True)
    try:
        reader = library.ZstdDecompressor(max_window_size=8 * 2**20).stream_reader(body)
        plain: bytes = reader.read(MAX_BODY_BYTES + 1)
    except library.ZstdError as exc:
        raise wire.ApiError(400, f"zstd: {exc}", native=True) from None
    if len(plain) > MAX_BODY_BYTES:
        raise wire.ApiError(413, "request body too large", native=True)
    return plain
