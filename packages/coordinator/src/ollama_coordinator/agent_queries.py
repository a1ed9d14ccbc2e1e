"""Questions to agents outside of the request path: one answers for the fleet, or each for itself.

They take no lease. An agent that does not answer is passed over for the next.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from ollama_coordinator_common.error import OllamaCoordinatorError
from ollama_coordinator_common.names import ModelName
from ollama_coordinator_common.types import AgentId

from .clock import Clock
from .monitor import Monitor
from .registry import AgentState, Registry
from .scheduler import HoldersUnavailable, ModelNotFound, NoAgentRegistered
from .upstream import SMALL_ANSWER_BYTES, Unreachable, Upstreams

ANSWER_SECONDS = 30.0
"""Reading a large model's metadata from a slow disk takes seconds, and nothing else does."""


ANSWERS = (200, *range(400, 600))
"""Statuses that Ollama answers with; a redirect, as of a login page, is none of them."""


LARGEST_ANSWER_BYTES = 32 * 1024 * 1024
"""Of a verbose `/api/show`, with all tokens of a vocabulary: tens of megabytes."""


class Answer(Struct, frozen=True):
    """One agent's answer; `body` is as it came."""

    agent: AgentState
    status: int
    body: bytes


class AgentQueries:
    """Asks agents."""

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
        """Those that are online and whose Ollama answers; a draining one does."""
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
            HoldersUnavailable: those that have it cannot be asked now.
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
            others = [agent.name for agent in self.routable()]
            raise HoldersUnavailable(name, self.why_not(holders), others)
        return reachable

    async def ask(
        self,
        agent: AgentState,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        seconds: float = ANSWER_SECONDS,
        limit: int = SMALL_ANSWER_BYTES,
    ) -> Answer:
        """One agent's answer.

        Raises:
            Unreachable: it gave none within `seconds`, or one that Ollama does not give.
        """
        status, answer = await self._upstreams.fetch(
            method, agent.url + path, seconds=seconds, body=body, limit=limit
        )
        if status not in ANSWERS:
            raise Unreachable(f"answered {status} in place of an answer; is it an Ollama?")
        return Answer(agent, status, answer)

    async def first(
        self, agents: Sequence[AgentState], method: str, path: str, body: bytes = b""
    ) -> Answer:
        """The answer of the first agent that gives one and is not in trouble (403 or 5xx).

        Raises:
            Unreachable: none gave any.
        """
        refused: Answer | None = None
        reasons: list[str] = []
        for agent in agents:
            try:
                answer = await self.ask(agent, method, path, body, limit=LARGEST_ANSWER_BYTES)
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


# ── models ──────────────────────────────────────────────────────────────────────────────────────

KEPT = 256
"""Answers of `/api/show` that are remembered: more models than a fleet uses at a time."""

KEPT_BYTES = 1024 * 1024
"""A verbose answer may have tens of megabytes and is hardly asked for twice."""

ASKED_BYTES = 4096
"""A longer question has a template or system prompt of the client's own, and is not repeated."""

Question = tuple[str, str, str, bytes]
"""Routing key, digests of manifest and weights, and the body."""


class _ModelParameters(Struct):
    parameters: str = ""
    model_info: dict[str, Any] | None = None


_parameters = msgspec.json.Decoder(_ModelParameters)


