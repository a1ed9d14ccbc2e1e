"""Finding and changing single fields of a JSON body, of any size, in slices.

A decoder holds the event loop until it is through: a second for some bodies. Here a body is passed
over from bracket to bracket, and other tasks run in between. Nothing is decoded or copied, and
whether a value between the brackets is right is for Ollama to say.
"""

import asyncio
import re
from collections.abc import Mapping
from contextlib import suppress

import msgspec
from msgspec import Struct

from ollama_coordinator.aio import Slices
from ollama_coordinator_common.printable import quoted

from .errors import HttpError, UnreadableBody
from .gojson import SINGLE, Fields, TooDeep, first_value, read_fields

Body = bytes | bytearray
"""A body in one piece; a bytearray where it came in several."""

MOST_VALUES = 1_000_000
"""Texts, objects and lists in one body. As many words fit into no model; a million take 0.3 s."""

MOST_DEPTH = 10_000
"""Go's decoder reads no more brackets in brackets."""

MOST_KEYS = 10_000
"""Of one object. No route of Ollama's reads more than some thirty."""

LONGEST_KEY = 1024
"""Bytes; a longer key is none that Ollama reads."""

AT_ONCE_BYTES, AT_ONCE_COMMAS = 256 * 1024, 10_000
"""A body of so much is decoded at once, in 20 ms at worst and in one as a rule. It may have as many
opening brackets as commas."""

WINDOW_BYTES = 64 * 1024
"""So much of a text is passed over at once: with an escape in every place half a millisecond."""

VALUES_A_SLICE = 256
"""So many values are passed over between two looks at the clock: 0.1 ms."""

_QUOTE, _BACKSLASH, _COLON, _COMMA = b'"\\:,'
_OPENING, _CLOSING = b"[{", b"]}"
_BLANK = b" "[0]

# Possessive, so that no match is tried twice.
_SPACE = re.compile(rb"[ \t\r\n]*+")
_SCALAR = re.compile(rb"[^,\[\]{}\" \t\r\n:]*+")
_FLAT = re.compile(rb'[^"\[\]{}]*+')
_IN_TEXT = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)

_text = msgspec.json.Decoder(str)


class Span(Struct, frozen=True):
    """Where a value is in a body: its first byte, and the one after its last."""

    start: int
    end: int

    def of(self, body: Body) -> bytes:
        """A copy of the value's bytes."""
        return bytes(body[self.start : self.end])

    def __len__(self) -> int:
        return self.end - self.start


