"""What a part of the coordinator knows, kept over restarts as a document in the database."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

import msgspec

from .db import Store

log = logging.getLogger(__name__)

KEEP_SECONDS = 10.0

T = TypeVar("T")


class Document(Generic[T]):
    """Writes what `give` returns behind, and hands it to `take` at the next start.

    `kind` is its type; another version's form is left alone until it is written anew.
    """

    def __init__(
        self,
        name: str,
        kind: type[T],
        store: Store,
        *,
        give: Callable[[], T],
        take: Callable[[T], None],
    ) -> None:
        self._name = name
        self._kind = kind
        self._store = store
        self._give = give
        self._take = take
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
            self.keep()

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
            await asyncio.sleep(KEEP_SECONDS)
            self.keep()

    def keep(self) -> None:
        """Write it behind, if it changed."""
        body = msgspec.json.encode(self._give())
        if body != self._kept:
            self._kept = body
            self._store.note_document(self._name, body)
