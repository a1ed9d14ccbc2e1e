"""What agents owe: deeds for those that are away, kept until they return, also over a restart."""

import msgspec

from ollama_coordinator.db import Store
from ollama_coordinator_common.types import AgentId

from .types import Deed, Kind, Pending

DOCUMENT = "pending-operations"

_pending = msgspec.json.Decoder(list[Pending])

MAKING = (Kind.PULL, Kind.CREATE, Kind.COPY)
"""Each puts a content of its own under the name, so that only the last of them counts."""

UNDONE_BY = {
    Kind.PULL: (*MAKING, Kind.DELETE),
    Kind.CREATE: (*MAKING, Kind.DELETE),
    Kind.COPY: (*MAKING, Kind.DELETE),
    Kind.DELETE: (*MAKING, Kind.DELETE, Kind.LOAD, Kind.UNLOAD),
    Kind.LOAD: (Kind.LOAD, Kind.UNLOAD),
    Kind.UNLOAD: (Kind.LOAD, Kind.UNLOAD),
    Kind.PUSH: (Kind.PUSH,),
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
            self.add(pending)

    def all(self) -> list[Pending]:
        """Everything that is owed."""
        return list(self._owed.values())

    def of(self, agent_id: AgentId) -> list[Pending]:
        """What one agent owes."""
        return [pending for pending in self._owed.values() if pending.agent_id == agent_id]

    def add(self, pending: Pending) -> None:
        """An agent is to do something when it is back; what it owes already keeps its place."""
        self.void(pending.agent_id, pending.deed)
        self._owed.setdefault(_key(pending.agent_id, pending.deed), pending)
        self._changed()

    def void(self, agent_id: AgentId, deed: Deed) -> None:
        """A deed that is newer than what is owed makes some of that senseless, but not itself."""
        for kind in UNDONE_BY[deed.kind]:
            known = self._owed.get((agent_id, kind, deed.key))
            if known is not None and known.deed != deed:
                self._drop(known)

    def settle(self, agent_id: AgentId, deed: Deed) -> None:
        """It was done, or cannot be done; a newer one of its kind is owed still."""
        known = self._owed.get(_key(agent_id, deed))
        if known is not None and known.deed == deed:
            self._drop(known)

    def forget(self, agent_id: AgentId) -> None:
        """The agent was removed."""
        for pending in self.of(agent_id):
            self._drop(pending)

    def _drop(self, pending: Pending) -> None:
        del self._owed[_key(pending.agent_id, pending.deed)]
        self._changed()

    def _changed(self) -> None:
        # An operation on a thousand agents changes it a thousand times at once.
        self._store.note_document(DOCUMENT, lambda: msgspec.json.encode(self.all()))


def _key(agent_id: AgentId, deed: Deed) -> tuple[AgentId, Kind, str]:
    return agent_id, deed.kind, deed.key