class Scan:
    """Passes over one body; `await` its methods in turn.

    Raises (in every method):
        HttpError: 400, the JSON ends too early or is none; 413, it has too many values.
    """

    def __init__(self, body: Body) -> None:
        self._body = body
        self._slices = Slices()
        self._values = 0

    async def members(self, span: Span | None = None) -> dict[str, Span] | None:
        """The fields of an object by their names in lower case; `None`: it is no object.

        Of several alike the last one counts. Without `span` the whole body is meant.
        """
        at, end = self._bounds(span)
        if self._byte(at, end) != b"{"[0]:
            return None
        found: dict[str, Span] = {}
        at = self._space(at + 1, end)
        if self._byte(at, end) == b"}"[0]:
            return found
        while True:
            if self._byte(at, end) != _QUOTE:
                raise self._stray(at, "looking for beginning of object key string")
            after = await self._text_end(at + 1, end)
            key = self._key(at, after)
            at = self._space(after, end)
            if self._byte(at, end) != _COLON:
                raise self._stray(at, "after object key")
            start = self._space(at + 1, end)
            after = await self._value_end(start, end, outer=1)
            if key is not None:
                found[key] = Span(start, after)
            if len(found) > MOST_KEYS:
                raise HttpError(413, f"request body has too many fields: the limit is {MOST_KEYS}")
            at = self._space(after, end)
            if self._byte(at, end) == b"}"[0]:
                return found
            if self._body[at] != _COMMA:
                raise self._stray(at, "after object key:value pair")
            at = self._space(at + 1, end)

    async def items(self, span: Span, most: int) -> list[Span] | None:
        """The values of a list; `None`: it is no list, or longer than `most`."""
        at, end = self._bounds(span)
        if self._byte(at, end) != b"["[0]:
            return None
        found: list[Span] = []
        at = self._space(at + 1, end)
        if self._byte(at, end) == b"]"[0]:
            return found
        while len(found) < most:
            after = await self._value_end(at, end)
            found.append(Span(at, after))
            at = self._space(after, end)
            if self._byte(at, end) == b"]"[0]:
                return found
            if self._body[at] != _COMMA:
                raise self._stray(at, "after array element")
            at = self._space(at + 1, end)
        return None

    async def value(self) -> None:
        """Pass over the first value, whatever it is."""
        await self._value_end(*self._bounds(None))

    async def pause(self) -> None:
        """Let other tasks run, if this slice is over."""
        await self._slices.pause()

    async def count(self, needle: bytes, span: Span) -> int:
        """How often some bytes occur in a value."""
        found = 0
        for start in range(span.start, span.end, WINDOW_BYTES):
            stop = min(start + WINDOW_BYTES + len(needle) - 1, span.end)
            found += self._body.count(needle, start, stop)
            await self._slices.pause()
        return found

    async def hashed(self, span: Span) -> int:
        """A hash of a value's bytes."""
        parts = []
        for start in range(span.start, span.end, WINDOW_BYTES):
            parts.append(hash(bytes(self._body[start : min(start + WINDOW_BYTES, span.end)])))
            await self._slices.pause()
        return hash(tuple(parts))

    # ── parts ─────────────────────────────────────────────────────────────────────────────────

    def _bounds(self, span: Span | None) -> tuple[int, int]:
        end = len(self._body) if span is None else span.end
        return self._space(0 if span is None else span.start, end), end

    def _byte(self, at: int, end: int) -> int:
        if at >= end:
            raise UnreadableBody(400, "unexpected EOF")
        return self._body[at]

    def _space(self, at: int, end: int) -> int:
        if at < end and self._body[at] > _BLANK:
            return at
        matched = _SPACE.match(self._body, at, min(at + WINDOW_BYTES, end))
        after = at if matched is None else matched.end()
        if after - at == WINDOW_BYTES:
            raise HttpError(413, f"request body has {WINDOW_BYTES} bytes of white space in a row")
        return after

    def _stray(self, at: int, where: str) -> HttpError:
        return UnreadableBody(
            400, f"invalid character {quoted(chr(self._body[at]), SINGLE)} {where}"
        )

    def _key(self, start: int, end: int) -> str | None:
        if end - start > LONGEST_KEY:
            return None
        try:
            return _text.decode(self._body[start:end]).lower()
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None

    async def _counted(self) -> None:
        self._values += 1
        if self._values % VALUES_A_SLICE == 0:
            if self._values > MOST_VALUES:
                raise HttpError(
                    413, f"request body has too many values: the limit is {MOST_VALUES}"
                )
            await self._slices.pause()

    async def _text_end(self, at: int, end: int) -> int:
        """After the closing quote of the text that begins before `at`."""
        await self._counted()
        body = self._body
        while True:
            quote = body.find(b'"', at, end)
            if quote < 0:
                raise UnreadableBody(400, "unexpected EOF")
            if quote == at or body[quote - 1] != _BACKSLASH:
                return quote + 1
            matched = _IN_TEXT.match(body, at, min(at + WINDOW_BYTES, end))
            if matched is None or matched.end() == at:
                raise UnreadableBody(400, "unexpected EOF")
            at = matched.end()
            await self._slices.pause()

    async def _value_end(self, at: int, end: int, *, outer: int = 0) -> int:
        """After the value that begins here, in so many brackets."""
        body = self._body
        first = self._byte(at, end)
        if first == _QUOTE:
            return await self._text_end(at + 1, end)
        if first not in _OPENING:
            return await self._scalar_end(at, end)
        depth = outer
        while True:
            matched = _FLAT.match(body, at, min(at + WINDOW_BYTES, end))
            at = at if matched is None else matched.end()
            byte = self._byte(at, end)
            if byte == _QUOTE:
                at = await self._text_end(at + 1, end)
            elif byte in _OPENING:
                depth += 1
                if depth > MOST_DEPTH:
                    raise self._stray(at, "exceeded max depth")
                at += 1
                await self._counted()
            elif byte in _CLOSING:
                depth -= 1
                at += 1
                if depth == outer:
                    return at
            else:
                await self._slices.pause()

    async def _scalar_end(self, start: int, end: int) -> int:
        """After a number or a word, of any length."""
        at, stop = start, start
        while at == stop:
            stop = min(at + WINDOW_BYTES, end)
            matched = _SCALAR.match(self._body, at, stop)
            at = at if matched is None else matched.end()
            if at == start:
                raise self._stray(at, "looking for beginning of value")
            if at == end:
                break
            await self._slices.pause()
        return at


