"""Each agent in turn."""

from collections.abc import Callable, Sequence

from ollama_coordinator.registry import AgentState
from ollama_coordinator.scheduler.types import Request
from ollama_coordinator_common.types import AgentId


def choose(
    agents: Sequence[AgentState], request: Request, in_flight: Callable[[AgentId], int]
) -> AgentState:
    """The candidates come least recently chosen first."""
    return agents[0]