class ModelInfo:
    """Answers of `POST /api/show`, remembered as long as the content of a model is the same."""

    def __init__(self, queries: AgentQueries, registry: Registry) -> None:
        self._queries = queries
        self._registry = registry
        self._kept: OrderedDict[Question, bytes] = OrderedDict()

    async def show(self, name: str, body: bytes) -> tuple[int, bytes]:
        """Status and body of one holder's answer.

        Raises:
            InvalidModelName: no model can have this name.
            ModelNotFound: no agent has it.
            HoldersUnavailable: those that have it cannot be asked now.
            Unreachable: none of them answered.
        """
        holders = await self._queries.holders(name)
        key = ModelName.parse(name).key
        question = _question(key, holders[0], body)
        if question in self._kept:
            self._kept.move_to_end(question)
            return 200, self._kept[question]
        answer = await self._ask(name, key, holders, body)
        worth_it = len(answer.body) <= KEPT_BYTES and len(body) <= ASKED_BYTES
        if answer.status == 200 and worth_it:
            self._kept[question] = answer.body
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return answer.status, answer.body

    async def _ask(self, name: str, key: str, holders: list[AgentState], body: bytes) -> Answer:
        while True:
            answer = await self._queries.first(holders, "POST", "/api/show", body)
            if answer.status != 404:
                return answer
            self._registry.note_missing(answer.agent, key)
            holders = [agent for agent in holders if agent is not answer.agent]
            if not holders:
                raise ModelNotFound(name)

    async def number_parameter(self, name: str, parameter: str) -> int | None:
        """A number (0 or more) that the model's own parameters set; `None` where they do not.

        Raises:
            OllamaCoordinatorError: as `show`.
        """
        status, body = await self.show(name, msgspec.json.encode({"model": name}))
        lines = _parameters.decode(body).parameters.splitlines() if status == 200 else []
        words = [line.split() for line in lines]
        values = [word[1] for word in words if len(word) == 2 and word[0] == parameter]
        return int(values[-1]) if values and values[-1].isdigit() else None

    async def trained_context(self, name: str) -> int | None:
        """The context (tokens) that the model was trained with; `None` where it does not say so.

        Raises:
            OllamaCoordinatorError: as `show`.
        """
        status, body = await self.show(name, msgspec.json.encode({"model": name}))
        facts = (_parameters.decode(body).model_info if status == 200 else None) or {}
        values = [facts[key] for key in facts if key.endswith(".context_length")]
        return next((value for value in values if isinstance(value, int)), None)


def _question(key: str, holder: AgentState, body: bytes) -> Question:
    row = holder.inventory.available[key]
    return key, row.model.digest, row.blob, body


# ── ollama.com ────────────────────────────────────────────────────────────────────────────────

CLOUD_LABEL = "cloud"
FRESH_SECONDS = 30.0
"""How long an agent's reported cloud setting is believed; it changes by hand."""

SIGNED_IN_SECONDS = 300.0
"""How long an account is believed to be signed in: each question goes to ollama.com."""

STATUS_SECONDS = 3.0
"""How long a report on the cloud is waited for; an agent that gives none has none for a while."""

AT_ONCE = 8
"""Agents asked for their account at the same time; the first that has one ends the search."""

NEVER = float("-inf")

Believed = Mapping[AgentId, tuple[float, Any]]
"""The reports of agents, and until when (monotonic seconds) each is believed."""


class CloudDisabled(OllamaCoordinatorError):
    """The error of an Ollama with its cloud off; in the native shape on every route, as there."""

    def __init__(self, subject: str) -> None:
        super().__init__(f"ollama cloud is disabled: {subject}")


class CloudSetting(Struct, frozen=True):
    """An Ollama's cloud setting."""

    disabled: bool = True
    source: str = "none"


class CloudStatus(Struct, frozen=True):
    """`GET /api/status`."""

    cloud: CloudSetting = CloudSetting()


_status = msgspec.json.Decoder(CloudStatus)


