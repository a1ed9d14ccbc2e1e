"""The state of a part of the coordinator, kept over restarts as a document in the database."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar

import msgspec
from msgspec import Struct

from .db import Store

log = logging.getLogger(__name__)

KEEP_SECONDS = 10.0
BYTES_PER_SECOND = 200_000
"""The most that a document may write on average: a long one is written more seldom."""

ROWS_AT_ONCE = 1000
"""So many take about half a millisecond to encode."""

T = TypeVar("T", bound=Struct)


class SavedState(Generic[T]):
    """Writes the value of `give` behind, and hands it to `take` at the next start.

    `give` is called after every `every` seconds, more seldom for a long document, and at the end.
    The lists in its value must not change afterwards; their rows may, and each is written as it is
    when its turn comes. `kind` is the type of the value; a document of another form, from another
    version, is left alone until it is written anew.
    """

    def __init__(
        self,
        name: str,
        kind: type[T],
        store: Store,
        *,
        give: Callable[[], T],
        take: Callable[[T], None],
        every: float = KEEP_SECONDS,
    ) -> None:
        self._name = name
        self._kind = kind
        self._store = store
        self._give = give
        self._take = take
        self._every = every
        self._kept = b""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep it up to date as long as the block runs.

        Raises:
            DatabaseError: the database cannot be read.
        """
        await self._restore()
        keeping = asyncio.create_task(self._keep_for_ever())
        try:
            yield
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
            # Without slices: no request is served any more, and nothing may come between.
            self._note(msgspec.json.encode(self._give()))

    async def _restore(self) -> None:
        body = await self._store.document(self._name)
        if body is None:
            return
        try:
            self._take(msgspec.json.decode(body, type=self._kind))
        except msgspec.DecodeError as exc:
            extra = {"document": self._name, "reason": str(exc)}
            log.warning("what was kept cannot be read; it is made anew", extra=extra)

    async def _keep_for_ever(self) -> None:
        while True:
            await asyncio.sleep(pause(self._every, len(self._kept)))
            self._note(await encoded(self._give()))

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
