"""The agent with the fewest leases in flight, whatever it has in memory."""

from collections.abc import Callable, Sequence

from ollama_coordinator.registry import AgentState
from ollama_coordinator.scheduler.types import Request
from ollama_coordinator_common.types import AgentId


def choose(
    agents: Sequence[AgentState], request: Request, in_flight: Callable[[AgentId], int]
) -> AgentState:
    """Ties go to the least recently chosen, so equal agents take turns."""
    return min(agents, key=lambda agent: in_flight(agent.id))
