"""Commands for agents that are away: kept until the agent is back, also over a restart."""

import msgspec

from ollama_coordinator.db import Store
from ollama_coordinator_common.types import AgentId

from .types import AgentCommand, DeferredCommand, OperationKind

DOCUMENT = "pending-operations"
"""The name under which the database keeps them."""

_MAKING = (OperationKind.PULL, OperationKind.CREATE, OperationKind.COPY)
"""Each gives the name another content, so that only the last of them counts."""

_CONTENT = (*_MAKING, OperationKind.DELETE)
_MEMORY = (OperationKind.LOAD, OperationKind.UNLOAD)

SUPERSEDED_BY = {
    **dict.fromkeys(_MAKING, _CONTENT),
    OperationKind.DELETE: (*_CONTENT, *_MEMORY),
    **dict.fromkeys(_MEMORY, _MEMORY),
    OperationKind.PUSH: (OperationKind.PUSH,),
}
"""The kinds of older commands that a newer command for the same model makes void."""

_REPEATED = (OperationKind.CREATE, OperationKind.COPY)
"""Two that differ give one name two contents; two pulls get the same from the registry."""


def is_void(older: AgentCommand, newer: AgentCommand, *, same_agent: bool) -> bool:
    """Whether a newer command makes an older one void that is under way or deferred.

    On other agents than its own, it is void only what would give the name another content, or be
    without its model: what an agent should delete, it should delete all the same.
    """
    if older.key != newer.key or older.is_like(newer):
        return False
    if older.kind is newer.kind and older.kind not in _REPEATED:
        return False
    if same_agent or newer.kind is OperationKind.DELETE:
        return older.kind in SUPERSEDED_BY[newer.kind]
    return older.kind in _MAKING and newer.kind in _MAKING


_Key = tuple[AgentId, OperationKind, str]


class Deferred:
    """Deferred commands, oldest first; at most one of a kind for an agent and a model."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._commands: dict[_Key, DeferredCommand] = {}

    async def restore(self) -> None:
        """Read those of the process before.

        Raises:
            DatabaseError: the database, or what it has of them, cannot be read.
        """
        for deferred in await self._store.read(DOCUMENT, list[DeferredCommand]) or ():
            self.add(deferred)

    def all(self) -> list[DeferredCommand]:
        """Those of every agent."""
        return list(self._commands.values())

    def of(self, agent_id: AgentId) -> list[DeferredCommand]:
        """Those of one agent."""
        return [deferred for deferred in self._commands.values() if deferred.agent_id == agent_id]

    def add(self, deferred: DeferredCommand) -> None:
        """Keep a command; one that is kept already keeps its place and its time."""
        self.supersede(deferred.agent_id, deferred.command)
        self._commands.setdefault(_key(deferred.agent_id, deferred.command), deferred)
        self._changed()

    def supersede(self, agent_id: AgentId, command: AgentCommand) -> None:
        """Drop the older commands that this newer one makes void, but not the same command."""
        for kind in SUPERSEDED_BY[command.kind]:
            known = self._commands.get((agent_id, kind, command.key))
            if known is not None and known.command != command:
                self._drop(known)

    def void(self, newer: AgentCommand) -> None:
        """Drop what other agents should do and this newer command makes void."""
        for deferred in self.all():
            if is_void(deferred.command, newer, same_agent=False):
                self._drop(deferred)

    def makes(self, key: str, agent_id: AgentId | None = None) -> bool:
        """Whether any agent, or this one, will make a model of this routing key."""
        return any(
            known == key and kind in _MAKING and agent_id in (None, who)
            for who, kind, known in self._commands
        )

    def finish(self, agent_id: AgentId, command: AgentCommand) -> None:
        """Drop a command that is done or cannot be done; a newer one of its kind stays."""
        known = self._commands.get(_key(agent_id, command))
        if known is not None and known.command == command:
            self._drop(known)

    def forget(self, agent_id: AgentId) -> None:
        """Drop the commands of an agent that was removed."""
        for deferred in self.of(agent_id):
            self._drop(deferred)

    def _drop(self, deferred: DeferredCommand) -> None:
        del self._commands[_key(deferred.agent_id, deferred.command)]
        self._changed()

    def _changed(self) -> None:
        # Encoded when it is written: an operation on a thousand agents changes it as often at once.
        self._store.note_document(DOCUMENT, lambda: msgspec.json.encode(self.all()))


def _key(agent_id: AgentId, command: AgentCommand) -> _Key:
    return agent_id, command.kind, command.key
