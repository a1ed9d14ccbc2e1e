"""Large embedding requests, in portions: several agents embed the texts of one.

Each portion is a request of its own for the scheduler, which places it where it is done first, with
its own lease, attempts and retries. The client gets one answer: all vectors, in the order of its
texts, or the error of the first portion that failed, as if one agent had been asked.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from secrets import token_hex

import msgspec
from msgspec import Struct, structs
from starlette.types import Message, Send

from ollama_coordinator.api.http.dialects import Dialect
from ollama_coordinator.api.http.errors import HttpError, send_whole
from ollama_coordinator.api.http.json_edit import Body, Scan, Span
from ollama_coordinator.journal import JournalEntry
from ollama_coordinator.memory import BodyRoom
from ollama_coordinator.parts import Parts
from ollama_coordinator.scheduler import Request, RequestId

from .relay import Call, Failure
from .request import BYTES_PER_TOKEN

ROUTES = frozenset({"/api/embed", "/v1/embeddings"})

PORTION_TOKENS = 4096
"""The least that goes out by itself. A fast GPU takes some 50 ms for it, a CPU seconds; what a
portion costs beside (a connection, a lease, two passes over its JSON) is some milliseconds."""

PORTIONS_AN_AGENT = 2
"""So that a fast agent takes more of them than a slow one."""

MOST_TEXTS = 4096
"""In one request that is divided: its answers are kept until the last one is there, and as many
vectors of 4,096 numbers have 200 MB."""

TEXT_BYTES = 128 * 1024
"""Of an answer for each text: more than any vector has, 4,096 numbers take 48 KiB. A longer answer
is none."""

AGENT_HEADER = b"x-ollama-coordinator-agent"

Attempts = Callable[[Call], Awaitable[tuple[list[Failure], bool]]]
"""Serves a request: why no agent did, and whether it is poison; see `Proxy`."""


class Portion(Struct, frozen=True):
    """Some texts of a request: how many, and the request for them."""

    texts: int
    request: Request
    body: bytes


class PortionAnswer:
    """In the place of a client's `send`: what a portion is answered.

    It has room for the longest answer to so many texts, until its end tells what it needs.
    """

    def __init__(self, texts: int, room: BodyRoom) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.is_whole = False
        self.body = bytearray()
        self._room = room
        self._taken = self._most = _most_bytes(texts)

    def taken_out(self) -> bytearray:
        """The body, which is not kept any more; its room is still needed for what is made of it."""
        body, self.body = self.body, bytearray()
        return body

    def free(self, needed: int = 0) -> None:
        """Only so many bytes are needed any more."""
        self._room.give_back(self._taken - needed)
        self._taken = needed

    async def __call__(self, message: Message) -> None:
        """Keep a part of the answer.

        Raises:
            HttpError: 503, it has more bytes than its texts may have.
        """
        if message["type"] == "http.response.start":
            headers = message.get("headers", ())
            self.status = message["status"]
            self.headers = [header for header in headers if header[0] != b"content-length"]
        else:
            self.body += message.get("body", b"")
            self.is_whole = not message.get("more_body", False)
            if len(self.body) > self._most:
                raise HttpError(503, "an agent answers a part of a large embedding without an end")
            if self.is_whole:
                self.free(len(self.body))


class PortionUnserved(Exception):
    """A portion was served by nobody."""

    def __init__(self, failures: list[Failure], is_poison: bool) -> None:
        super().__init__()
        self.failures = failures
        self.is_poison = is_poison


class PortionRefused(Exception):
    """A portion is answered with an error, which is that of the whole request."""

    def __init__(self, answer: PortionAnswer) -> None:
        super().__init__()
        self.answer = answer


class Portions:
    """Divides large embedding requests, and puts their answers together."""

    def __init__(self, parts: Parts) -> None:
        self._registry = parts.registry
        self._clock = parts.clock
        self._turn = parts.reading
        self._room = parts.room

    async def of(self, call: Call) -> list[Portion]:
        """The portions of a request; none where it goes out whole.

        They have their room, which `serve` gives back: nothing may be awaited in between.
        """
        most = self._most(call)
        if most < 2:
            return []
        async with self._turn:
            scan = Scan(call.body)
            span = (await scan.members() or {}).get("input")
            texts = await scan.items(span, MOST_TEXTS) if span is not None else None
            quote = b'"'[0]
            if span is None or not texts or any(call.body[one.start] != quote for one in texts):
                return []
            most = min(most, len(texts))
            size = sum(map(len, texts))
            groups: list[list[Span]] = [[]]
            filled = 0
            for text in texts:
                if filled >= size * len(groups) / most and groups[-1]:
                    groups.append([])
                groups[-1].append(text)
                filled += len(text)
                await scan.pause()
            if len(groups) < 2:
                return []
            portions = [_portion(call, span, group, at) for at, group in enumerate(groups)]
            room = sum(len(one.body) + _most_bytes(one.texts) for one in portions)
            return portions if self._room.take_spare(room) else []

    def _most(self, call: Call) -> int:
        request = call.request
        most = request.prompt_tokens // PORTION_TOKENS
        is_plain = all(name.lower() != "content-encoding" for name, _ in call.headers)
        if call.route.path not in ROUTES or most < 2 or not is_plain:
            return 0
        now = self._clock.now()
        agents = [
            one
            for one in self._registry.holders(request.model)
            if one.id not in request.excluded and self._registry.is_routable(one, now)
        ]
        return min(most, PORTIONS_AN_AGENT * len(agents)) if len(agents) > 1 else 0

    async def serve(
        self, call: Call, portions: Sequence[Portion], entry: JournalEntry, attempts: Attempts
    ) -> tuple[list[Failure], bool]:
        """Serve a request in portions; the result is as that of `attempts`.

        Raises:
            OllamaCoordinatorError: a portion was not tried at all.
        """
        entry.is_divided = True
        answers = [PortionAnswer(portion.texts, self._room) for portion in portions]
        try:
            await _all_served(call, portions, answers, entry, attempts)
            async with self._turn:
                body = await _joined(call.route.dialect, portions, answers)
            await _send(call.send, _headers(answers), body)
        except PortionUnserved as exc:
            return exc.failures, exc.is_poison
        except PortionRefused as exc:
            answer = exc.answer
            await send_whole(call.send, answer.status, answer.headers, bytes(answer.body))
        finally:
            for answer in answers:
                answer.free()
            self._room.give_back(sum(len(portion.body) for portion in portions))
        return [], False


def _portion(call: Call, span: Span, texts: Sequence[Span], number: int) -> Portion:
    """The first one has the id of the request, by which it is cancelled."""
    body: Body = call.body
    parts = [bytes(body[: span.start]), b"[", b",".join(text.of(body) for text in texts), b"]"]
    parts.append(bytes(body[span.end :]))
    tokens = sum(map(len, texts)) // BYTES_PER_TOKEN
    request = structs.replace(call.request, prompt_tokens=tokens)
    if number:
        request = structs.replace(request, id=RequestId(token_hex(8)), admitted=True)
    return Portion(len(texts), request, b"".join(parts))


def _most_bytes(texts: int) -> int:
    """Of the answer to a portion, with what is beside its vectors."""
    return (texts + 1) * TEXT_BYTES


async def _all_served(
    call: Call,
    portions: Sequence[Portion],
    answers: Sequence[PortionAnswer],
    entry: JournalEntry,
    attempts: Attempts,
) -> None:
    """Fill the answers; with the first that fails the others end."""
    pairs = zip(portions, answers, strict=True)
    serving = [asyncio.ensure_future(_served(call, *pair, attempts)) for pair in pairs]
    try:
        await asyncio.wait(serving, return_when=asyncio.FIRST_EXCEPTION)
        for portion, one in zip(portions, serving, strict=True):
            if one.done() and one.exception() is not None:
                entry.end_with(portion.request.id)
                one.result()
    finally:
        for one in serving:
            one.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
        serving.clear()  # an error knows this frame, which would know the error
        del one


async def _served(call: Call, portion: Portion, answer: PortionAnswer, attempts: Attempts) -> None:
    own = structs.replace(
        call, request=portion.request, body=portion.body, send=answer, fitted=None, carrier=None
    )
    failures, is_poison = await attempts(own)
    if failures:
        raise PortionUnserved(failures, is_poison)
    if answer.status != 200:
        raise PortionRefused(answer)
    if not answer.is_whole:
        raise HttpError(503, "an agent broke off its part of a large embedding")


# ── one answer of several ─────────────────────────────────────────────────────────────────────


async def _joined(
    dialect: Dialect, portions: Sequence[Portion], answers: Sequence[PortionAnswer]
) -> list[bytes]:
    """The pieces of one body: vectors pass as they are, tokens are added up.

    Of durations the longest counts.

    Raises:
        HttpError: 503, a body is not what it should be.
    """
    join = _native if dialect is Dialect.NATIVE else _openai
    try:
        return await join([portion.texts for portion in portions], answers)
    except (HttpError, KeyError, msgspec.DecodeError) as exc:
        raise HttpError(503, f"an agent's part of a large embedding is none: {exc}") from exc


async def _native(counts: Sequence[int], answers: Sequence[PortionAnswer]) -> list[bytes]:
    """Bodies of `/api/embed`; durations in nanoseconds."""
    pieces, model = [], b""
    total, load, read = [], [], []
    for texts, answer in zip(counts, answers, strict=True):
        body = answer.taken_out()
        scan = Scan(body)
        found = await scan.members() or {}
        vectors = await _vectors(scan, found["embeddings"], texts)
        model = model or found["model"].of(body)
        for vector in vectors:
            pieces.append(b"," + vector.of(body))
            await scan.pause()
        total.append(_number(body, found.get("total_duration")))
        load.append(_number(body, found.get("load_duration")))
        read.append(_number(body, found.get("prompt_eval_count")))
    pieces[0] = b'{"model":%b,"embeddings":[' % model + pieces[0][1:]
    end = b'],"total_duration":%d,"load_duration":%d,"prompt_eval_count":%d}'
    return [*pieces, end % (max(total), max(load), sum(read))]


async def _openai(counts: Sequence[int], answers: Sequence[PortionAnswer]) -> list[bytes]:
    """Bodies of `/v1/embeddings`: each vector has its number."""
    pieces, model, number = [], b"", 0
    read = all_tokens = 0
    for texts, answer in zip(counts, answers, strict=True):
        body = answer.taken_out()
        scan = Scan(body)
        found = await scan.members() or {}
        model = model or found["model"].of(body)
        for vector in await _vectors(scan, found["data"], texts):
            index = (await scan.members(vector) or {})["index"]
            before, after = Span(vector.start, index.start), Span(index.end, vector.end)
            pieces.append(b",%b%d%b" % (before.of(body), number, after.of(body)))
            number += 1
            await scan.pause()
        used = await scan.members(found["usage"]) or {}
        read += _number(body, used.get("prompt_tokens"))
        all_tokens += _number(body, used.get("total_tokens"))
    pieces[0] = b'{"object":"list","data":[' + pieces[0][1:]
    end = b'],"model":%b,"usage":{"prompt_tokens":%d,"total_tokens":%d}}\n'
    return [*pieces, end % (model, read, all_tokens)]


async def _vectors(scan: Scan, span: Span, texts: int) -> list[Span]:
    vectors = await scan.items(span, texts + 1)
    if vectors is None or len(vectors) != texts:
        raise HttpError(503, f"it has not {texts} vectors")
    return vectors


def _number(body: Body, span: Span | None) -> int:
    return _count.decode(span.of(body)) if span is not None else 0


_count = msgspec.json.Decoder(int)


def _headers(answers: Sequence[PortionAnswer]) -> list[tuple[bytes, bytes]]:
    """Those of the first portion, with the names of all agents."""
    names = [value for one in answers for name, value in one.headers if name == AGENT_HEADER]
    agents = b", ".join(dict.fromkeys(names))
    return [(name, agents if name == AGENT_HEADER else value) for name, value in answers[0].headers]


async def _send(send: Send, headers: list[tuple[bytes, bytes]], pieces: Sequence[bytes]) -> None:
    """A whole answer; a piece has a vector."""
    length = (b"content-length", b"%d" % sum(map(len, pieces)))
    await send({"type": "http.response.start", "status": 200, "headers": [*headers, length]})
    for piece in pieces:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})
