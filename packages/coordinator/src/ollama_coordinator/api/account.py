"""What belongs to ollama.com: the cloud's state, the account of a key, search, recommendations.

A key belongs to one machine. The agents that speak for the fleet there are those that the operator
labelled `cloud`; where none is, the fleet is one Ollama that is not signed in.
"""

from collections.abc import Iterable

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from ollama_coordinator.asking import Answer, Asking
from ollama_coordinator.clock import Clock
from ollama_coordinator.registry import AgentState
from ollama_coordinator.upstream import Unreachable
from ollama_coordinator_common.types import AgentId

from .show import cloud_disabled
from .wire import JSON, HttpError, own_body, reply

CLOUD_LABEL = "cloud"
FRESH_SECONDS = 30.0
"""How long an agent's word on its cloud setting is believed; it changes by hand."""


class _Cloud(Struct, frozen=True):
    disabled: bool = True
    source: str = "none"


class _Status(Struct, frozen=True):
    cloud: _Cloud = _Cloud()


_status = msgspec.json.Decoder(_Status)


class AccountApi:
    """The handlers of the routes that lead to ollama.com."""

    def __init__(self, asking: Asking, clock: Clock) -> None:
        self._asking = asking
        self._clock = clock
        self._clouds: dict[AgentId, tuple[float, _Cloud]] = {}

    async def status(self, request: Request) -> Response:
        """`GET /api/status`: the cloud is disabled when it is so on every agent."""
        clouds = await self._ask_clouds(self._asking.routable())
        enabled = next((cloud for cloud in clouds.values() if not cloud.disabled), None)
        disabled = next(iter(clouds.values()), _Cloud(source="config"))
        return reply(_Status(enabled or disabled))

    async def me(self, request: Request) -> Response:
        """`POST /api/me`: the account of the agents labelled `cloud`; else not signed in."""
        agents = self._designated()
        if not agents:
            raise HttpError(401, "unauthorized")
        return _passed_on(await self._asking.first(agents, "POST", "/api/me"))

    async def signout(self, request: Request) -> Response:
        """`POST /api/signout`, `DELETE /api/user/keys/{key}`: not for a client of the fleet."""
        raise HttpError(403, "a fleet has no account of its own; sign out on the machine itself")

    async def web(self, request: Request) -> Response:
        """`POST /api/experimental/web_search` and `web_fetch`: by an agent with the cloud on."""
        body = await own_body(request)
        agents = self._designated() or self._asking.routable()
        clouds = await self._ask_clouds(agents)
        able = [agent for agent in agents if agent.id in clouds and not clouds[agent.id].disabled]
        if not able:
            raise cloud_disabled("web search and fetch are unavailable")
        return _passed_on(await self._asking.first(able, "POST", request.url.path, body))

    async def recommendations(self, request: Request) -> Response:
        """`GET /api/experimental/model-recommendations`: any agent's, else none."""
        try:
            answer = await self._asking.first(self._asking.routable(), "GET", request.url.path)
        except Unreachable:
            return reply({"recommendations": []})
        return _passed_on(answer) if answer.status == 200 else reply({"recommendations": []})

    def _designated(self) -> list[AgentState]:
        return [agent for agent in self._asking.routable() if CLOUD_LABEL in agent.settings.labels]

    async def _ask_clouds(self, agents: Iterable[AgentState]) -> dict[AgentId, _Cloud]:
        """What agents say of their cloud setting; those that do not answer say nothing."""
        now = self._clock.now()
        wanted = list(agents)
        stale = [
            agent
            for agent in wanted
            if now - self._clouds.get(agent.id, (float("-inf"),))[0] > FRESH_SECONDS
        ]
        for answer in await self._asking.each(stale, "GET", "/api/status"):
            if isinstance(answer, Answer):
                self._clouds[answer.agent.id] = (now, _read(answer))
        known = {agent.id for agent in wanted} & self._clouds.keys()
        return {agent_id: self._clouds[agent_id][1] for agent_id in sorted(known)}


def _read(answer: Answer) -> _Cloud:
    """An Ollama too old for the route has no cloud."""
    try:
        return _status.decode(answer.body).cloud if answer.status == 200 else _Cloud()
    except msgspec.DecodeError:
        return _Cloud()


def _passed_on(answer: Answer) -> Response:
    return Response(answer.body, answer.status, media_type=JSON)
