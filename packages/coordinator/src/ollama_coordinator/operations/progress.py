"""Merges several agents' progress into one stream in Ollama's own format; pure.

A layer's bytes are those of the slowest agent, or where agents get it one from the other, the mean
of all; its total never changes. A step after the layers
is reported when the last agent has reached it. `success` is left to the operation.
"""

from collections.abc import Collection, Iterable
from typing import Any

from msgspec import Struct, field

from ollama_coordinator_common.types import AgentId

ProgressLine = dict[str, Any]

LATE = (
    "verifying sha256 digest",
    "writing manifest",
    "removing any unused layers",
    "removing unused layers",
    "pushing manifest",
)
"""Steps after the layers, in Ollama's words; all others are reported by the first agent."""


MOST_KEPT = 4096
"""Layers, and steps, of one operation that are reported; what an agent sends beyond is passed over.
A model has some, and one of many tensors some hundred."""

MOST_CHARACTERS = 1000
"""Of the name of a step or a layer: the first has some words, the second 71."""


class _Agent(Struct):
    layers: dict[str, int] = field(default_factory=dict)
    steps: set[str] = field(default_factory=set)
    is_past_layers: bool = False
    is_done: bool = False

    def completed(self, digest: str, total: int) -> int:
        return total if self.is_past_layers else min(total, self.layers.get(digest, 0))

    def has_reached(self, step: str) -> bool:
        return self.is_done or step in self.steps


class Progress:
    """Merges agents' lines; every method returns the lines that are new to a client."""

    def __init__(self) -> None:
        self._agents: dict[AgentId, _Agent] = {}
        self._layers: dict[str, tuple[str, int]] = {}
        self._shown: dict[str, int] = {}
        self._reported: set[str] = set()
        self._shares = 0

    def share_among(self, agents: int) -> None:
        """So many agents do it one after the other: a layer's bytes are their mean."""
        self._shares = agents

    def begin(self, agent_id: AgentId) -> None:
        """An agent starts an attempt."""
        self._agents[agent_id] = _Agent()

    def feed(self, agent_id: AgentId, line: ProgressLine) -> list[ProgressLine]:
        """An agent sends a line."""
        agent = self._agents[agent_id]
        status, digest, total = line.get("status"), line.get("digest"), line.get("total")
        if not isinstance(status, str) or len(status) > MOST_CHARACTERS:
            return []
        if isinstance(digest, str) and isinstance(total, int) and total > 0:
            if not self._may_keep(digest, self._layers):
                return []
            completed = line.get("completed")
            agent.layers[digest] = completed if isinstance(completed, int) else 0
            self._layers.setdefault(digest, (status, total))
            return self._new_layer_lines([digest])
        if status in LATE:
            agent.is_past_layers = True
            agent.steps.add(status)
            return self._new_lines()
        return self._report(status) if self._may_keep(status, self._reported) else []

    def _may_keep(self, name: str, known: Collection[str]) -> bool:
        """Whether a layer or a step is known, or may be one more."""
        return name in known or (len(known) < MOST_KEPT and len(name) <= MOST_CHARACTERS)

    def finish(self, agent_id: AgentId) -> list[ProgressLine]:
        """An agent has succeeded."""
        agent = self._agents[agent_id]
        agent.is_past_layers = agent.is_done = True
        return self._new_lines()

    def leave(self, agent_id: AgentId) -> list[ProgressLine]:
        """The operation waits for an agent no longer."""
        if self._agents.pop(agent_id, None) is not None:
            self._shares = max(0, self._shares - 1)
        return self._new_lines() if self._agents else []

    def of(self, agent_id: AgentId) -> tuple[int, int]:
        """The bytes that one agent has downloaded, and those of all layers."""
        agent = self._agents.get(agent_id)
        total = sum(size for _, size in self._layers.values())
        if agent is None:
            return 0, total
        return sum(agent.completed(d, size) for d, (_, size) in self._layers.items()), total

    def _new_lines(self) -> list[ProgressLine]:
        agents = self._agents.values()
        lines = self._new_layer_lines(self._layers)
        for step in LATE:
            is_reported = any(step in agent.steps for agent in agents)
            is_whole = len(agents) >= self._shares
            if is_reported and is_whole and all(agent.has_reached(step) for agent in agents):
                lines += self._report(step)
        return lines

    def _new_layer_lines(self, digests: Iterable[str]) -> list[ProgressLine]:
        lines: list[ProgressLine] = []
        for digest in digests:
            status, total = self._layers[digest]
            done = [agent.completed(digest, total) for agent in self._agents.values()]
            least = sum(done) // max(self._shares, len(done)) if self._shares else min(done)
            if least > self._shown.get(digest, -1):
                self._shown[digest] = least
                line: ProgressLine = {"status": status, "digest": digest, "total": total}
                lines.append({**line, "completed": least} if least else line)
        return lines

    def _report(self, status: str) -> list[ProgressLine]:
        if status in self._reported:
            return []
        self._reported.add(status)
        return [{"status": status}]
