"""The agents through which the fleet reaches ollama.com.

A key belongs to one machine. The agents that speak for the fleet there are those that the operator
labelled `cloud`; for models and searches, where none is labelled, any whose Ollama may.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from ollama_coordinator.agent_queries import AgentQueries, Answer
from ollama_coordinator.api.http.errors import HttpError
from ollama_coordinator.clock import Clock
from ollama_coordinator.registry import AgentState, Registry
from ollama_coordinator_common.types import AgentId

CLOUD_LABEL = "cloud"
FRESH_SECONDS = 30.0
"""How long an agent's word on its cloud setting is believed; it changes by hand."""

SIGNED_IN_SECONDS = 300.0
"""How long an account is believed to be signed in: each question goes to ollama.com."""

WORD_SECONDS = 3.0
"""How long a word on the cloud is waited for; an agent that gives none has none for a while."""

AT_ONCE = 8
"""Agents asked for their account at the same time; the first that has one ends the search."""


NEVER = float("-inf")

Kept = Mapping[AgentId, tuple[float, Any]]
"""What agents said, and until when it is believed."""


class CloudDisabled(HttpError):
    """What an Ollama without its cloud answers; in the native shape on every route, as there."""

    def __init__(self, what: str) -> None:
        super().__init__(403, f"ollama cloud is disabled: {what}")


class Cloud(Struct, frozen=True):
    """An Ollama's cloud setting."""

    disabled: bool = True
    source: str = "none"


class CloudStatus(Struct, frozen=True):
    """`GET /api/status`."""

    cloud: Cloud = Cloud()


_status = msgspec.json.Decoder(CloudStatus)


class Clouds:
    """Knows which agents may use the cloud, and which of them are signed in."""

    def __init__(self, asking: AgentQueries, registry: Registry, clock: Clock) -> None:
        self._asking = asking
        self._registry = registry
        self._clock = clock
        self._settings: dict[AgentId, tuple[float, Cloud | None]] = {}
        self._accounts: dict[AgentId, tuple[float, bool]] = {}

    def designated(self) -> list[AgentState]:
        """The agents that the operator labelled."""
        return [agent for agent in self._asking.routable() if CLOUD_LABEL in agent.settings.labels]

    async def settings(self, agents: Iterable[AgentState]) -> dict[AgentId, Cloud]:
        """What agents say of their cloud setting, or said last; some have never said anything."""
        now, wanted = self._clock.now(), list(agents)
        self._settings = {who: kept for who, kept in self._settings.items() if self._knows(who)}
        stale = self._stale(wanted, self._settings, now)
        answers = await self._asking.each(stale, "GET", "/api/status", seconds=WORD_SECONDS)
        for agent, answer in zip(stale, answers, strict=True):
            _, last = self._settings.get(agent.id, (NEVER, None))
            word = _read(answer) if isinstance(answer, Answer) else last
            self._settings[agent.id] = (now + FRESH_SECONDS, word)
        said = {id: self._settings[id][1] for agent in wanted if (id := agent.id) in self._settings}
        return {id: cloud for id, cloud in sorted(said.items()) if cloud is not None}

    async def able(self) -> list[AgentState]:
        """The agents to ask, those that are signed in where there are any; none: it is disabled."""
        agents = self.designated() or self._asking.routable()
        clouds = await self.settings(agents)
        enabled = [agent for agent in agents if not clouds.get(agent.id, Cloud()).disabled]
        return await self._signed_in(enabled) or enabled

    async def _signed_in(self, agents: Sequence[AgentState]) -> list[AgentState]:
        """Those that have an account, as far as is known; asks until one has."""
        now = self._clock.now()
        self._accounts = {who: kept for who, kept in self._accounts.items() if self._knows(who)}
        stale = self._stale(agents, self._accounts, now) if len(agents) > 1 else []
        while stale and not self._with_account(agents, now):
            asked, stale = stale[:AT_ONCE], stale[AT_ONCE:]
            answers = await self._asking.each(asked, "POST", "/api/me", seconds=WORD_SECONDS)
            for agent, answer in zip(asked, answers, strict=True):
                signed_in = isinstance(answer, Answer) and answer.status == 200
                until = now + (SIGNED_IN_SECONDS if signed_in else FRESH_SECONDS)
                self._accounts[agent.id] = (until, signed_in)
        return self._with_account(agents, now)

    def _with_account(self, agents: Iterable[AgentState], now: float) -> list[AgentState]:
        none = (NEVER, False)
        known = [(agent, *self._accounts.get(agent.id, none)) for agent in agents]
        return [agent for agent, until, signed_in in known if signed_in and until > now]

    def note(self, agent_id: AgentId, status: int) -> None:
        """An agent answered what only ollama.com can; after a 401 its account is in doubt."""
        if status == 401:
            self._accounts.pop(agent_id, None)

    async def ask(self, method: str, path: str, body: bytes = b"", *, what: str) -> Answer:
        """What ollama.com answers one of the agents that may ask it.

        Raises:
            CloudDisabled: none may; `what` is told to be unavailable.
            Unreachable: none answered.
        """
        able = await self.able()
        if not able:
            raise CloudDisabled(f"{what} unavailable")
        answer = await self._asking.first(able, method, path, body)
        self.note(answer.agent.id, answer.status)
        return answer

    @staticmethod
    def _stale(agents: Iterable[AgentState], kept: Kept, now: float) -> list[AgentState]:
        """The agents of which nothing is known that is still believed."""
        return [agent for agent in agents if now >= kept.get(agent.id, (NEVER, None))[0]]

    def _knows(self, agent_id: AgentId) -> bool:
        return self._registry.find(agent_id) is not None

    async def offer(self, key: str, name: str) -> None:
        """Let the scheduler choose among the agents that can pass a cloud model's name on.

        One that is pulled on an agent that takes requests goes there as any other model does.
        """
        now = self._clock.now()
        holders = self._registry.holders(key)
        is_there = any(self._registry.is_routable(agent, now) for agent in holders)
        able = [] if is_there else await self.able()
        self._registry.offer(key, name, [agent.id for agent in able])


def _read(answer: Answer) -> Cloud:
    """An Ollama too old for the route has no cloud."""
    try:
        return _status.decode(answer.body).cloud if answer.status == 200 else Cloud()
    except msgspec.DecodeError:
        return Cloud()
