"""Agents in the database: written when they change, and restored into the registry."""

from collections.abc import Mapping
from contextlib import suppress

import msgspec
from msgspec import Struct

from ollama_coordinator_common.network import machine_of
from ollama_coordinator_common.types import AgentId

from .clock import Clock
from .db import DAMAGED, AgentRow, DatabaseError, Store
from .registry import AgentSettings, AgentState, Registry, place_of


class SavedDisk(Struct):
    """What an agent read on its disk; earlier versions kept the blobs alone, which are left."""

    blobs: Mapping[str, str] = {}
    contents: Mapping[str, str] = {}
    broken: Mapping[str, str] = {}


class AgentStore:
    """Translates between agents as the registry and as the database know them."""

    def __init__(self, registry: Registry, store: Store, clock: Clock) -> None:
        self._registry = registry
        self._store = store
        self._clock = clock

    async def restore(self) -> None:
        """Take over every agent in the database.

        Raises:
            DatabaseError: the database cannot be read, or what it has of an agent's settings.
        """
        now = self._clock.now()
        for row in await self._store.agents():
            registration = row.registration
            # The address of a machine with a link is of another network.
            address = registration.ip_address
            machine = "" if registration.link else machine_of(address)
            agent = AgentState(
                row.id,
                registration,
                registered_at=row.registered_at,
                heard_at=min(now, self._clock.monotonic(row.last_seen)),
                left=row.has_left,
                host=place_of(registration, machine),
                settings=self._settings_of(row),
            )
            if row.tags:
                # Damaged, or more models than are read: it is asked anew.
                with suppress(msgspec.DecodeError):
                    disk = msgspec.json.decode(row.blobs, type=SavedDisk)
                    agent.inventory.read_tags(row.tags, disk.blobs, disk.contents, disk.broken)
            self._registry.restore(agent, now)

    def _settings_of(self, row: AgentRow) -> AgentSettings:
        """What the operator has set: a machine that is to drain must not serve for want of that."""
        try:
            return msgspec.json.decode(row.settings, type=AgentSettings)
        except msgspec.DecodeError as exc:
            text = f"settings of agent {row.registration.machine_name}: {exc} ({DAMAGED})"
            raise DatabaseError(self._store.name, text) from exc

    def keep(self, agent: AgentState) -> None:
        """Write an agent behind, unless it was removed meanwhile: it would come back."""
        if self._registry.find(agent.id) is agent:
            self._store.note_agent(self._row(agent))

    def keep_seen(self, agent: AgentState) -> None:
        """Write behind when an agent was last heard."""
        self._store.note_seen(agent.id, self._clock.utc(agent.heard_at))

    async def keep_now(self, agent: AgentState) -> None:
        """Write an agent before going on; where the database fails, behind."""
        await self._store.save_agent(self._row(agent))

    async def forget(self, agent_id: AgentId) -> None:
        """Delete an agent before going on; where the database fails, behind."""
        await self._store.remove_agent(agent_id)

    def _row(self, agent: AgentState) -> AgentRow:
        known = agent.inventory
        return AgentRow(
            id=agent.id,
            registration=agent.registration,
            registered_at=agent.registered_at,
            last_seen=self._clock.utc(agent.heard_at),
            has_left=agent.left,
            settings=msgspec.json.encode(agent.settings),
            tags=agent.inventory.tags,
            blobs=msgspec.json.encode(SavedDisk(known.blobs, known.contents, known.broken)),
        )
