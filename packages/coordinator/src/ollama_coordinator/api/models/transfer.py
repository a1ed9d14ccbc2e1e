"""Models on the move: pull, push, create, copy, delete, and the files that models are made from.

Pull, push and create answer with one stream of progress. Copy and delete are done on every agent
that has the model; agents that are away do so when they are back.
"""

import contextlib

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ollama_coordinator.access import caller_of
from ollama_coordinator.api.http.errors import ClientLeft, HttpError, error_reply, own_body
from ollama_coordinator.api.http.gojson import Fields
from ollama_coordinator.api.http.json_edit import edited, fields_of
from ollama_coordinator.api.http.progress_response import ProgressResponse
from ollama_coordinator.api.http.routing import tell
from ollama_coordinator.clock import Clock
from ollama_coordinator.operations import (
    AgentCommand,
    Chosen,
    Operation,
    OperationState,
    Placement,
    digest_of,
)
from ollama_coordinator.parts import Parts
from ollama_coordinator.registry import AgentState
from ollama_coordinator.scheduler import ModelNotFound
from ollama_coordinator_common.error import ConflictingSource, InvalidModelName
from ollama_coordinator_common.names import ModelName, is_name, model_key
from ollama_coordinator_common.printable import quoted

PLACEMENT = "x-ollama-coordinator-placement"
DETACH = "x-ollama-coordinator-detach"
"""Our own headers on Ollama's routes; `?placement=` and `?detach=` are the same."""

SILENCE_SECONDS = 5.0
"""How long a client may pause in a file that is not needed before its request ends."""


