"""Which agents an operation concerns."""

from collections.abc import Sequence

from ollama_coordinator.agent_queries import AgentQueries
from ollama_coordinator.registry import AgentState, Registry
from ollama_coordinator.scheduler import ModelNotFound
from ollama_coordinator_common.names import model_key

from .placement import Placement, Places, Rule, places
from .types import NoAgentForModel

PUSH_LABEL = "push"
"""Marks the agents whose key may push; where none has it, any holder is asked."""


class Choosing:
    """Applies placements to the fleet as it is now; `default` is the operator's setting."""

    def __init__(self, registry: Registry, asking: AgentQueries, default: Placement) -> None:
        self._registry = registry
        self._asking = asking
        self.default = default

    def copies(self, key: str) -> list[AgentState]:
        """Every agent, living or not, that has some content under this name."""
        return [self._registry.get(agent_id) for agent_id in self._registry.copies(key)]

    def for_pull(self, name: str, placement: Placement) -> Places:
        """The agents that are to have a model.

        Raises:
            NoAgentForModel: none of them can be asked now.
        """
        everybody = list(self._registry)
        reachable = self._asking.reachable(everybody)
        found = places(placement, everybody, self.copies(model_key(name)), reachable)
        self._check(found.chosen, placement)
        return found

    def concerned(self, placement: Placement) -> list[AgentState]:
        """The agents that may have to build a model whose name is not known yet.

        Those that drain, and those beyond a number, may have one of that name already.
        """
        return [agent for agent in self._registry if placement.concerns(agent)]

    async def for_create(self, name: str, source: str, placement: Placement) -> Places:
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
        found = places(placement, holders, self.copies(model_key(name)), reachable)
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
