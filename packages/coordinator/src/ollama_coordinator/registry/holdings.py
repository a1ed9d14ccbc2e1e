"""Which agents have which model on disk, and which content of a name is the preferred one.

What follows from it is remembered by name, and forgotten by name: an agent that comes, goes or
changes concerns the names that it has, and no others.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Set
from itertools import count

from ollama_coordinator_common.types import AgentId

from .agent import AgentState
from .identity import preferred
from .inventory import AvailableRow


class Holdings:
    """The agents by routing key; `agents` and `online` are the registry's own."""

    def __init__(self, agents: Mapping[AgentId, AgentState], online: Set[AgentId]) -> None:
        self._agents = agents
        self._online = online
        self._by_key: defaultdict[str, set[AgentId]] = defaultdict(set)
        self._preferred: dict[str, list[AgentId]] = {}
        self._revisions: dict[str, int] = {}
        self._numbers = count(1)

    # ── what happens ──────────────────────────────────────────────────────────────────────────

    def relist(self, agent: AgentState, before: Mapping[str, AvailableRow]) -> None:
        """An agent's models were listed anew."""
        now = agent.inventory.available
        changed = [key for key in now if before.get(key) != now[key]]
        gone = before.keys() - now.keys()
        for key in changed:
            self._by_key[key].add(agent.id)
        for key in gone:
            self._by_key[key].discard(agent.id)
        # Whether one name is in memory is told of all names of its weights, by either list.
        rows = [of.get(key) for key in (*changed, *gone) for of in (before, now)]
        blobs = {row.blob for row in rows if row is not None and row.blob}
        alike = [key for key, row in now.items() if row.blob in blobs]
        self.touch({*changed, *gone, *alike})

    def drop(self, agent: AgentState, keys: Iterable[str]) -> None:
        """An agent has these no longer."""
        dropped = list(keys)
        for key in dropped:
            self._by_key[key].discard(agent.id)
        self.touch(dropped)

    def touch(self, keys: Iterable[str]) -> None:
        """Something is to be told otherwise of these."""
        for key in keys:
            self._preferred.pop(key, None)
            if self._by_key.get(key):
                self._revisions[key] = next(self._numbers)
            else:
                self._by_key.pop(key, None)
                self._revisions.pop(key, None)

    # ── what there is ─────────────────────────────────────────────────────────────────────────

    def models(self) -> list[str]:
        """The routing keys that anybody has."""
        return sorted(self._by_key)

    def revision(self, key: str) -> int:
        """Another number whenever anything changed that is told of a model; 0: nobody has it."""
        return self._revisions.get(key, 0)

    def holders(self, key: str) -> list[AgentId]:
        """The agents that have the preferred content, in order."""
        ids = self._preferred.get(key)
        if ids is None:
            if key not in self._by_key:
                return []  # not remembered: clients ask for any name
            ids = self._preferred[key] = sorted(preferred(self.copies(key), self._online))
        return ids

    def copies(self, key: str) -> dict[AgentId, AvailableRow]:
        """What every agent has under this name; in order of id."""
        return {
            agent_id: self._agents[agent_id].inventory.available[key]
            for agent_id in sorted(self._by_key.get(key, ()))
        }

    def strangers(self, key: str) -> frozenset[AgentId]:
        """The agents that have another content under this name than the preferred one."""
        everybody = self._by_key.get(key, ())
        if len(everybody) < 2:
            return frozenset()
        return frozenset(everybody).difference(self.holders(key))
