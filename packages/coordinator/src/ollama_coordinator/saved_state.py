"""The state of a part of the coordinator, kept over restarts as a document in the database."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Generic, Protocol, TypeVar

import msgspec
from msgspec import Struct

from .aio import beside
from .db import Store

log = logging.getLogger(__name__)

KEEP_SECONDS = 10.0
"""What a crash may cost: the state of so many seconds."""

BYTES_PER_SECOND = 200_000
"""The most that a document may write on average: a long one is written more seldom."""

ROWS_AT_ONCE = 1000
"""So many take about half a millisecond to encode."""

T = TypeVar("T", bound=Struct)


class Stateful(Protocol[T]):
    """A part with a state worth keeping."""

    def export_state(self) -> T:
        """The state. Its lists must not change afterwards; their rows may."""

    def import_state(self, state: T, /) -> None:
        """Take over the state of an earlier process, before the first request."""


class SavedState(Generic[T]):
    """Writes the state of `part` behind, and hands it back at the next start.

    It is written after every `every` seconds, more seldom where it is long, and at the end. Each
    row of its lists is written as it is when its turn comes. `kind` is the type of the state; a
    document of another form, from another version, is left alone until it is written anew.
    """

    def __init__(
        self,
        name: str,
        kind: type[T],
        store: Store,
        part: Stateful[T],
        *,
        every: float = KEEP_SECONDS,
    ) -> None:
        self._name = name
        self._kind = kind
        self._store = store
        self._part = part
        self._every = every
        self._kept = b""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep it up to date as long as the block runs.

        Raises:
            DatabaseError: the database cannot be read.
        """
        await self._restore()
        try:
            async with beside(self._keep_for_ever()):
                yield
        finally:
            # Without slices: no request is served any more, and nothing may come between.
            self._note(msgspec.json.encode(self._part.export_state()))

    async def _restore(self) -> None:
        body = await self._store.document(self._name)
        if body is None:
            return
        try:
            self._part.import_state(msgspec.json.decode(body, type=self._kind))
        except msgspec.DecodeError as exc:
            extra = {"document": self._name, "reason": str(exc)}
            log.warning("what was kept cannot be read; it is made anew", extra=extra)

    async def _keep_for_ever(self) -> None:
        while True:
            await asyncio.sleep(pause(self._every, len(self._kept)))
            self._note(await encoded(self._part.export_state()))

    def _note(self, body: bytes) -> None:
        if body != self._kept:
            self._kept = body
            self._store.note_document(self._name, body)


def pause(every: float, size: int) -> float:
    """The seconds until a document of which so many bytes were written last is written again."""
    return max(every, size / BYTES_PER_SECOND)


async def encoded(document: Struct) -> bytes:
    """As JSON; others have their turn after every `ROWS_AT_ONCE` rows of its lists.

    A thread would not let them: the encoder never releases the interpreter.
    """
    # Joined once at the end: each copy of tens of megabytes takes as long as many pieces.
    parts: list[bytes] = []
    for name in document.__struct_fields__:
        value = getattr(document, name)
        parts.append(b'%b"%b":' % (b"," if parts else b"{", name.encode()))
        if isinstance(value, list):
            parts += [piece async for piece in _pieces(value)]
        else:
            parts.append(msgspec.json.encode(value))
    return b"".join([*parts, b"}"])


async def _pieces(rows: list[Any]) -> AsyncIterator[bytes]:
    yield b"["
    for start in range(0, len(rows), ROWS_AT_ONCE):
        if start:
            yield b","
        yield msgspec.json.encode(rows[start : start + ROWS_AT_ONCE])[1:-1]
        await asyncio.sleep(0)
    yield b"]"
