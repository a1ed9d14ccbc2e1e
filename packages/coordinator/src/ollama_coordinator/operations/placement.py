"""Which agents get a model: all, so many, those with a label, or those named; pure."""

from collections.abc import Collection, Iterable, Sequence
from enum import Enum

from msgspec import Struct

from ollama_coordinator.registry import AgentState
from ollama_coordinator_common.error import OllamaCoordinatorError

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


class Places(Struct, frozen=True):
    """The agents chosen, and those that stand by should one of them fail."""

    chosen: Sequence[AgentState]
    spare: Sequence[AgentState] = ()


def places(
    placement: Placement,
    agents: Iterable[AgentState],
    holders: Collection[AgentState],
    reachable: Collection[AgentState],
) -> Places:
    """Choose among the agents; `holders` have some content of the model already.

    Those that have the model are always among the chosen of `all` and of a number, also beyond
    it: a pull that left one of them behind would leave two contents under one name. A number is
    filled up with reachable agents, those with the most free disk first; for the other rules also
    the agents that are away count, and get the model when they return.
    """
    meant = [agent for agent in agents if placement.concerns(agent)]
    if placement.rule is not Rule.COUNT:
        return Places([agent for agent in meant if not agent.settings.draining or agent in holders])
    having = [agent for agent in meant if agent in holders]
    others = sorted(
        (a for a in meant if a in reachable and a not in holders and not a.settings.draining),
        key=_room,
    )
    missing = max(0, placement.count - sum(agent in reachable for agent in having))
    return Places([*having, *others[:missing]], others[missing:])


def _room(agent: AgentState) -> tuple[float, int, str]:
    """Most free disk first; an agent that does not report it counts as having some."""
    free = agent.report.disk_free_bytes if agent.report is not None else None
    return -(free if free is not None else 1), len(agent.inventory.available), agent.id
