"""Placements, and the agents that an operation runs on."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import Enum

from msgspec import Struct

from ollama_coordinator.agent_queries import AgentQueries
from ollama_coordinator.registry import AgentState, Registry
from ollama_coordinator.scheduler import ModelNotFound
from ollama_coordinator_common.error import InvalidModelName, OllamaCoordinatorError
from ollama_coordinator_common.names import ModelName, model_key
from ollama_coordinator_common.types import AgentId

from .room import ModelSizes, lacks_disk, lacks_memory
from .types import NoAgentForModel

EXPECTED = "give fitting, all, a number of agents, label:NAME, or agents:NAME,NAME"


class WrongPlacement(OllamaCoordinatorError):
    """The text is not a placement."""

    def __init__(self, text: str) -> None:
        super().__init__(f"placement {text!r} is not understood: {EXPECTED}")


class Rule(Enum):
    """What a placement chooses by."""

    FITTING = "fitting"
    ALL = "all"
    COUNT = "count"
    LABEL = "label"
    AGENTS = "agents"


class Placement(Struct, frozen=True):
    """Which agents get a model: those that can hold it, all, a number, by label, by name."""

    rule: Rule = Rule.ALL
    count: int = 0
    names: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Placement":
        """Read `fitting`, `all`, `2`, `label:gpu` or `agents:first,second`.

        Raises:
            WrongPlacement: the text is none of these.
        """
        word = text.strip()
        kind, _, rest = word.partition(":")
        names = tuple(name.strip() for name in rest.split(",") if name.strip())
        if word.lower() in ("all", ""):
            return cls()
        if word.lower() == "fitting":
            return cls(Rule.FITTING)
        if word.isascii() and word.isdecimal() and 0 < len(word) < 7 and int(word):
            return cls(Rule.COUNT, count=int(word))
        if kind.lower() in ("label", "agents") and names:
            return cls(Rule(kind.lower()), names=names)
        raise WrongPlacement(text)

    @property
    def text(self) -> str:
        """As `parse` reads it."""
        if self.rule in (Rule.ALL, Rule.FITTING):
            return str(self.rule.value)
        if self.rule is Rule.COUNT:
            return str(self.count)
        return f"{self.rule.value}:{','.join(self.names)}"

    def matches(self, agent: AgentState) -> bool:
        """Whether the rule may choose this agent."""
        if self.rule is Rule.LABEL:
            return not set(self.names).isdisjoint(agent.settings.labels)
        if self.rule is Rule.AGENTS:
            return not set(self.names).isdisjoint((agent.id, agent.name, agent.called))
        return True


class Chosen(Struct, frozen=True):
    """The chosen agents, and the spare ones that replace those that fail.

    `left_out`: the agents that would have been chosen, and why they are not.
    """

    chosen: Sequence[AgentState]
    spare: Sequence[AgentState] = ()
    left_out: Sequence[tuple[AgentState, str]] = ()


def choose(
    placement: Placement,
    agents: Iterable[AgentState],
    holders: Collection[AgentState],
    reachable: Collection[AgentState],
) -> Chosen:
    """Choose among the agents; `holders` have some content under the model's name already.

    `fitting`, `all` and a number always include the holders, also beyond the number: otherwise
    two contents of one name would remain. A number is filled up with reachable agents, those with
    the most free disk first. The other rules include agents that are away: they get the model when
    they are back.
    """
    matching = [agent for agent in agents if placement.matches(agent)]
    if placement.rule is not Rule.COUNT:
        return Chosen(
            [agent for agent in matching if not agent.settings.draining or agent in holders]
        )
    having = [agent for agent in matching if agent in holders]
    others = sorted(
        (a for a in matching if a in reachable and a not in holders and not a.settings.draining),
        key=_by_free_disk,
    )
    missing = max(0, placement.count - sum(agent in reachable for agent in having))
    return Chosen([*having, *others[:missing]], others[missing:])


def _by_free_disk(agent: AgentState) -> tuple[float, int, str]:
    """Most free disk first; an agent that does not report it counts as having some."""
    free = agent.report.disk_free_bytes if agent.report is not None else None
    return -(free if free is not None else 1), len(agent.inventory.available), agent.id


PUSH_LABEL = "push"
"""Label of agents whose key may push; without any, every holder is asked."""


class TargetChooser:
    """Applies placements to the fleet as it is now; `default` is the operator's placement."""

    def __init__(
        self, registry: Registry, queries: AgentQueries, sizes: ModelSizes, default: Placement
    ) -> None:
        self._registry = registry
        self._sizes = sizes
        self._queries = queries
        self.default = default

    def copies(self, key: str) -> list[AgentState]:
        """Every agent, online or not, that has some content under this routing key."""
        return [self._registry.get(agent_id) for agent_id in self._registry.models.copies(key)]

    async def for_pull(
        self, name: str, placement: Placement, *, insecure: bool = False, origin: str = ""
    ) -> Chosen:
        """The agents that pull a model: of those that the placement means, those with room for it.

        A machine that an operator names or labels need not have the memory to run it. Whoever has
        some content of it already is not left out for that either.

        Raises:
            NoAgentForModel: none of them has room, or can be reached now.
        """
        key = model_key(name)
        holders = self.copies(key)
        if origin:
            size = max((a.inventory.available[key].model.size for a in holders), default=0) or None
        else:
            parsed = ModelName.parse(name)
            size = await self._sizes.size(parsed, holders, insecure=insecure)
        wants_memory = placement.rule in (Rule.FITTING, Rule.COUNT)
        why_not: dict[AgentId, str] = {}
        for agent in self._registry:
            memory = wants_memory and agent not in holders and lacks_memory(agent, size)
            if reason := lacks_disk(agent, key, size) or memory or "":
                why_not[agent.id] = reason
        found = self._chosen(placement, list(self._registry), holders, why_not)
        if not found.chosen and found.left_out:
            reasons = "; ".join(f"{agent.name}: {reason}" for agent, reason in found.left_out)
            raise NoAgentForModel(f"no machine has room for {name}: {reasons}")
        self._check(found.chosen, placement)
        return found

    def _chosen(
        self,
        placement: Placement,
        agents: Sequence[AgentState],
        holders: Collection[AgentState],
        why_not: Mapping[AgentId, str],
    ) -> Chosen:
        reachable = self._queries.reachable(agents)
        fitting = [agent for agent in agents if agent.id not in why_not]
        found = choose(placement, fitting, holders, reachable)
        if placement.rule is Rule.COUNT and len(found.chosen) >= placement.count:
            return found
        wanted = choose(placement, agents, holders, reachable)
        lacking = [agent for agent in (*wanted.chosen, *wanted.spare) if agent.id in why_not]
        left_out = [(agent, why_not[agent.id]) for agent in lacking]
        return Chosen(found.chosen, found.spare, left_out)

    def _for_new(self, name: str, placement: Placement) -> Chosen:
        """The agents that make a model whose size nobody knows."""
        found = self._chosen(placement, list(self._registry), self.copies(model_key(name)), {})
        self._check(found.chosen, placement)
        return found

    def candidates(self, placement: Placement) -> list[AgentState]:
        """The agents that may have to create a model whose name is not known yet.

        Draining ones, and more than a number, are included: they may have that name already.
        """
        return [agent for agent in self._registry if placement.matches(agent)]

    async def for_create(self, name: str, source: str, placement: Placement) -> Chosen:
        """The agents that create a model, chosen as for a pull among those that have its source.

        Raises:
            NoAgentForModel: none of them can be reached now.
        """
        if not source:
            return self._for_new(name, placement)
        try:
            await self._queries.holders(source)
        except (ModelNotFound, InvalidModelName):
            # Ollama pulls a source that it lacks by itself, and says what is no name.
            return self._for_new(name, placement)
        holders = self._registry.holders(model_key(source))
        reachable = self._queries.reachable(holders)
        found = choose(placement, holders, self.copies(model_key(name)), reachable)
        self._check(found.chosen, placement, holders)
        return found

    async def for_push(self, name: str) -> AgentState:
        """The agent that pushes; where none has the model, any one, which answers with an error.

        Raises:
            HoldersUnavailable: the agents that have it are away.
            NoAgentForModel: no agent can be reached.
        """
        try:
            able = await self._queries.holders(name)
        except (ModelNotFound, InvalidModelName):
            able = self._queries.routable()
        self._check(able, self.default)
        return min(able, key=lambda agent: (PUSH_LABEL not in agent.settings.labels, agent.id))

    async def for_load(self, name: str, placement: Placement) -> list[AgentState]:
        """The agents that load a model into memory, first those that have it loaded.

        Draining agents are chosen only if no other has the model.

        Raises:
            ModelNotFound: no agent has it on disk.
            HoldersUnavailable: the agents that have it are away.
            NoAgentForModel: the placement excludes all agents that have it.
        """
        key = model_key(name)
        holders = [a for a in await self._queries.holders(name) if placement.matches(a)]
        holders = [agent for agent in holders if not agent.settings.draining] or holders
        holders.sort(key=lambda agent: (not agent.inventory.is_loaded(key), agent.id))
        count = placement.count if placement.rule is Rule.COUNT else len(holders)
        if not holders:
            raise NoAgentForModel(
                f"of the agents that have the model, none is in '{placement.text}'"
            )
        return holders[:count]

    def _check(
        self,
        agents: Sequence[AgentState],
        placement: Placement,
        others: Sequence[AgentState] = (),
    ) -> None:
        """Raise if none of the agents can be reached; the error names them, or else the others."""
        if self._queries.reachable(agents):
            return
        away = self._queries.why_not(agents or others or list(self._registry))
        reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(away.items()))
        if not reasons:
            raise NoAgentForModel("no agent is registered yet")
        which = "" if placement.rule in (Rule.ALL, Rule.FITTING) else f" of '{placement.text}'"
        raise NoAgentForModel(f"no agent{which} can be reached ({reasons})")
