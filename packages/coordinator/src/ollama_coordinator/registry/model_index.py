"""Which agents have which model, and which content of a name is the preferred one.

One name may have different contents on different agents. Two rows have the same content if they
share the digest of their weights or that of their manifest. Older Ollamas write the manifest anew,
so that one content has several manifest digests; and some agents do not report the weights.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from datetime import UTC, datetime
from itertools import count

from ollama_coordinator_common.types import AgentId, AvailableModel

from .agent import AgentState
from .inventory import AvailableRow


class ModelIndex:
    """The agents by routing key; `agents` and `online` are the registry's own collections.

    Derived facts are cached by name. An agent that comes, goes or changes drops those of its names.
    """

    def __init__(self, agents: Mapping[AgentId, AgentState], online: Set[AgentId]) -> None:
        self._agents = agents
        self._online = online
        self._by_key: defaultdict[str, set[AgentId]] = defaultdict(set)
        self._preferred: dict[str, list[AgentId]] = {}
        self._revisions: dict[str, int] = {}
        self._numbers = count(1)

    # ── changes ───────────────────────────────────────────────────────────────────────────────

    def relist(self, agent: AgentState, before: Mapping[str, AvailableRow]) -> None:
        """An agent listed its models; `before` is the list until now."""
        now = agent.inventory.available
        changed = [key for key in now if before.get(key) != now[key]]
        gone = before.keys() - now.keys()
        for key in changed:
            self._by_key[key].add(agent.id)
        for key in gone:
            self._by_key[key].discard(agent.id)
        # All names of the same weights are in memory together: they change with each other.
        rows = [of.get(key) for key in (*changed, *gone) for of in (before, now)]
        blobs = {row.blob for row in rows if row is not None and row.blob}
        alike = [key for key, row in now.items() if row.blob in blobs]
        self.touch({*changed, *gone, *alike})

    def drop(self, agent: AgentState, keys: Iterable[str]) -> None:
        """An agent has these models no longer."""
        dropped = list(keys)
        for key in dropped:
            self._by_key[key].discard(agent.id)
        self.touch(dropped)

    def touch(self, keys: Iterable[str]) -> None:
        """Forget what was derived of these models, and give them a new revision."""
        for key in keys:
            self._preferred.pop(key, None)
            if self._by_key.get(key):
                self._revisions[key] = next(self._numbers)
            else:
                self._by_key.pop(key, None)
                self._revisions.pop(key, None)

    # ── questions ─────────────────────────────────────────────────────────────────────────────

    def __iter__(self) -> Iterator[str]:
        """The routing keys that any agent has, sorted."""
        return iter(sorted(self._by_key))

    def revision(self, key: str) -> int:
        """A number that differs after every change of a model; 0: no agent has it."""
        return self._revisions.get(key, 0)

    def holders(self, key: str) -> list[AgentId]:
        """The agents that have the preferred content, in order of id."""
        ids = self._preferred.get(key)
        if ids is None:
            if key not in self._by_key:
                return []  # not remembered: clients ask for any name
            ids = self._preferred[key] = sorted(preferred(self.copies(key), self._online))
        return ids

    def copies(self, key: str) -> dict[AgentId, AvailableRow]:
        """Each agent's row under this routing key, in order of id."""
        return {
            agent_id: self._agents[agent_id].inventory.available[key]
            for agent_id in sorted(self._by_key.get(key, ()))
        }

    def strangers(self, key: str) -> frozenset[AgentId]:
        """The agents whose content under this routing key is not the preferred one."""
        everybody = self._by_key.get(key, ())
        if len(everybody) < 2:
            return frozenset()
        return frozenset(everybody).difference(self.holders(key))


LONG_AGO = datetime.fromtimestamp(0, UTC)

Copies = Mapping[AgentId, AvailableRow]


def modified_at(row: AvailableRow) -> datetime:
    """When a model was last changed on its agent; 1970 if Ollama did not report it."""
    at = row.model.modified_at
    return LONG_AGO if at is None else at if at.tzinfo else at.replace(tzinfo=UTC)


def contents(copies: Copies) -> list[dict[AgentId, AvailableRow]]:
    """The copies of one name, grouped by content."""
    if _is_one(copies.values()):
        return [dict(copies)]
    groups: list[tuple[set[str], dict[AgentId, AvailableRow]]] = []
    for agent_id, row in copies.items():
        # Rows without any digest are assumed to be the same: nothing says that they differ.
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
    """Whether all rows share one digest, as they nearly always do: quick for many agents."""
    digests = {row.model.digest for row in rows}
    blobs = {row.blob for row in rows}
    return (len(digests) == 1 and "" not in digests) or (len(blobs) == 1 and "" not in blobs)


def preferred(copies: Copies, online: Iterable[AgentId]) -> dict[AgentId, AvailableRow]:
    """The copies of the content to serve: on most online agents, then on most, then the newest."""
    groups = contents(copies)
    if len(groups) < 2:
        return groups[0] if groups else {}
    online_ids = set(online)
    return max(
        groups,
        key=lambda group: (
            len(online_ids & group.keys()),
            len(group),
            max(modified_at(row) for row in group.values()),
            min(row.identity for row in group.values()),
        ),
    )


def newest(rows: Sequence[AvailableRow]) -> AvailableRow:
    """The row that represents several of the same content."""
    return max(rows, key=modified_at)


MOST_CLOUD_NAMES = 100
"""Names remembered: clients ask for any, and ollama.com has some dozen models."""

CLOUD = "https://ollama.com:443"
"""The `remote_host` that Ollama reports for cloud models."""


class CloudModels:
    """Cloud models that no agent has pulled, and which agents can pass on a request for each.

    An Ollama that is signed in needs no stub of a cloud model: the name is enough. An agent's own
    names are also in its inventory (`offered`).
    """

    def __init__(self) -> None:
        self._offered: OrderedDict[str, frozenset[AgentId]] = OrderedDict()

    def make(
        self, key: str, name: str, ids: Iterable[AgentId], agents: Iterable[AgentState]
    ) -> bool:
        """Let exactly these of all agents pass a name on; whether anything changed."""
        wanted = frozenset(ids)
        known = self._offered.get(key)
        if wanted or known is not None:
            self._offered[key] = wanted
            self._offered.move_to_end(key)
        if (known or frozenset()) == wanted:
            return False
        row = AvailableRow(key, AvailableModel(name, remote_host=CLOUD), b"")
        oldest = next(iter(self._offered)) if len(self._offered) > MOST_CLOUD_NAMES else None
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
        """An agent could not pass the name on."""
        agent.inventory.offered.pop(key, None)
        # A removed agent may answer after its name was forgotten.
        if key in self._offered:
            self._offered[key] -= {agent.id}

    def of(self, key: str) -> frozenset[AgentId]:
        """The agents that can pass a name on; some may have been removed since."""
        return self._offered.get(key, frozenset())
