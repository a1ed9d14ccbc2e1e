"""The sparklines: tokens per second in the last minutes, of the fleet and of each agent."""

from collections import deque
from collections.abc import Container, Iterable, Mapping

from msgspec import Struct

from ollama_coordinator_common.types import AgentId

PULSE_SECONDS = 5
"""How long one point is."""

PULSES = 60


class Kept(Struct, frozen=True):
    """The points of an earlier process; `number` is that of the newest, idle agents are left out.

    Whatever was not kept is taken for nothing written.
    """

    number: int = 0
    fleet: list[float] = []
    agents: dict[AgentId, list[float]] = {}


class Pulses:
    """Points, the newest last. `number` counts them since the epoch, in `PULSE_SECONDS`."""

    def __init__(self) -> None:
        self.number = 0
        self.fleet: deque[float] = deque(maxlen=PULSES)
        self.agents: dict[AgentId, deque[float]] = {}

    def is_due(self, at: float) -> bool:
        """Whether a point ends at this moment (Unix seconds)."""
        return _number(at) != self.number

    def take(
        self, at: float, tokens: int, of_agents: Mapping[str, int], known: Iterable[AgentId]
    ) -> None:
        """One more point: the tokens since the last one, of all and of each of the known agents."""
        self.number = _number(at)
        # A fifth of a count has one decimal at most: nobody has to round it.
        self.fleet.append(max(tokens, 0) / PULSE_SECONDS)
        for agent_id in known:
            points = self.agents.setdefault(agent_id, deque(maxlen=PULSES))
            points.append(max(of_agents.get(agent_id, 0), 0) / PULSE_SECONDS)

    def forget(self, agent_id: AgentId) -> None:
        """The agent is gone."""
        self.agents.pop(agent_id, None)

    def export(self) -> Kept:
        """What to keep over a restart."""
        agents = {key: list(points) for key, points in self.agents.items() if any(points)}
        return Kept(self.number, list(self.fleet), agents)

    def restore(self, kept: Kept, at: float, known: Container[AgentId]) -> None:
        """Go on where an earlier process stopped; nothing was written between.

        The points of agents that are not known any more are left out.
        """
        self.number = _number(at)
        missed = self.number - kept.number
        if not 0 <= missed < PULSES:
            return
        gap = [0.0] * missed
        self.fleet.extend([*kept.fleet, *gap])
        for agent_id, points in kept.agents.items():
            if agent_id in known:
                self.agents[agent_id] = deque([*points, *gap], PULSES)


def _number(at: float) -> int:
    return int(at // PULSE_SECONDS)