class TransferApi:
    """The handlers of Ollama's routes that change models on disks."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._operations = parts.operations
        self._targets = parts.targets
        self._uploads = parts.uploads
        self._blobs = parts.blobs

    async def pull(self, request: Request) -> ProgressResponse:
        """`POST /api/pull`: onto every agent that the placement means."""
        fields = await self._transfer_fields(request, "api.PullRequest")
        name, insecure = fields.model(), fields.flag("insecure")
        stream = fields.flag("stream", default=True)
        ModelName.parse(name)
        caller_of(request.scope).check_model(name)
        tell(request.scope, name)
        command = AgentCommand.pull(name, insecure=insecure)
        placement = placement_of(request, self._targets.default)
        found = await self._targets.for_pull(name, placement, insecure=insecure)
        return self._respond(request, command, placement, found, stream=stream)

    async def push(self, request: Request) -> ProgressResponse:
        """`POST /api/push`: from one agent that has the model, preferably one labelled `push`."""
        fields = await self._transfer_fields(request, "api.PushRequest")
        name, insecure = fields.model(), fields.flag("insecure")
        stream = fields.flag("stream", default=True)
        if not name:
            raise HttpError(400, "model is required")
        caller_of(request.scope).check_model(name)
        tell(request.scope, name)
        command = AgentCommand.push(name, insecure=insecure)
        agent = await self._targets.for_push(name)
        found = Chosen([agent])
        return self._respond(request, command, self._targets.default, found, stream=stream)

    async def create(self, request: Request) -> ProgressResponse:
        """`POST /api/create`: on the agents that have its source and its files."""
        body = await own_body(request)
        fields = await fields_of(body, "api.CreateRequest", self._parts.reading)
        name, source = fields.model(), fields.text("from")
        parts = [part for path in fields.digests("files") for part in path.split("/")]
        stream = fields.flag("stream", default=True)
        if not is_name(name) or name != name.strip():
            raise HttpError(400, "invalid model name")
        for wanted in filter(None, (name, source)):
            caller_of(request.scope).check_model(wanted)
        tell(request.scope, name, source=source)
        if any(part in ("", ".", "..") for part in parts):
            raise HttpError(400, "file path must be relative")
        streamed = bytes(await edited(body, {"stream": b"true"}) or b"{}")
        command = AgentCommand.create(name, streamed, _blobs(fields, source))
        placement = placement_of(request, self._targets.default)
        found = await self._targets.for_create(name, source, placement)
        absent = [digest for digest in command.blobs if self._uploads.size(digest) is None]
        if absent:
            found = await self._blobs.arrange(found, absent, command.key)
        return self._respond(request, command, placement, found, stream=stream)

    async def copy(self, request: Request) -> Response:
        """`POST /api/copy`: 200 with no body; agents that are away copy when they return."""
        fields = await self._fields(request, "api.CopyRequest")
        source, destination = fields.text("source"), fields.text("destination")
        for role, name in (("source", source), ("destination", destination)):
            if not is_name(name) or name != name.strip():  # other routes pass blanks over
                raise HttpError(400, f"{role} {quoted(name)} is invalid")
            caller_of(request.scope).check_model(name)
        tell(request.scope, source, destination=destination)
        try:
            await self._parts.queries.holders(source)
        except ModelNotFound as exc:
            raise HttpError(404, f"model {quoted(source)} not found") from exc
        holders = self._parts.registry.holders(model_key(source))
        operation = self._operations.start(AgentCommand.copy(source, destination), holders)
        await _settled(self._parts, operation)
        return Response()

    async def delete(self, request: Request) -> Response:
        """`DELETE /api/delete`: 200 with no body; 404 only when no agent has it."""
        name = (await self._fields(request, "api.DeleteRequest")).model()
        if not name.strip():
            raise HttpError(400, "model is required")
        try:
            ModelName.parse(name)
        except ConflictingSource:
            raise
        except InvalidModelName as exc:
            raise HttpError(400, f"name {quoted(name)} is invalid") from exc
        caller_of(request.scope).check_model(name)
        tell(request.scope, name)
        await delete_everywhere(self._parts, name)
        return Response()

    async def head_blob(self, request: Request) -> Response:
        """`HEAD /api/blobs/{digest}`: 200 if a model can be created from the file, else 404."""
        if await self._is_there(request):
            return Response()
        return error_reply(HttpError(404, "blob not found"))

    async def post_blob(self, request: Request) -> Response:
        """`POST /api/blobs/{digest}`: 201 for a new file; 200, unread, for a known one."""
        if await self._is_there(request):
            return Unread(self._parts.clock)
        try:
            await self._uploads.take(request.path_params["digest"], request.stream())
        except ClientDisconnect as exc:
            raise ClientLeft from exc
        return Response(status_code=201)

    async def _is_there(self, request: Request) -> bool:
        """Whether the file is here, or on every agent that would create a model of it."""
        digest = digest_of(request.path_params["digest"])
        if self._uploads.size(digest) is not None:
            self._uploads.touch(digest)
            return True
        return await self._blobs.suffice(digest, placement_of(request, self._targets.default))

    async def _fields(self, request: Request, go_type: str) -> Fields:
        return await fields_of(await own_body(request), go_type, self._parts.reading)

    async def _transfer_fields(self, request: Request, go_type: str) -> Fields:
        fields = await self._fields(request, go_type)
        for ignored in ("username", "password"):  # but for their type, as in Ollama
            fields.text(ignored)
        return fields

    def _respond(
        self,
        request: Request,
        command: AgentCommand,
        placement: Placement,
        found: Chosen,
        *,
        stream: bool,
    ) -> ProgressResponse:
        operation = self._operations.start(
            command,
            found.chosen,
            placement=placement,
            spare=found.spare,
            left_out=found.left_out,
            detached=_wants_detached(request),
        )
        return ProgressResponse(self._operations, operation, stream=stream)


def placement_of(request: Request, default: Placement) -> Placement:
    """The placement that a request asks for, else the operator's.

    Raises:
        WrongPlacement: the request's cannot be understood.
    """
    wish = request.headers.get(PLACEMENT) or request.query_params.get("placement")
    return Placement.parse(wish) if wish else default


def _wants_detached(request: Request) -> bool:
    wish = request.headers.get(DETACH) or request.query_params.get("detach") or ""
    return wish.strip().lower() in ("1", "true", "yes", "on")


def _blobs(fields: Fields, source: str) -> tuple[str, ...]:
    """Every uploaded file that the model is made from; beside a source, `files` do not count."""
    names = (*(() if source else ("files",)), "adapters", "draft_files")
    wanted = [digest for name in names for digest in fields.digests(name).values()]
    return tuple(dict.fromkeys(digest_of(digest) for digest in wanted))


async def delete_everywhere(parts: Parts, name: str) -> Operation:
    """Delete on every agent, whatever its content; agents that are away do not make it either.

    Raises:
        HttpError: 404, no agent has it.
        Refused: an agent could not.
    """
    key, agents = model_key(name), list[AgentState]()
    try:
        agents = await copies(parts, name)
    except HttpError:
        if not parts.operations.makes_later(key):
            raise
    operation = parts.operations.start(AgentCommand.delete(name), agents)
    await _settled(parts, operation)
    for target in operation.targets.values():
        agent = parts.registry.find(target.agent_id)
        if agent is not None and target.state is OperationState.PENDING:
            # It is as good as deleted: no list shows it any more.
            parts.registry.note_missing(agent, key)
    return operation


async def copies(parts: Parts, name: str) -> list[AgentState]:
    """Every agent that has some content under this name.

    Raises:
        HttpError: 404, none has.
        HoldersUnavailable: those that have it cannot be asked now.
    """
    found = parts.targets.copies(model_key(name))
    if found:
        return found
    try:
        return await parts.queries.holders(name)
    except ModelNotFound as exc:
        raise HttpError(404, f"model '{name}' not found") from exc


async def _settled(parts: Parts, operation: Operation) -> None:
    """Wait for the end, and for deferred operations to be on disk.

    Raises:
        Refused: an agent could not.
    """
    async with parts.operations.followed(operation):
        await operation.feed.over()
    await parts.store.flush()
    failed = [t for t in operation.targets.values() if t.state is OperationState.FAILED]
    if failed and failed[0].error is not None:
        raise failed[0].error


class Unread(Response):
    """200 at once, to a client that is still sending.

    The rest is thrown away: many clients read the answer only once they have sent everything, and
    closing their connection earlier would lose it.
    """

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, then read until the client has finished, left or paused too long."""
        headers = [(b"content-length", b"0")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"", "more_body": True})
        with contextlib.suppress(TimeoutError):
            more = True
            while more:
                async with self._clock.timeout(SILENCE_SECONDS):
                    message = await receive()
                more = message["type"] == "http.request" and message.get("more_body", False)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
