"""The score of this project's first version: the agent whose CPU and memory are used least."""

from collections.abc import Callable, Sequence

from ollama_coordinator.registry import AgentState
from ollama_coordinator.scheduler.types import Request
from ollama_coordinator_common.types import AgentId


def choose(
    agents: Sequence[AgentState], request: Request, in_flight: Callable[[AgentId], int]
) -> AgentState:
    """An agent that has not reported yet is taken to be idle."""
    return min(agents, key=_score)


def _score(agent: AgentState) -> float:
    report = agent.report
    return 0.0 if report is None else report.cpu_usage + report.memory_usage
