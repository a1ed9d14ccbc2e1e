"""`POST /api/health`, the agents' heartbeats; `/healthz`, `/readyz`, `/metrics`: our own health."""

from datetime import UTC, datetime

import msgspec
from msgspec import UNSET, Struct, UnsetType
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from ollama_coordinator.access import caller_of
from ollama_coordinator.api.http.errors import HttpError, decode, log_event, reply
from ollama_coordinator.api.http.openapi import Media, operation
from ollama_coordinator.attention import OpenConcern
from ollama_coordinator.journal import AgentEvent
from ollama_coordinator.metrics import CONTENT_TYPE, Metrics
from ollama_coordinator.model_probes import take_restart
from ollama_coordinator.monitor import LIST_BYTES
from ollama_coordinator.parts import Parts
from ollama_coordinator.registry import AgentState
from ollama_coordinator_common.protocol import HealthReply, HealthReport

REPORT_COMMAS = 20_000
"""Of a heartbeat: some twelve for each of `MOST_MODELS` models, and one for its weights."""


class LeaderView(Struct, frozen=True):
    """The coordinator that leads, since when, and how many led before it, with it counted."""

    url: str
    since: datetime
    epoch: int


class CoordinatorView(Struct, frozen=True):
    """One of the coordinators of a database; `since`: when it started."""

    url: str
    version: str
    since: datetime


class HealthView(Struct, frozen=True):
    """`GET /healthz`. `status` is ok or stopping; `database` is ok or its problem.

    `id` stays the same as long as the database does: agents know their coordinator by it.
    `leader` and `coordinators` are there where several coordinators can share the database.
    """

    status: str
    agents: int
    agents_online: int
    in_flight: int
    waiting: int
    database: str
    id: str
    leader: LeaderView | UnsetType = UNSET
    coordinators: list[CoordinatorView] | UnsetType = UNSET


class AttentionView(Struct, frozen=True):
    """`GET /api/attention`."""

    attention: list[OpenConcern]


class EventsView(Struct, frozen=True):
    """`GET /api/events` and `GET /api/log`."""

    events: list[AgentEvent]


class HealthApi:
    """The handlers of heartbeats and of the coordinator's own health."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._registry = parts.registry
        self._dispatch = parts.dispatch
        self._clock = parts.clock
        self._metrics = Metrics(parts)

    @operation(takes=HealthReport, gives={200: HealthReply}, errors=(404,))
    async def heartbeat(self, request: Request) -> Response:
        """A heartbeat of an agent; one that is not known gets 404, and registers again."""
        report = await decode(HealthReport, request, limit=LIST_BYTES, commas=REPORT_COMMAS)
        agent = self._registry.get(report.agent_id)
        self._parts.machines.check(agent, request.scope, report.instance_id)
        return reply(self.take(report, caller_of(request.scope).client.address))

    def take(self, report: HealthReport, address: str) -> HealthReply:
        """Take a heartbeat from an agent that speaks from an address; the answer to it.

        Raises:
            UnknownAgent: its agent has to register again.
            HttpError: its lists are none of Ollama's (400).
        """
        before = self._registry.get(report.agent_id)
        was_running, kept = before.ollama_running, (before.inventory.tags, before.settings)
        now = self._clock.now()
        try:
            agent = self._registry.heartbeat(report, now)
        except msgspec.DecodeError as exc:
            self._dispatch.take_out(before, f"reports models that cannot be read: {exc}")
            raise HttpError(400, f"tags or ps is not what Ollama lists: {exc}") from exc
        self._parts.machines.note(agent.id, address)
        if agent.left:
            log_event("agent says goodbye", agent)
        elif was_running and not agent.ollama_running:
            log_event("agent reports that its Ollama does not answer", agent)
        elif agent.ollama_running and not was_running:
            self._dispatch.agent_failed.set()  # if it was out of rotation, it is probed now
        if agent.left or (agent.inventory.tags, agent.settings) != kept:
            self._parts.agent_store.keep(agent)
        else:
            self._parts.agent_store.keep_seen(agent)
        self._dispatch.reported(agent)
        log_after = self._parts.agent_logs.wanted_after(agent.id, now)
        return HealthReply(
            log_after=UNSET if log_after is None else log_after,
            problem=self._problem(agent, now) or UNSET,
            restart=take_restart(agent, self._dispatch) or UNSET,
            asks_findings=True if agent.findings is None else UNSET,
            reached=False if self._is_cut_off(agent) else UNSET,
            handshake=bool(self._parts.machines.relay_key(agent)) or UNSET,
        )

    def _is_cut_off(self, agent: AgentState) -> bool:
        """Whether several probes of an Ollama that runs got no answer."""
        cooldown = agent.cooldown if agent.resting and agent.ollama_running else None
        return cooldown is not None and cooldown.failures > 1 and not agent.reached

    def _problem(self, agent: AgentState, now: float) -> str | None:
        """Why an agent gets no requests, or which other agent has its identity."""
        waits_for_link = agent.registration.link and not agent.linked  # which this report opens
        if waits_for_link:
            return self._registry.conflict(agent, now)
        if agent.ollama_running and (reason := agent.out_of_rotation()) is not None:
            return f"it sends no requests to {agent.way}: {reason}"
        return self._registry.conflict(agent, now)

    @operation(gives={200: HealthView})
    async def healthz(self, request: Request) -> Response:
        """Whether the coordinator works; 200 as long as it serves."""
        return reply(self._view())

    @operation(gives={200: HealthView, 503: HealthView})
    async def readyz(self, request: Request) -> Response:
        """Whether the coordinator takes requests; 503 once it is stopping."""
        return reply(self._view(), 503 if self._parts.stopping else 200)

    @operation(gives={200: Media(CONTENT_TYPE)})
    async def metrics(self, request: Request) -> Response:
        """The coordinator's numbers for Prometheus, in its text format."""
        return StreamingResponse(self._metrics.text(), media_type=CONTENT_TYPE)

    @operation(gives={200: AttentionView})
    async def attention(self, request: Request) -> Response:
        """What needs a person now: the worst first, then what has lasted longest."""
        return reply(AttentionView(self._parts.attention.open()))

    @operation(gives={200: EventsView})
    async def events(self, request: Request) -> Response:
        """The last events of all agents, newest first."""
        return reply(EventsView(self._parts.observation.events.all()))

    @operation(gives={200: EventsView})
    async def log(self, request: Request) -> Response:
        """The last lines that the coordinator logged, of level INFO and above, newest first."""
        return reply(EventsView(self._parts.observation.events.lines()))

    def _view(self) -> HealthView:
        now = self._clock.now()
        return HealthView(
            status="stopping" if self._parts.stopping else "ok",
            agents=len(self._registry),
            agents_online=sum(self._registry.is_online(agent, now) for agent in self._registry),
            in_flight=len(list(self._dispatch.scheduler.leases())),
            waiting=self._dispatch.scheduler.waiting_count(),
            database=self._parts.store.problem or "ok",
            leader=self._leader(),
            coordinators=self._coordinators(),
            id=self._parts.identity.id,
        )

    def _leader(self) -> LeaderView | UnsetType:
        leader = self._parts.cluster.leader
        if leader is None:
            return UNSET
        since = datetime.fromtimestamp((leader.leads_since_ms or 0) / 1000, UTC)
        return LeaderView(leader.url, since, leader.epoch)

    def _coordinators(self) -> list[CoordinatorView] | UnsetType:
        return [
            CoordinatorView(
                one.url, one.version, datetime.fromtimestamp(one.started_ms / 1000, UTC)
            )
            for one in self._parts.cluster.coordinators
        ] or UNSET
