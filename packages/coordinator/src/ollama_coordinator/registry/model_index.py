"""Which agents have which model on disk, and which content of a name is the preferred one.

What follows from it is remembered by name, and forgotten by name: an agent that comes, goes or
changes concerns the names that it has, and no others.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from datetime import UTC, datetime
from itertools import count

from ollama_coordinator_common.types import AgentId, AvailableModel

from .agent import AgentState
from .inventory import AvailableRow


class ModelIndex:
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


LONG_AGO = datetime.fromtimestamp(0, UTC)

Copies = Mapping[AgentId, AvailableRow]


def modified_at(row: AvailableRow) -> datetime:
    """When a model was last changed on its agent; long ago where Ollama did not say."""
    at = row.model.modified_at
    return LONG_AGO if at is None else at if at.tzinfo else at.replace(tzinfo=UTC)


def contents(copies: Copies) -> list[dict[AgentId, AvailableRow]]:
    """The copies of one name, those of the same content together."""
    if _is_one(copies.values()):
        return [dict(copies)]
    groups: list[tuple[set[str], dict[AgentId, AvailableRow]]] = []
    for agent_id, row in copies.items():
        # Rows without any digest are taken for the same: nothing says that they differ.
        digests = {digest for digest in (row.blob, row.model.digest) if digest} or {""}
        members = {agent_id: row}
        apart = []
        for known, others in groups:
            if known.isdisjoint(digests):
                apart.append((known, others))
            else:
                digests |= known
                members = others | members
        groups = [*apart, (digests, members)]
    return [members for _, members in groups]


def _is_one(rows: Iterable[AvailableRow]) -> bool:
    """Whether one digest is that of every row: what nearly every model is, on any many agents."""
    digests = {row.model.digest for row in rows}
    blobs = {row.blob for row in rows}
    return (len(digests) == 1 and "" not in digests) or (len(blobs) == 1 and "" not in blobs)


def preferred(copies: Copies, living: Iterable[AgentId]) -> dict[AgentId, AvailableRow]:
    """The copies of the content to serve: what most living agents have, then most, then newest."""
    groups = contents(copies)
    if len(groups) < 2:
        return groups[0] if groups else {}
    alive = set(living)
    return max(
        groups,
        key=lambda group: (
            len(alive & group.keys()),
            len(group),
            max(modified_at(row) for row in group.values()),
            min(row.identity for row in group.values()),
        ),
    )


def newest(rows: Sequence[AvailableRow]) -> AvailableRow:
    """The row that stands for several of the same content."""
    return max(rows, key=modified_at)


MOST = 100
CLOUD = "https://ollama.com:443"


class CloudModels:
    """Which agents were offered for which name; what an agent is offered for is in its inventory.

    It never holds more than `MOST` names: clients ask for any.
    """

    def __init__(self) -> None:
        self._offered: OrderedDict[str, frozenset[AgentId]] = OrderedDict()

    def make(
        self, key: str, name: str, ids: Iterable[AgentId], agents: Iterable[AgentState]
    ) -> bool:
        """Offer these of all agents for a name, and no others; whether anything changed."""
        wanted = frozenset(ids)
        known = self._offered.get(key)
        if wanted or known is not None:
            self._offered[key] = wanted
            self._offered.move_to_end(key)
        if (known or frozenset()) == wanted:
            return False
        row = AvailableRow(key, AvailableModel(name, remote_host=CLOUD), b"")
        oldest = next(iter(self._offered)) if len(self._offered) > MOST else None
        for agent in agents:
            offered = agent.inventory.offered
            if agent.id in wanted:
                offered[key] = row
            else:
                offered.pop(key, None)
            if oldest is not None:
                offered.pop(oldest, None)
        if oldest is not None:
            del self._offered[oldest]
        return True

    def withdraw(self, key: str, agent: AgentState) -> None:
        """An agent could not pass the name on after all."""
        agent.inventory.offered.pop(key, None)
        # A removed agent may answer later than its offer was forgotten.
        if key in self._offered:
            self._offered[key] -= {agent.id}

    def of(self, key: str) -> frozenset[AgentId]:
        """The agents that were offered for a name, some of them perhaps removed since."""
        return self._offered.get(key, frozenset())
