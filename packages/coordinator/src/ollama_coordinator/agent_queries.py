"""Questions that any one agent can answer for the fleet, and those that all of some must answer.

These are the short calls beside inference: they take no lease, and an agent that does not answer
is passed over for the next.
"""

import asyncio
from collections.abc import Iterable, Sequence

from msgspec import Struct

from ollama_coordinator_common.names import ModelName

from .clock import Clock
from .monitor import Monitor
from .registry import AgentState, Registry
from .scheduler import HoldersUnavailable, ModelNotFound, NoAgentRegistered
from .upstream import Unreachable, Upstreams

ANSWER_SECONDS = 30.0
"""Reading a large model's metadata from a slow disk takes seconds, and nothing else does."""

JSON = [("content-type", "application/json")]


class Answer(Struct, frozen=True):
    """What one agent answered."""

    agent: AgentState
    status: int
    body: bytes


class AgentQueries:
    """Asks agents outside the request path."""

    def __init__(
        self, registry: Registry, monitor: Monitor, upstreams: Upstreams, clock: Clock
    ) -> None:
        self._registry = registry
        self._monitor = monitor
        self._upstreams = upstreams
        self._clock = clock

    def routable(self) -> list[AgentState]:
        """Every agent that may be asked now."""
        now = self._clock.now()
        return [agent for agent in self._registry if self._registry.is_routable(agent, now)]

    def reachable(self, agents: Iterable[AgentState]) -> list[AgentState]:
        """Those that live and whose Ollama answers; a draining one does."""
        now = self._clock.now()
        return [agent for agent in agents if self._registry.is_reachable(agent, now)]

    def why_not(self, agents: Iterable[AgentState]) -> dict[str, str]:
        """Why agents cannot be asked, by their name."""
        now = self._clock.now()
        return {
            agent.name: agent.out_of_rotation()
            or str(agent.status(now, self._registry.agent_timeout).value)
            for agent in agents
        }

    async def holders(self, name: str) -> list[AgentState]:
        """The agents with the preferred content of a model that can be asked now.

        Raises:
            InvalidModelName: no model can have this name.
            ModelNotFound: no agent has it.
            HoldersUnavailable: those that have it are away.
        """
        key = ModelName.parse(name).key
        if not self._registry.holders(key):
            # Perhaps pulled a moment ago on an agent that does not report its models by itself.
            await self._monitor.refresh(self._registry, older_than=2.0, seconds=1.0)
        holders = self._registry.holders(key)
        if not holders:
            raise NoAgentRegistered if len(self._registry) == 0 else ModelNotFound(name)
        reachable = self.reachable(holders)
        if not reachable:
            raise self.unavailable(name, holders)
        return reachable

    def unavailable(self, name: str, holders: Iterable[AgentState]) -> HoldersUnavailable:
        """The error that names the holders that are away."""
        others = [agent.name for agent in self.routable()]
        return HoldersUnavailable(name, self.why_not(holders), others)

    async def ask(
        self,
        agent: AgentState,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        seconds: float = ANSWER_SECONDS,
    ) -> Answer:
        """One agent's answer.

        Raises:
            Unreachable: it gave none.
        """
        status, answer = await self._upstreams.fetch(
            method, agent.url + path, seconds=seconds, body=body
        )
        return Answer(agent, status, answer)

    async def first(
        self, agents: Sequence[AgentState], method: str, path: str, body: bytes = b""
    ) -> Answer:
        """The answer of the first agent that gives one and is not in trouble (a 5xx).

        Raises:
            Unreachable: none gave any.
        """
        refused: Answer | None = None
        reasons: list[str] = []
        for agent in agents:
            try:
                answer = await self.ask(agent, method, path, body)
            except Unreachable as exc:
                reasons.append(f"agent {agent.name}: {exc}")
                continue
            if answer.status < 500 and answer.status != 403:
                return answer
            refused = answer
        if refused is None:
            raise Unreachable("; ".join(reasons) or "no agent is there to ask")
        return refused

    async def each(
        self,
        agents: Iterable[AgentState],
        method: str,
        path: str,
        body: bytes = b"",
        *,
        seconds: float = ANSWER_SECONDS,
    ) -> list[Answer | Unreachable]:
        """Every agent's answer, or why there is none, in their order."""

        async def one(agent: AgentState) -> Answer | Unreachable:
            try:
                return await self.ask(agent, method, path, body, seconds=seconds)
            except Unreachable as exc:
                return Unreachable(f"agent {agent.name}: {exc}")

        return list(await asyncio.gather(*(one(agent) for agent in agents)))
