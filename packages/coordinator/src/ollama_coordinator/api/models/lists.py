"""What a list tells of each model, made once for each change of it.

A fleet of a thousand machines has a hundred thousand models on its disks. What is told of a name is
kept until the registry's revision of the name is another; what has to be made anew is made in
slices, between which streams go on.
"""

import asyncio
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from ollama_coordinator.aio import Slices
from ollama_coordinator.registry import Registry

Row = TypeVar("Row")


class KeptList(Generic[Row]):
    """One list of the fleet's models.

    `make` tells of one model by its routing key, `None` when the last agent lost it a moment ago;
    `write` makes bodies of all of them, in order of their keys.
    """

    def __init__(
        self,
        registry: Registry,
        make: Callable[[Registry, str], Row | None],
        write: Callable[[Iterable[Row]], tuple[bytes, ...]],
    ) -> None:
        self._registry = registry
        self._make = make
        self._write = write
        self._rows: dict[str, tuple[int, Row]] = {}
        self._bodies: tuple[bytes, ...] = ()
        self._changes = -1
        self._making = asyncio.Lock()

    async def bodies(self) -> tuple[bytes, ...]:
        """The list as it is answered, in each of its forms."""
        async with self._making:
            changes = self._registry.changes
            if changes != self._changes:
                await self._remake()
                # What changed meanwhile is left for the next who asks.
                self._changes = changes
        return self._bodies

    async def _remake(self) -> None:
        slices = Slices()
        rows: dict[str, tuple[int, Row]] = {}
        for key in self._registry.models():
            known = self._rows.get(key)
            if known is None or known[0] != self._registry.revision(key):
                await slices.pause()
                revision = self._registry.revision(key)
                row = self._make(self._registry, key)
                known = None if row is None else (revision, row)
            if known is not None:
                rows[key] = known
        changed = rows != self._rows or not self._bodies
        self._rows = rows
        if changed:
            self._bodies = self._write(row for _, row in rows.values())
