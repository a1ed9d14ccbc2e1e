"""What the scheduler learned, kept over restarts."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from .db import Store
from .scheduler import Learned, SwitchingScheduler

log = logging.getLogger(__name__)

DOCUMENT = "learned"
KEEP_SECONDS = 10.0


class LearnedKeeper:
    """Writes what a scheduler learned behind, and gives it back at the next start."""

    def __init__(self, scheduler: SwitchingScheduler, store: Store) -> None:
        self._scheduler = scheduler
        self._store = store
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
        body = await self._store.document(DOCUMENT)
        if body is None:
            return
        try:
            self._scheduler.import_state(msgspec.json.decode(body, type=Learned))
        except msgspec.DecodeError as exc:
            # Another version's form: it is learned anew within minutes.
            log.warning("what was learned cannot be read", extra={"reason": str(exc)})

    async def _keep_for_ever(self) -> None:
        while True:
            await asyncio.sleep(KEEP_SECONDS)
            self.keep()

    def keep(self) -> None:
        """Write it behind, if it changed."""
        learned = msgspec.json.encode(self._scheduler.export_state())
        if learned != self._kept:
            self._kept = learned
            self._store.note_document(DOCUMENT, learned)
