"""`POST /api/show`: what a model is, told by any agent that has it, and remembered."""

from collections import OrderedDict

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from ollama_coordinator.agent_queries import AgentQueries, Answer
from ollama_coordinator.api.http.errors import JSON, HttpError, own_body
from ollama_coordinator.api.http.gojson import read_fields
from ollama_coordinator.registry import AgentState, Registry
from ollama_coordinator.scheduler import ModelNotFound
from ollama_coordinator_common.names import ModelName

from .cloud import Clouds

KEPT = 256
KEPT_BYTES = 1024 * 1024
"""A verbose answer may have tens of megabytes and is hardly asked for twice."""

ASKED_BYTES = 4096
"""A longer question is somebody's own template or system prompt, and not asked twice either."""

Question = tuple[str, str, str, bytes]
"""Routing key, digests of manifest and weights, and the body."""


class _Shown(Struct):
    parameters: str = ""


_shown = msgspec.json.Decoder(_Shown)


class Shows:
    """Asks one of the holders, and remembers the answer as long as the content is the same."""

    def __init__(self, asking: AgentQueries, registry: Registry) -> None:
        self._asking = asking
        self._registry = registry
        self._kept: OrderedDict[Question, bytes] = OrderedDict()

    async def show(self, name: str, body: bytes) -> tuple[int, bytes]:
        """Status and body of one holder's answer.

        Raises:
            InvalidModelName: no model can have this name.
            ModelNotFound: no agent has it.
            HoldersUnavailable: those that have it are away.
            Unreachable: none of them answered.
        """
        holders = await self._asking.holders(name)
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
            answer = await self._asking.first(holders, "POST", "/api/show", body)
            if answer.status != 404:
                return answer
            self._registry.note_missing(answer.agent, key)
            holders = [agent for agent in holders if agent is not answer.agent]
            if not holders:
                raise ModelNotFound(name)

    async def context_parameter(self, name: str) -> int | None:
        """The context that the model's own parameters ask for; `None` where they do not."""
        status, body = await self.show(name, msgspec.json.encode({"model": name}))
        lines = _shown.decode(body).parameters.splitlines() if status == 200 else []
        words = [line.split() for line in lines]
        values = [word[1] for word in words if len(word) == 2 and word[0] == "num_ctx"]
        return int(values[-1]) if values and values[-1].isdigit() else None


def _question(key: str, holder: AgentState, body: bytes) -> Question:
    row = holder.inventory.available[key]
    return key, row.model.digest, row.blob, body


class ShowApi:
    """The handler of `/api/show`, and what ollama.com tells of its models."""

    def __init__(self, shows: Shows, clouds: Clouds) -> None:
        self._shows = shows
        self._clouds = clouds

    async def show(self, request: Request) -> Response:
        """`POST /api/show`: 404 with the canonical name, as Ollama says it."""
        body = await own_body(request)
        name = read_fields(body, "api.ShowRequest").model()
        if not name:
            raise HttpError(400, "model is required")
        parsed = ModelName.parse(name)
        try:
            status, answer = await self._shows.show(name, body)
        except ModelNotFound as exc:
            if not parsed.runs_in_the_cloud:
                raise HttpError(404, f"model '{parsed.short}' not found") from exc
            told = await self.of_the_cloud("POST", "/api/show", body)
            status, answer = told.status, told.body
        return Response(answer, status, media_type=JSON)

    async def of_the_cloud(self, method: str, path: str, body: bytes = b"") -> Answer:
        """What ollama.com says of a model, asked through an agent.

        Raises:
            CloudDisabled: no agent may ask.
        """
        return await self._clouds.ask(method, path, body, what="remote model details are")