def is_small(body: Body) -> bool:
    """Whether a body may be decoded at once."""
    return (
        len(body) <= AT_ONCE_BYTES
        and body.count(b",") <= AT_ONCE_COMMAS
        and body.count(b"[") + body.count(b"{") <= AT_ONCE_COMMAS
    )


async def no_object(body: Body, go_type: str) -> Fields:
    """As `gojson.read_fields`, for a large body that is no object: there are no fields in `null`.

    Raises:
        HttpError: 400, as Go says it.
    """
    await Scan(body).value()
    start = bytes(body[: 2 * WINDOW_BYTES]).lstrip(b" \t\r\n")[:WINDOW_BYTES]
    return read_fields({b"[": b"[]", b'"': b'""'}.get(start[:1], start), go_type)


READ = (
    *("model", "name", "stream", "insecure", "from", "source", "destination"),
    *("files", "adapters", "draft_files"),
)
"""What is read of bodies that are not inference."""


async def fields_of(body: bytes, go_type: str, turn: asyncio.Lock) -> Fields:
    """As `gojson.read_fields`, for a body of any size: of a large one those in `READ`.

    A large body is read while it has its `turn`, so that many together delay nobody for longer.

    Raises:
        HttpError: as `read_fields`; 413, it has too many values.
    """
    if is_small(body):
        with suppress(TooDeep):
            return read_fields(body, go_type)
    async with turn:
        found = await Scan(body).members()
        if found is None:
            return await no_object(body, go_type)
    spans = {name: found[name] for name in READ if name in found}
    return Fields(
        {
            name: first_value(span.of(body), "")
            for name, span in spans.items()
            if len(span) <= WINDOW_BYTES
        },
        go_type,
    )


async def edited(body: Body, changes: Mapping[str, bytes]) -> Body | None:
    """The object in `body` with these fields set to these JSON texts; `None`: it is no object.

    A field matches in any letter case, as in Ollama's decoder, and keeps the client's spelling.
    Every other byte stays. A bytearray is changed in place: it may be most of the memory.

    Raises:
        HttpError: 400, it is no JSON.
    """
    found = await Scan(body).members()
    if found is None:
        return None
    new = body if isinstance(body, bytearray) else bytearray(body)
    known = [(found[name], text) for name, text in changes.items() if name in found]
    for span, text in sorted(known, key=lambda change: change[0].start, reverse=True):
        new[span.start : span.end] = text
    absent = [
        b'"%b":%b' % (name.encode(), text) for name, text in changes.items() if name not in found
    ]
    if absent:
        start = new.index(b"{") + 1
        new[start:start] = b",".join(absent) + (b"," if found else b"")
    return new
