"""`/api/pull`, `/api/push` and `/api/create`: models on the move, as one stream of progress."""

import json

from starlette.requests import Request

from ollama_coordinator.api.http.errors import HttpError, own_body
from ollama_coordinator.api.http.gojson import Fields, read_fields
from ollama_coordinator.api.http.json_edit import spliced
from ollama_coordinator.api.http.progress_response import Told
from ollama_coordinator.operations import (
    AgentCommand,
    Blobs,
    Chosen,
    Operations,
    Placement,
    TargetChooser,
    Uploads,
    digest_of,
)
from ollama_coordinator_common.error import InvalidModelName
from ollama_coordinator_common.names import ModelName

PLACEMENT = "x-ollama-coordinator-placement"
DETACH = "x-ollama-coordinator-detach"
"""Our own headers on Ollama's routes; `?placement=` and `?detach=` are the same."""


class TransferApi:
    """The handlers of the routes that report progress."""

    def __init__(
        self, operations: Operations, targets: TargetChooser, uploads: Uploads, blobs: Blobs
    ) -> None:
        self._operations = operations
        self._targets = targets
        self._uploads = uploads
        self._blobs = blobs

    async def pull(self, request: Request) -> Told:
        """`POST /api/pull`: onto every agent that the placement means."""
        fields = read_fields(await own_body(request), "api.PullRequest")
        name = fields.model()
        if not is_name(name):
            raise HttpError(400, "invalid model name")
        command = AgentCommand.pull(name, insecure=fields.flag("insecure"))
        stream = fields.flag("stream", default=True)
        placement = placement_of(request, self._targets.default)
        found = self._targets.for_pull(name, placement)
        return self._told(request, command, placement, found, stream=stream)

    async def push(self, request: Request) -> Told:
        """`POST /api/push`: from one agent that has the model, preferably one labelled `push`."""
        fields = read_fields(await own_body(request), "api.PushRequest")
        name = fields.model()
        if not name:
            raise HttpError(400, "model is required")
        ModelName.parse(name)
        command = AgentCommand.push(name, insecure=fields.flag("insecure"))
        stream = fields.flag("stream", default=True)
        agent = await self._targets.for_push(name)
        found = Chosen([agent])
        return self._told(request, command, self._targets.default, found, stream=stream)

    async def create(self, request: Request) -> Told:
        """`POST /api/create`: on the agents that have what it is made from."""
        body = await own_body(request)
        fields = read_fields(body, "api.CreateRequest")
        name, source = fields.model(), fields.text("from")
        if not is_name(name):
            raise HttpError(400, "invalid model name")
        stream = fields.flag("stream", default=True)
        streamed = spliced(body, {"stream": b"true"}) or _again(fields)
        command = AgentCommand.create(name, streamed, _blobs(fields))
        placement = placement_of(request, self._targets.default)
        found = await self._targets.for_create(name, source, placement)
        absent = [digest for digest in command.blobs if self._uploads.size(digest) is None]
        if absent:
            found = await self._blobs.arrange(found, absent, command.key)
        return self._told(request, command, placement, found, stream=stream)

    def _told(
        self,
        request: Request,
        command: AgentCommand,
        placement: Placement,
        found: Chosen,
        *,
        stream: bool,
    ) -> Told:
        operation = self._operations.start(
            command,
            found.chosen,
            placement=placement,
            spare=found.spare,
            detached=_wants_detached(request),
        )
        return Told(self._operations, operation, stream=stream)


def placement_of(request: Request, default: Placement) -> Placement:
    """Where a request wants it, else where the operator does.

    Raises:
        WrongPlacement: the request's wish is not understood.
    """
    wish = request.headers.get(PLACEMENT) or request.query_params.get("placement")
    return Placement.parse(wish) if wish else default


def _wants_detached(request: Request) -> bool:
    wish = request.headers.get(DETACH) or request.query_params.get("detach") or ""
    return wish.strip().lower() in ("1", "true", "yes", "on")


def is_name(text: str) -> bool:
    """Whether a model can have this name."""
    try:
        ModelName.parse(text)
    except InvalidModelName:
        return False
    return True


def _again(fields: Fields) -> bytes:
    """The body encoded anew, for one that only Go's decoder reads."""
    return json.dumps({**fields.values, "stream": True}).encode()


def _blobs(fields: Fields) -> tuple[str, ...]:
    """Every uploaded file that the model is made from."""
    names = ("files", "adapters", "draft_files")
    wanted = [digest for name in names for digest in fields.digests(name).values()]
    return tuple(dict.fromkeys(digest_of(digest) for digest in wanted))
