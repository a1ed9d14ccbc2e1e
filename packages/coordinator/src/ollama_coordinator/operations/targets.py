"""Which agents an operation concerns."""

from collections.abc import Collection, Iterable, Sequence
from enum import Enum

from msgspec import Struct

from ollama_coordinator.agent_queries import AgentQueries
from ollama_coordinator.registry import AgentState, Registry
from ollama_coordinator.scheduler import ModelNotFound
from ollama_coordinator_common.error import OllamaCoordinatorError
from ollama_coordinator_common.names import model_key

from .types import NoAgentForModel

WHAT_IS_RIGHT = "give all, a number of agents, label:NAME, or agents:NAME,NAME"


class WrongPlacement(OllamaCoordinatorError):
    """A text that says in no way which agents are meant."""

    def __init__(self, text: str) -> None:
        super().__init__(f"placement {text!r} is not understood: {WHAT_IS_RIGHT}")


class Rule(Enum):
    """How a placement chooses."""

    ALL = "all"
    COUNT = "count"
    LABEL = "label"
    AGENTS = "agents"


class Placement(Struct, frozen=True):
    """One rule and what it needs."""

    rule: Rule = Rule.ALL
    count: int = 0
    names: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Placement":
        """Read `all`, `2`, `label:gpu` or `agents:first,second`.

        Raises:
            WrongPlacement: it is none of these.
        """
        word = text.strip()
        kind, _, rest = word.partition(":")
        names = tuple(name.strip() for name in rest.split(",") if name.strip())
        if word.lower() in ("all", ""):
            return cls()
        if word.isascii() and word.isdecimal() and 0 < len(word) < 7 and int(word):
            return cls(Rule.COUNT, count=int(word))
        if kind.lower() in ("label", "agents") and names:
            return cls(Rule(kind.lower()), names=names)
        raise WrongPlacement(text)

    @property
    def text(self) -> str:
        """The same as it was written."""
        if self.rule is Rule.ALL:
            return "all"
        return str(self.count) if self.rule is Rule.COUNT else self._named

    @property
    def _named(self) -> str:
        return f"{self.rule.value}:{','.join(self.names)}"

    def concerns(self, agent: AgentState) -> bool:
        """Whether the rule means this agent at all."""
        if self.rule is Rule.LABEL:
            return not set(self.names).isdisjoint(agent.settings.labels)
        if self.rule is Rule.AGENTS:
            return not set(self.names).isdisjoint((agent.id, agent.name))
        return True


class Chosen(Struct, frozen=True):
    """The agents chosen, and those that stand by should one of them fail."""

    chosen: Sequence[AgentState]
    spare: Sequence[AgentState] = ()


def choose(
    placement: Placement,
    agents: Iterable[AgentState],
    holders: Collection[AgentState],
    reachable: Collection[AgentState],
) -> Chosen:
    """Choose among the agents; `holders` have some content of the model already.

    Those that have the model are always among the chosen of `all` and of a number, also beyond
    it: a pull that left one of them behind would leave two contents under one name. A number is
    filled up with reachable agents, those with the most free disk first; for the other rules also
    the agents that are away count, and get the model when they return.
    """
    meant = [agent for agent in agents if placement.concerns(agent)]
    if placement.rule is not Rule.COUNT:
        return Chosen([agent for agent in meant if not agent.settings.draining or agent in holders])
    having = [agent for agent in meant if agent in holders]
    others = sorted(
        (a for a in meant if a in reachable and a not in holders and not a.settings.draining),
        key=_room,
    )
    missing = max(0, placement.count - sum(agent in reachable for agent in having))
    return Chosen([*having, *others[:missing]], others[missing:])


def _room(agent: AgentState) -> tuple[float, int, str]:
    """Most free disk first; an agent that does not report it counts as having some."""
    free = agent.report.disk_free_bytes if agent.report is not None else None
    return -(free if free is not None else 1), len(agent.inventory.available), agent.id


PUSH_LABEL = "push"
"""Marks the agents whose key may push; where none has it, any holder is asked."""


class TargetChooser:
    """Applies placements to the fleet as it is now; `default` is the operator's setting."""

    def __init__(self, registry: Registry, asking: AgentQueries, default: Placement) -> None:
        self._registry = registry
        self._asking = asking
        self.default = default

    def copies(self, key: str) -> list[AgentState]:
        """Every agent, living or not, that has some content under this name."""
        return [self._registry.get(agent_id) for agent_id in self._registry.copies(key)]

    def for_pull(self, name: str, placement: Placement) -> Chosen:
        """The agents that are to have a model.

        Raises:
            NoAgentForModel: none of them can be asked now.
        """
        everybody = list(self._registry)
        reachable = self._asking.reachable(everybody)
        found = choose(placement, everybody, self.copies(model_key(name)), reachable)
        self._check(found.chosen, placement)
        return found

    def concerned(self, placement: Placement) -> list[AgentState]:
        """The agents that may have to build a model whose name is not known yet.

        Those that drain, and those beyond a number, may have one of that name already.
        """
        return [agent for agent in self._registry if placement.concerns(agent)]

    async def for_create(self, name: str, source: str, placement: Placement) -> Chosen:
        """The agents that build a model: of those that have what it is made from.

        They are chosen as for a pull: with them, those that have a model of this name already.

        Raises:
            InvalidModelName: the source cannot be a name.
            NoAgentForModel: none of them can be asked now.
        """
        if not source:
            return self.for_pull(name, placement)
        try:
            await self._asking.holders(source)
        except ModelNotFound:
            return self.for_pull(name, placement)  # an agent pulls what it lacks by itself
        holders = self._registry.holders(model_key(source))
        reachable = self._asking.reachable(holders)
        found = choose(placement, holders, self.copies(model_key(name)), reachable)
        self._check(found.chosen, placement, holders)
        return found

    async def for_push(self, name: str) -> AgentState:
        """The one agent that pushes; where nobody has the model, anyone says so.

        Raises:
            HoldersUnavailable: those that have it are away.
            NoAgentForModel: there is nobody to ask.
        """
        try:
            able = await self._asking.holders(name)
        except ModelNotFound:
            able = self._asking.routable()
        self._check(able, self.default)
        return min(able, key=lambda agent: (PUSH_LABEL not in agent.settings.labels, agent.id))

    async def for_load(self, name: str, placement: Placement) -> list[AgentState]:
        """The agents that bring a model into memory; those that have it there count.

        Those that drain get no requests: they are asked where nobody else can be.

        Raises:
            ModelNotFound: no agent has it on disk.
            HoldersUnavailable: those that have it are away.
            NoAgentForModel: the placement means none that has it.
        """
        key = model_key(name)
        holders = [a for a in await self._asking.holders(name) if placement.concerns(a)]
        holders = [agent for agent in holders if not agent.settings.draining] or holders
        holders.sort(key=lambda agent: (not agent.inventory.is_loaded(key), agent.id))
        count = placement.count if placement.rule is Rule.COUNT else len(holders)
        if not holders:
            raise NoAgentForModel(f"placement {placement.text} leaves no agent that has the model")
        return holders[:count]

    def _check(
        self,
        agents: Sequence[AgentState],
        placement: Placement,
        others: Sequence[AgentState] = (),
    ) -> None:
        """Raise unless one of them can be asked; where there are none, tell of the others."""
        if self._asking.reachable(agents):
            return
        away = self._asking.why_not(agents or others or list(self._registry))
        told = "; ".join(f"{name}: {reason}" for name, reason in sorted(away.items()))
        raise NoAgentForModel(
            f"no agent that placement {placement.text} means can be reached "
            f"({told or 'no agent is registered'})"
        )
