"""`/api/agents/{id}/log`: an agent's own log, for who looks and from the agent that sends it."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ollama_coordinator.agent_logs import AgentLogs, LogView
from ollama_coordinator.api.http.errors import decode, reply
from ollama_coordinator.api.http.openapi import operation
from ollama_coordinator.clock import Clock
from ollama_coordinator.registry import Registry
from ollama_coordinator_common.protocol import LogReport

_report = msgspec.json.Decoder(LogReport)


class AgentLogApi:
    """The handlers of the agents' logs."""

    def __init__(self, registry: Registry, logs: AgentLogs, clock: Clock) -> None:
        self._registry = registry
        self._logs = logs
        self._clock = clock

    @operation("An agent's own log, while somebody looks", gives={200: LogView}, errors=(404,))
    async def show(self, request: Request) -> Response:
        """`GET`: what is known of it; a first question is what makes the agent send it."""
        agent = self._registry.get(request.path_params["agent_id"])
        sends = agent.registration.agent_version is not None
        return reply(self._logs.look(agent.id, self._clock.now(), sends=sends))

    @operation(
        "Send what was asked for of an agent's log",
        takes=LogReport,
        gives={204: None},
        errors=(404,),
    )
    async def take(self, request: Request) -> Response:
        """`POST`: the agent sends what was wanted."""
        agent = self._registry.get(request.path_params["agent_id"])
        report = await decode(_report, request)
        now = self._clock.now()
        self._logs.take(agent.id, report, now, self._clock.utc(now))
        return Response(status_code=204)
