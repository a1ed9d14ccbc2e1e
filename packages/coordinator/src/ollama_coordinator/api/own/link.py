"""`GET /api/agents/{agent_id}/link`: an agent opens a link, or a connection of the one it has.

The request is a WebSocket's, so that every proxy passes it on; what follows is a stream of bytes.
The first connection of a link carries lines of JSON: `LinkReport` from the agent and `LinkOrder` to
it. It lives as long as the link does. On the others the coordinator speaks HTTP with the agent's
Ollama.
"""

import asyncio
from urllib.parse import parse_qs

import msgspec
from starlette.types import Receive, Scope, Send

from ollama_coordinator.access import caller_of
from ollama_coordinator.aio import OwnedTasks
from ollama_coordinator.api.http.errors import HttpError, log_event
from ollama_coordinator.api.http.headers import first
from ollama_coordinator.api.http.openapi import Query, RouteDescription
from ollama_coordinator.api.http.routing import NO_HTTP1
from ollama_coordinator.http1 import CLIENT_CONNECTION, EXCHANGE, ClientConnection, Exchange
from ollama_coordinator.link import Link, LinkConnection
from ollama_coordinator.parts import Parts
from ollama_coordinator.registry import AgentState, UnknownAgent, url_of
from ollama_coordinator.upstream import Unreachable
from ollama_coordinator_common.protocol import LinkOrder, LinkReport
from ollama_coordinator_common.websocket import accept_of

from .health import REPORT_COMMAS, HealthApi

NO_UPGRADE = (
    "the request for a link came without its upgrade to a WebSocket; a proxy on the way leaves that"
    " out: have it pass Upgrade and Connection on (for nginx: proxy_http_version 1.1;"
    " proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection upgrade)"
)

_reports = msgspec.json.Decoder(LinkReport)


class LinkApi:
    """Takes the connections of links, as an ASGI application."""

    operation = RouteDescription(
        "Open an agent's link, or with `session` a connection of it; an upgrade to a WebSocket",
        gives={101: None},
        query=(Query("session", "The session that the coordinator named on the link"),),
        errors=(404, 409, 426, 501),
    )

    def __init__(self, parts: Parts, health: HealthApi) -> None:
        self._parts = parts
        self._health = health
        self._registry = parts.registry
        self._dispatch = parts.dispatch
        self._links = parts.links
        self._clock = parts.clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, until it ends."""
        agent, link = self._admitted(scope)
        connection = _upgraded(scope)
        if link is None:
            address = caller_of(scope).client.address
            await self._control(agent, Link(agent.id, connection), address)
        else:
            self._links.park(link, connection)
            await link.hold(connection)

    def _admitted(self, scope: Scope) -> tuple[AgentState, Link | None]:
        """Whose connection it is, and the link that it belongs to; `None`: it begins one.

        Raises:
            UnknownAgent: the agent has to register (again).
            HttpError: the link is over, or has enough connections (409).
        """
        agent = self._registry.get(scope["path_params"]["agent_id"])
        self._parts.machines.check(agent, scope)
        query = parse_qs(scope["query_string"].decode("latin-1"))
        session = query.get("session", [""])[0]
        if not session:
            return agent, None
        link = self._links.with_session(agent.id, session)
        if link is None or not link.has_room():
            raise HttpError(409, "this link is over, or has as many connections as it may")
        return agent, link

    # ── the control connection ────────────────────────────────────────────────────────────────

    async def _control(self, agent: AgentState, link: Link, address: str) -> None:
        try:
            async with OwnedTasks() as tasks:
                while line := await link.line():
                    if line.count(b",") > REPORT_COMMAS:
                        raise ValueError(f"it has too many values: the limit is {REPORT_COMMAS}")
                    report = _reports.decode(line)
                    if not self._take(agent, link, report, address):
                        break
                    if report.asks_reached:
                        tasks.start(self._answer_reached(agent, link))
            await link.close()
        except (msgspec.DecodeError, ValueError) as exc:
            link.send(LinkOrder(error=f"this is no line of a link: {exc}"))
            await link.close()
        finally:
            await self._end(agent, link)

    def _take(self, agent: AgentState, link: Link, report: LinkReport, address: str) -> bool:
        """Take what an agent reports; whether its link may go on."""
        now = self._clock.now()
        if isinstance(report.log, msgspec.Struct):
            self._parts.agent_logs.take(agent.id, report.log, now, self._clock.utc(now))
        if not isinstance(report.health, msgspec.Struct):
            return True
        try:
            if report.health.agent_id != agent.id:
                raise UnknownAgent(report.health.agent_id)
            reply = self._health.take(report.health, address)
        except (UnknownAgent, HttpError) as exc:
            # What runs over the link goes on, until the agent ends it.
            link.send(LinkOrder(error=str(exc), forgotten=isinstance(exc, UnknownAgent)))
            return True
        if self._links.find(agent.id) is not link:
            self._begin(agent, link, now)
        link.send(LinkOrder(session=link.session, reply=reply))
        return not report.health.leaving

    def _begin(self, agent: AgentState, link: Link, now: float) -> None:
        """The link is the agent's once a heartbeat over it was accepted."""
        self._links.add(link)
        self._registry.link(agent, now)
        log_event("agent's link is open", agent)
        self._dispatch.plan()

    async def _answer_reached(self, agent: AgentState, link: Link) -> None:
        """Tell an agent whether its port is reached after all."""
        try:
            await self._parts.monitor.version_at(url_of(agent.registration))
        except Unreachable:
            link.send(LinkOrder(reached=False))
        else:
            link.send(LinkOrder(reached=True))

    async def _end(self, agent: AgentState, link: Link) -> None:
        """The agent is gone: what runs there ends, and what is not sent yet goes elsewhere."""
        if self._links.remove(link):
            self._registry.unlink(agent, self._clock.now())
            if not agent.left:
                log_event("agent's link has ended", agent)
            if agent.registration.link:
                # Those that waited for a connection learn it first: they have not been sent.
                asyncio.get_running_loop().call_soon(self._lose, agent)
            self._dispatch.plan()
        asyncio.get_running_loop().call_soon(link.end)

    def _lose(self, agent: AgentState) -> None:
        for held in list(self._dispatch.held()):
            if held.agent is agent:
                held.lose(f"agent {agent.name} is gone: its link has ended")


def _upgraded(scope: Scope) -> LinkConnection:
    """The connection of a request, as one of a link.

    Raises:
        HttpError: the request asks for no WebSocket (426), or the server cannot change over (501).
    """
    exchange: Exchange | None = scope["state"].get(EXCHANGE)
    client: ClientConnection | None = scope["state"].get(CLIENT_CONNECTION)
    if exchange is None or client is None:
        raise HttpError(501, NO_HTTP1)
    headers = scope["headers"]
    key = first(headers, b"sec-websocket-key")
    if (first(headers, b"upgrade") or "").lower() != "websocket" or not key:
        raise HttpError(426, NO_UPGRADE)
    client.of_link = True
    answer = [
        (b"upgrade", b"websocket"),
        (b"connection", b"Upgrade"),
        (b"sec-websocket-accept", accept_of(key).encode()),
    ]
    return LinkConnection(exchange.hand_over(answer))
