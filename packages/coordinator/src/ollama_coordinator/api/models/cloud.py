"""The routes that lead to ollama.com: cloud state, account, search, recommendations."""

from starlette.requests import Request
from starlette.responses import Response

from ollama_coordinator.agent_queries import Answer, CloudSetting, CloudStatus
from ollama_coordinator.api.http.errors import JSON, HttpError, own_body, reply
from ollama_coordinator.parts import Parts
from ollama_coordinator.upstream import Unreachable

NO_ACCOUNT = (
    "a fleet has no account of its own: run `ollama signin` on one of its machines and give that"
    " agent the label cloud, or use that machine's own Ollama (OLLAMA_HOST) for this command"
)


class CloudApi:
    """The handlers of the routes that lead to ollama.com."""

    def __init__(self, parts: Parts) -> None:
        self._cloud = parts.cloud
        self._queries = parts.queries

    async def status(self, request: Request) -> Response:
        """`GET /api/status`: the cloud is disabled when it is so on every agent."""
        settings = await self._cloud.settings(self._queries.routable())
        enabled = next((one for one in settings.values() if not one.disabled), None)
        disabled = next(iter(settings.values()), CloudSetting(source="config"))
        return reply(CloudStatus(enabled or disabled))

    async def me(self, request: Request) -> Response:
        """`POST /api/me`: the account of the agents labelled `cloud`.

        Without one 403: on Ollama's 401 the command line ends well and says nothing.
        """
        agents = self._cloud.designated()
        if not agents:
            raise HttpError(403, NO_ACCOUNT)
        return _passed_on(await self._queries.first(agents, "POST", "/api/me"))

    async def signout(self, request: Request) -> Response:
        """`POST /api/signout`, `DELETE /api/user/keys/{key}`: not for a client of the fleet."""
        raise HttpError(403, "a fleet has no account of its own; sign out on the machine itself")

    async def web(self, request: Request) -> Response:
        """`POST /api/experimental/web_search` and `web_fetch`: by an agent with the cloud on."""
        body = await own_body(request)
        path = request.url.path
        subject = f"web {'search' if path.endswith('search') else 'fetch'} is"
        return _passed_on(await self._cloud.ask("POST", path, body, subject=subject))

    async def recommendations(self, request: Request) -> Response:
        """`GET /api/experimental/model-recommendations`: any agent's, else none."""
        try:
            answer = await self._queries.first(self._queries.routable(), "GET", request.url.path)
        except Unreachable:
            return reply({"recommendations": []})
        return _passed_on(answer) if answer.status == 200 else reply({"recommendations": []})


def _passed_on(answer: Answer) -> Response:
    return Response(answer.body, answer.status, media_type=JSON)