class CloudAccess:
    """Which agents may use ollama.com, and which of them are signed in there.

    A key belongs to one machine. The agents that speak for the fleet there are those that the
    operator labelled `cloud`; for models and searches, where none is labelled, any whose Ollama
    may.
    """

    def __init__(self, queries: AgentQueries, registry: Registry, clock: Clock) -> None:
        self._queries = queries
        self._registry = registry
        self._clock = clock
        self._settings: dict[AgentId, tuple[float, CloudSetting | None]] = {}
        self._accounts: dict[AgentId, tuple[float, bool]] = {}

    def designated(self) -> list[AgentState]:
        """The agents that the operator labelled."""
        return [agent for agent in self._queries.routable() if CLOUD_LABEL in agent.settings.labels]

    async def settings(self, agents: Iterable[AgentState]) -> dict[AgentId, CloudSetting]:
        """The cloud settings of agents, as reported now or last; some have never reported any."""
        now, wanted = self._clock.now(), list(agents)
        self._settings = {id: kept for id, kept in self._settings.items() if self._knows(id)}
        stale = self._stale(wanted, self._settings, now)
        answers = await self._queries.each(stale, "GET", "/api/status", seconds=STATUS_SECONDS)
        for agent, answer in zip(stale, answers, strict=True):
            _, last = self._settings.get(agent.id, (NEVER, None))
            setting = _read_setting(answer) if isinstance(answer, Answer) else last
            self._settings[agent.id] = (now + FRESH_SECONDS, setting)
        ids = sorted(agent.id for agent in wanted if agent.id in self._settings)
        known = ((id, self._settings[id][1]) for id in ids)
        return {id: setting for id, setting in known if setting is not None}

    async def able(self) -> list[AgentState]:
        """The agents to ask, those that are signed in where there are any; none: it is disabled."""
        agents = self.designated() or self._queries.routable()
        settings = await self.settings(agents)
        enabled = [a for a in agents if not settings.get(a.id, CloudSetting()).disabled]
        return await self._signed_in(enabled) or enabled

    async def _signed_in(self, agents: Sequence[AgentState]) -> list[AgentState]:
        """Those that have an account, as far as is known; asks until one has."""
        now = self._clock.now()
        self._accounts = {id: kept for id, kept in self._accounts.items() if self._knows(id)}
        stale = self._stale(agents, self._accounts, now) if len(agents) > 1 else []
        while stale and not self._with_account(agents, now):
            asked, stale = stale[:AT_ONCE], stale[AT_ONCE:]
            answers = await self._queries.each(asked, "POST", "/api/me", seconds=STATUS_SECONDS)
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
        """Take over the status of an answer of ollama.com; after a 401 the account is in doubt."""
        if status == 401:
            self._accounts.pop(agent_id, None)

    async def ask(self, method: str, path: str, body: bytes = b"", *, subject: str) -> Answer:
        """The answer of ollama.com to one of the agents that may ask it.

        Raises:
            CloudDisabled: none may; its text says that `subject` is unavailable.
            Unreachable: none answered.
        """
        able = await self.able()
        if not able:
            raise CloudDisabled(f"{subject} unavailable")
        answer = await self._queries.first(able, method, path, body)
        self.note(answer.agent.id, answer.status)
        return answer

    async def ask_of_model(self, method: str, path: str, body: bytes = b"") -> Answer:
        """The answer of ollama.com about one of its models.

        Raises:
            CloudDisabled: no agent may ask.
            Unreachable: none answered.
        """
        return await self.ask(method, path, body, subject="remote model details are")

    async def offer(self, key: str, name: str, holders: Iterable[AgentState]) -> list[AgentState]:
        """Let the scheduler choose among the agents that can pass a cloud model's name on.

        These are returned. A model that is pulled on an agent that takes requests (one of
        `holders`) goes there as any other model does.
        """
        now = self._clock.now()
        is_there = any(self._registry.is_routable(agent, now) for agent in holders)
        able = [] if is_there else await self.able()
        self._registry.offer(key, name, [agent.id for agent in able])
        return able

    @staticmethod
    def _stale(agents: Iterable[AgentState], known: Believed, now: float) -> list[AgentState]:
        """The agents of which no report is believed any more."""
        return [agent for agent in agents if now >= known.get(agent.id, (NEVER, None))[0]]

    def _knows(self, agent_id: AgentId) -> bool:
        return self._registry.find(agent_id) is not None


def _read_setting(answer: Answer) -> CloudSetting:
    """An Ollama too old for the route has no cloud."""
    try:
        return _status.decode(answer.body).cloud if answer.status == 200 else CloudSetting()
    except msgspec.DecodeError:
        return CloudSetting()
