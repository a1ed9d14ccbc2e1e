"""Which agents have which model, and which content of a name is the preferred one.

One name may have different contents on different agents: other weights, or the same ones with
another template, system prompt or parameters. Two rows have the same content if they share the
digest of their manifest or that of its layers. Older Ollamas write the manifest anew, and a created
model's has a path of its machine in it, so that one content has several manifest digests. Where no
agent reads the layers, `/api/show` says what they are: the monitor asks it, once per manifest.
"""

import re
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from datetime import UTC, datetime
from hashlib import sha256
from itertools import count, islice

from msgspec import Raw, Struct, json

from ollama_coordinator_common.network import LOOPBACK
from ollama_coordinator_common.types import AgentId, AvailableModel

from .agent import AgentState
from .inventory import EMPTY, AvailableRow

NO_HOSTS: Mapping[AgentId, str] = {}


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
        self._unsure: dict[str, None] = {}
        self._shown: dict[str, str] = {}

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
        self.doubt(changed)

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

    # ── contents that only `/api/show` tells apart ────────────────────────────────────────────

    def doubt(self, keys: Iterable[str]) -> None:
        """Compare what the agents have under these names, once `to_show` is called."""
        self._unsure.update(dict.fromkeys(key for key in keys if len(self._by_key[key]) > 1))

    def to_show(self, is_reachable: Callable[[AgentState], bool]) -> list[tuple[AgentState, str]]:
        """Agents to ask for what they have under a name, and the name's routing key."""
        wanted = []
        for key in list(islice(self._unsure, COMPARED_AT_ONCE)):
            del self._unsure[key]
            copies = self.copies(key)
            if len(contents(copies)) < 2:
                continue
            self.touch([key])
            groups = contents(copies, self._shown)
            if len(groups) < 2 or all(_layers_known(group) for group in groups):
                continue
            for group in groups:
                agents = [self._agents[agent_id] for agent_id in group]
                if not any(row.model.digest in self._shown for row in group.values()):
                    asked = [(agent, key) for agent in agents if is_reachable(agent)]
                    wanted += asked[:1]
        return wanted

    def show(self, key: str, digest: str, content: str) -> None:
        """What `/api/show` says of the manifest with this digest, as `shown_content` reads it."""
        self._shown[digest] = content
        if len(self._shown) > MOST_SHOWN:
            del self._shown[next(iter(self._shown))]
        self.touch([key])

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
            # Nobody else registers this machine's loopback.
            agents = [self._agents[agent_id] for agent_id in self._by_key[key]]
            hosts = {one.id: one.host for one in agents if one.host != LOOPBACK}
            found = preferred(self.copies(key), self._online, self._shown, hosts)
            ids = self._preferred[key] = sorted(found)
        return ids

    def contents(self, key: str) -> list[dict[AgentId, AvailableRow]]:
        """The copies of a name, grouped by content."""
        return contents(self.copies(key), self._shown)

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


COMPARED_AT_ONCE = 20
"""Names compared at a time: where a thousand agents have each, that takes some milliseconds."""

MOST_SHOWN = 10_000
"""Manifests remembered, some hundred bytes each: more than a fleet has of models in doubt."""

LONG_AGO = datetime.fromtimestamp(0, UTC)

Copies = Mapping[AgentId, AvailableRow]


def modified_at(row: AvailableRow) -> datetime:
    """When a model was last changed on its agent; 1970 if Ollama did not report it."""
    at = row.model.modified_at
    return LONG_AGO if at is None else at if at.tzinfo else at.replace(tzinfo=UTC)


def contents(copies: Copies, shown: Mapping[str, str] = EMPTY) -> list[dict[AgentId, AvailableRow]]:
    """The copies of one name, grouped by content; `shown` are contents by manifest digest."""
    if _is_one(copies.values()):
        return [dict(copies)]
    groups: list[tuple[set[str], dict[AgentId, AvailableRow]]] = []
    for agent_id, row in copies.items():
        # Rows without any digest are assumed to be the same: nothing says that they differ.
        known = (row.content, row.model.digest, shown.get(row.model.digest))
        digests = {digest for digest in known if digest} or {""}
        members = {agent_id: row}
        apart = []
        for theirs, others in groups:
            if theirs.isdisjoint(digests):
                apart.append((theirs, others))
            else:
                digests |= theirs
                members = others | members
        groups = [*apart, (digests, members)]
    return [members for _, members in groups]


def _is_one(rows: Iterable[AvailableRow]) -> bool:
    """Whether all rows share one digest, as they nearly always do: quick for many agents."""
    digests = {row.model.digest for row in rows}
    layers = {row.content for row in rows}
    return (len(digests) == 1 and "" not in digests) or (len(layers) == 1 and "" not in layers)


def _layers_known(group: Copies) -> bool:
    return any(row.content for row in group.values())


def preferred(
    copies: Copies,
    online: Iterable[AgentId],
    shown: Mapping[str, str] = EMPTY,
    hosts: Mapping[AgentId, str] = NO_HOSTS,
) -> dict[AgentId, AvailableRow]:
    """The copies of the content to serve: on most online machines, then on most, then the newest.

    `hosts`: the agents' machines. Several agents of one count once: a machine registers as often
    as it likes.
    """
    groups = contents(copies, shown)
    if len(groups) < 2:
        return groups[0] if groups else {}
    online_ids = set(online)
    return max(
        groups,
        key=lambda group: (
            len({hosts.get(agent, agent) for agent in online_ids & group.keys()}),
            len({hosts.get(agent, agent) for agent in group}),
            max(modified_at(row) for row in group.values()),
            min(row.identity for row in group.values()),
        ),
    )


def newest(rows: Sequence[AvailableRow]) -> AvailableRow:
    """The row that represents several of the same content."""
    return max(rows, key=modified_at)


class _Shown(Struct):
    """The part of `/api/show` that layers are made of."""

    modelfile: str = ""
    template: str = ""
    system: str = ""
    parameters: str = ""
    messages: Raw = Raw(b"")
    license: Raw = Raw(b"")
    capabilities: list[str] = []
    remote_host: str = ""
    remote_model: str = ""


_shown = json.Decoder(_Shown)
_FILES = re.compile(r"^(FROM|ADAPTER) .*\bsha256[-:]([0-9a-f]{64})\s*$", re.MULTILINE)


def shown_content(body: bytes) -> str:
    """One text for all that `/api/show` says of a model's layers; empty where it says too little.

    The file of the weights is in the modelfile's `FROM` line, in a folder of the agent's. Ollama
    lists the parameters in random order.

    Raises:
        msgspec.DecodeError: it is no answer of Ollama's.
    """
    shown = _shown.decode(body)
    files = _FILES.findall(shown.modelfile)
    if not (files or shown.remote_model):
        return ""
    parameters = sorted(" ".join(line.split()) for line in shown.parameters.splitlines())
    said = (shown.template, shown.system, bytes(shown.messages), bytes(shown.license))
    remote = (shown.remote_host, shown.remote_model)
    return sha256(repr((files, said, parameters, remote)).encode()).hexdigest()


def shown_capabilities(body: bytes) -> list[str]:
    """What `/api/show` says that a model can do; empty where it does not say.

    Raises:
        msgspec.DecodeError: it is no answer of Ollama's.
    """
    return _shown.decode(body).capabilities


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
