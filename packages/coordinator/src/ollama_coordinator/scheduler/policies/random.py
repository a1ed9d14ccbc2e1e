"""Any agent; the seed makes a run repeatable."""

import random
from collections.abc import Callable, Sequence

from ollama_coordinator.registry import AgentState
from ollama_coordinator.scheduler.types import Request
from ollama_coordinator_common.types import AgentId


class Random:
    """A policy that draws lots."""

    def __init__(self, seed: int) -> None:
        self._lots = random.Random(seed)

    def __call__(
        self, agents: Sequence[AgentState], request: Request, in_flight: Callable[[AgentId], int]
    ) -> AgentState:
        """One of the candidates."""
        return self._lots.choice(agents)
