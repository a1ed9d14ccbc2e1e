"""`POST /api/show`: what a model is, from one of its holders."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ollama_coordinator.access import caller_of
from ollama_coordinator.api.http.errors import JSON, HttpError, own_body
from ollama_coordinator.api.http.json_edit import edited, fields_of
from ollama_coordinator.parts import Parts
from ollama_coordinator.scheduler import ModelNotFound
from ollama_coordinator_common.names import ModelName


class ShowApi:
    """The handler of `/api/show`."""

    def __init__(self, parts: Parts) -> None:
        self._model_info = parts.model_info
        self._cloud = parts.cloud
        self._aliases = parts.aliases
        self._turn = parts.reading

    async def show(self, request: Request) -> Response:
        """`POST /api/show`: 404 with the canonical name, as Ollama says it."""
        body = await own_body(request)
        fields = await fields_of(body, "api.ShowRequest", self._turn)
        name = fields.model()
        fields.flag("verbose")
        for field in ("system", "template"):
            fields.text(field)
        fields.mapping("options")
        if not name.strip():
            raise HttpError(400, "model is required")
        caller, alias = caller_of(request.scope), self._aliases.find(name)
        if alias is not None:
            models = self._aliases.usable(alias, caller)
            name = self._aliases.first_held(alias, caller) or models[0]
            body = bytes(await edited(body, {"model": msgspec.json.encode(name)}) or body)
        parsed = ModelName.parse(name)
        caller.check_model(name)
        try:
            status, answer = await self._model_info.show(name, body)
        except ModelNotFound as exc:
            if not parsed.runs_in_the_cloud:
                raise HttpError(404, f"model '{parsed.short}' not found") from exc
            of_the_cloud = await self._cloud.ask_of_model("POST", "/api/show", body)
            status, answer = of_the_cloud.status, of_the_cloud.body
        return Response(answer, status, media_type=JSON)
