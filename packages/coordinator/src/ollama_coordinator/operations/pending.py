"""What agents owe: deeds for those that are away, kept until they return, also over a restart."""

import msgspec

from ollama_coordinator.db import Store
from ollama_coordinator_common.types import AgentId

from .types import Deed, Kind, Pending

DOCUMENT = "pending-operations"

_pending = msgspec.json.Decoder(list[Pending])

UNDONE_BY = {
    Kind.PULL: (Kind.DELETE,),
    Kind.CREATE: (Kind.DELETE,),
    Kind.COPY: (Kind.DELETE,),
    Kind.DELETE: (Kind.PULL, Kind.CREATE, Kind.COPY, Kind.LOAD, Kind.UNLOAD),
    Kind.LOAD: (Kind.UNLOAD,),
    Kind.UNLOAD: (Kind.LOAD,),
}
"""Which older debts a newer deed on the same model makes void."""


class Debts:
    """Pending deeds, oldest first; at most one of a kind for an agent and a model."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._owed: dict[tuple[AgentId, Kind, str], Pending] = {}

    async def restore(self) -> None:
        """Read what was owed when the last process ended.

        Raises:
            DatabaseError: the database cannot be read.
        """
        body = await self._store.document(DOCUMENT)
        for pending in _pending.decode(body) if body else ():
            self._owed[_key(pending.agent_id, pending.deed)] = pending

    def all(self) -> list[Pending]:
        """Everything that is owed."""
        return list(self._owed.values())

    def of(self, agent_id: AgentId) -> list[Pending]:
        """What one agent owes."""
        return [pending for pending in self._owed.values() if pending.agent_id == agent_id]

    def add(self, pending: Pending) -> None:
        """An agent is to do something when it is back."""
        self.void(pending.agent_id, pending.deed)
        self._owed.setdefault(_key(pending.agent_id, pending.deed), pending)
        self._write()

    def void(self, agent_id: AgentId, deed: Deed) -> None:
        """A deed that is newer than what is owed makes some of that senseless."""
        kinds = UNDONE_BY.get(deed.kind, ())
        gone = [self._owed.pop((agent_id, kind, deed.key), None) for kind in kinds]
        if any(gone):
            self._write()

    def settle(self, agent_id: AgentId, deed: Deed) -> None:
        """It was done, or cannot be done."""
        if self._owed.pop(_key(agent_id, deed), None) is not None:
            self._write()

    def forget(self, agent_id: AgentId) -> None:
        """The agent was removed."""
        for pending in self.of(agent_id):
            self.settle(agent_id, pending.deed)

    def _write(self) -> None:
        self._store.note_document(DOCUMENT, msgspec.json.encode(self.all()))


def _key(agent_id: AgentId, deed: Deed) -> tuple[AgentId, Kind, str]:
    return agent_id, deed.kind, deed.key
