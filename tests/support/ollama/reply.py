"""From a turn to an answer: one way for every dialect, streamed or whole."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from aiohttp import web

from .exchange import NDJSON, PLAIN_JSON, EndEarly, Exchange, Garbled, Sink
from .generation import Emit, Generation, Kind, Timings, Turn, generation
from .script import ToolCall
from .wire import ApiError, StreamError, encode

STREAM_HEADERS: Mapping[str, str] = {"Cache-Control": "no-cache", "Connection": "keep-alive"}
"""What Ollama sends along with server-sent events that have names."""


def event(kind: str, /, **data: Any) -> bytes:
    """A server-sent event with a name."""
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), encode({"type": kind, **data}))


@dataclass
class Outcome:
    """What a generation came to."""

    content: str = ""
    thinking: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    done: bool = True
    done_reason: str = "stop"
    timings: Timings = field(default_factory=Timings)


class Encoder(Protocol):
    """How one dialect writes an answer."""

    content_type: str
    headers: Mapping[str, str]
    garbage: bytes

    def opening(self) -> bytes:
        """Goes out together with the first piece."""

    def piece(self, kind: Kind, text: str) -> bytes: ...

    def tool_calls(self, calls: list[ToolCall]) -> bytes: ...

    def closing(self, outcome: Outcome) -> bytes:
        """The end as it should be, terminator included."""

    def error(self, text: str) -> bytes:
        """What is left of an error after the first byte; the body ends with it."""

    def whole(self, outcome: Outcome) -> Any:
        """The answer to a request that did not ask for a stream."""


async def reply(
    exchange: Exchange, turn: Turn, encoder: Encoder, *, stream: bool
) -> web.StreamResponse:
    """Runs the turn; what fails before the first piece is raised and becomes a status."""
    async with generation(exchange.node.engine, turn) as running:
        if stream:
            return await _streamed(exchange, running, encoder)
        return await _whole(exchange, running, encoder)


async def _streamed(
    exchange: Exchange, running: Generation, encoder: Encoder
) -> web.StreamResponse:
    sink = exchange.sink(encoder.content_type, encoder.headers)
    script = running.turn.script
    try:
        await running.run(_emitter(exchange, sink, encoder))
        if script.tool_calls:
            await _passed(exchange, sink, encoder)
            await _first(sink, encoder, encoder.tool_calls(script.tool_calls))
        await _ending(exchange, sink, encoder)
        if script.done:
            outcome = _outcome(running)
            await _first(sink, encoder, encoder.closing(outcome))
    except EndEarly:
        pass
    except StreamError as exc:
        if not sink.opened:
            raise ApiError(exc.status, str(exc), begun=True) from None
        await sink.write(encoder.error(str(exc)))
    return await sink.close()


def _emitter(exchange: Exchange, sink: Sink, encoder: Encoder) -> Emit:
    """The path of every token: encode, write."""
    write, piece, troubled = sink.write, encoder.piece, exchange.troubled

    async def emit(kind: Kind, text: str) -> None:
        if troubled:
            await _passed(exchange, sink, encoder)
        if sink.opened:
            await write(piece(kind, text))
        else:
            await _first(sink, encoder, piece(kind, text))

    return emit


async def _first(sink: Sink, encoder: Encoder, chunk: bytes) -> None:
    await sink.write(chunk if sink.opened else encoder.opening() + chunk)


async def _passed(exchange: Exchange, sink: Sink, encoder: Encoder) -> None:
    try:
        await exchange.passed()
    except Garbled:
        await sink.write(encoder.garbage)


async def _ending(exchange: Exchange, sink: Sink, encoder: Encoder) -> None:
    try:
        await exchange.ending()
    except Garbled:
        await sink.write(encoder.garbage)


async def _whole(exchange: Exchange, running: Generation, encoder: Encoder) -> web.StreamResponse:
    pieces: list[tuple[Kind, str]] = []

    async def emit(kind: Kind, text: str) -> None:
        await exchange.passed()
        pieces.append((kind, text))

    try:
        await running.run(emit)
        await exchange.ending()
        outcome = _outcome(running)
    except EndEarly:
        outcome = Outcome(content=_text(pieces, "content"), done=False)
    return exchange.json(encoder.whole(outcome))


def _text(pieces: list[tuple[Kind, str]], kind: Kind) -> str:
    return "".join(text for each, text in pieces if each == kind)


def _outcome(running: Generation) -> Outcome:
    script = running.turn.script
    if not script.done:
        return Outcome(content="".join(script.content), done=False)
    return Outcome(
        content="".join(script.content),
        thinking="".join(script.thinking),
        tool_calls=script.tool_calls,
        done_reason=script.done_reason,
        timings=running.timings,
    )


class ProgressLines:
    """Native progress objects: a line each, or only the last one where no stream was asked for."""

    def __init__(self, exchange: Exchange, *, stream: bool) -> None:
        self._exchange = exchange
        self.sink = exchange.sink(NDJSON) if stream else None
        self.last: dict[str, Any] = {}

    async def send(self, status: str, **rest: Any) -> None:
        self.last = {"status": status, **{key: value for key, value in rest.items() if value}}
        try:
            await self._exchange.passed()
        except Garbled:
            await self._line(b'{"status":"pul\n')
        await self._line(encode(self.last) + b"\n")

    async def _line(self, line: bytes) -> None:
        if self.sink is not None:
            await self.sink.write(line)


async def report(
    exchange: Exchange, work: Callable[[ProgressLines], Awaitable[None]], *, stream: bool
) -> web.StreamResponse:
    """Runs long work; what it raises becomes the last line, or a status if nothing was streamed."""
    lines = ProgressLines(exchange, stream=stream)
    failure: StreamError | None = None
    try:
        await work(lines)
    except StreamError as exc:
        failure = exc
    except EndEarly:
        pass
    if failure is not None and (lines.sink is None or not lines.sink.opened):
        raise ApiError(failure.status, str(failure), begun=True)
    if lines.sink is None:
        return exchange.json(lines.last, content_type=PLAIN_JSON)
    if failure is not None:
        await lines.sink.write(encode({"error": str(failure)}) + b"\n")
    return await lines.sink.close()
