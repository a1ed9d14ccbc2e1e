"""`/api/operations`: operations on models over the fleet."""

from datetime import datetime
from typing import Literal

from msgspec import Struct, field
from starlette.requests import Request
from starlette.responses import Response

from ollama_coordinator.access import caller_of
from ollama_coordinator.api.http.errors import HttpError, decode, reply
from ollama_coordinator.api.http.openapi import Media, Query, operation
from ollama_coordinator.api.http.progress_response import ProgressResponse
from ollama_coordinator.api.http.routing import tell
from ollama_coordinator.api.models.transfer import copies, delete_everywhere
from ollama_coordinator.operations import (
    FLEET,
    AgentCommand,
    Chosen,
    Operation,
    OperationKind,
    OperationView,
    Placement,
)
from ollama_coordinator.parts import Parts
from ollama_coordinator.registry import AgentState
from ollama_coordinator_common.names import ModelName, model_key
from ollama_coordinator_common.types import AgentId


class NewOperation(Struct, frozen=True, forbid_unknown_fields=True):
    """`POST /api/operations`. `placement`: for pull and load; `destination`: for copy.

    `from`: for a pull from other machines alone: `fleet`, or the name or the id of one of them.
    """

    kind: Literal["pull", "push", "copy", "delete", "load", "unload"]
    model: str
    placement: str | None = None
    destination: str = ""
    insecure: bool = False
    keep_alive: int | str | None = None
    origin: str = field(name="from", default="")


class PendingView(Struct, frozen=True):
    """One deferred operation: an agent carries it out when it is back."""

    agent_id: AgentId
    agent: str
    kind: OperationKind
    model: str
    since: datetime


class Overview(Struct, frozen=True):
    """`GET /api/operations`: operations, newest first; and the deferred ones."""

    operations: list[OperationView]
    pending: list[PendingView]


class OperationsApi:
    """The handlers of operations."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._operations = parts.operations
        self._targets = parts.targets

    @operation(takes=NewOperation, gives={202: OperationView}, errors=(404, 503), relays=True)
    async def start(self, request: Request) -> Response:
        """Start an operation on a model; a delete is answered when it has ended.

        An operation goes on whether a client follows it or not. A delete that fails on an agent is
        answered with the error.
        """
        wanted = await decode(NewOperation, request)
        ModelName.parse(wanted.model)
        for name in filter(None, (wanted.model, wanted.destination)):
            caller_of(request.scope).check_model(name)
        tell(request.scope, wanted.model, kind=wanted.kind)
        return reply((await self._start(wanted)).view(), 202)

    @operation(
        gives={200: Overview},
        query=(Query("agent", "only those that concern the agent with this id"),),
    )
    async def overview(self, request: Request) -> Response:
        """The operations under way and ended, newest first, and the deferred ones."""
        agent_id = request.query_params.get("agent")
        deferred = [
            PendingView(p.agent_id, self._name(p.agent_id), p.command.kind, p.command.name, p.since)
            for p in self._operations.pending()
            if agent_id in (None, p.agent_id)
        ]
        return reply(Overview(self._operations.views(agent_id), deferred))

    @operation(gives={200: OperationView}, errors=(404,))
    async def show(self, request: Request) -> Response:
        """One operation."""
        return reply(self._get(request).view())

    @operation(gives={200: Media("application/x-ndjson")}, errors=(404,), relays=True)
    async def follow(self, request: Request) -> ProgressResponse:
        """The progress of one operation in Ollama's format, until it ends."""
        return ProgressResponse(self._operations, self._get(request), stream=True)

    @operation(gives={200: OperationView}, errors=(404,))
    async def cancel(self, request: Request) -> Response:
        """End an operation; what has been done on the agents stays."""
        operation = self._get(request)
        self._operations.cancel(operation)
        await operation.feed.over()
        return reply(operation.view())

    def _get(self, request: Request) -> Operation:
        return self._operations.get(request.path_params["operation_id"])

    def _name(self, agent_id: AgentId) -> str:
        agent = self._parts.registry.find(agent_id)
        return agent_id if agent is None else agent.name

    # ── one of each kind ──────────────────────────────────────────────────────────────────────

    async def _start(self, wanted: NewOperation) -> Operation:
        given = wanted.placement
        placement = self._targets.default if given is None else Placement.parse(given)
        match OperationKind(wanted.kind):
            case OperationKind.PULL:
                if wanted.origin:
                    self._check_origin(wanted, await copies(self._parts, wanted.model))
                found = await self._targets.for_pull(
                    wanted.model, placement, insecure=wanted.insecure, origin=wanted.origin
                )
                command = AgentCommand.pull(
                    wanted.model, insecure=wanted.insecure, origin=wanted.origin
                )
                return self._begin(command, found, placement)
            case OperationKind.PUSH:
                agent = await self._targets.for_push(wanted.model)
                command = AgentCommand.push(wanted.model, insecure=wanted.insecure)
                return self._begin(command, Chosen([agent]), placement)
            case OperationKind.LOAD:
                one = Placement.parse(given or "1")
                return self._load(wanted, await self._targets.for_load(wanted.model, one), one)
            case OperationKind.UNLOAD:
                return self._unload(wanted.model, await copies(self._parts, wanted.model))
            case OperationKind.COPY:
                return await self._copy(wanted, placement)
            case _:
                return await delete_everywhere(self._parts, wanted.model)

    def _check_origin(self, wanted: NewOperation, holders: list[AgentState]) -> None:
        """Refuse a pull from where the model is not.

        Raises:
            HttpError: 404.
        """
        if wanted.origin != FLEET and not any(
            wanted.origin in (agent.id, agent.name) for agent in holders
        ):
            names = ", ".join(agent.name for agent in holders)
            text = f"agent '{wanted.origin}' does not have {wanted.model}; {names} has it"
            raise HttpError(404, text)

    async def _copy(self, wanted: NewOperation, placement: Placement) -> Operation:
        if not wanted.destination:
            raise HttpError(400, "destination is required for a copy")
        ModelName.parse(wanted.destination)
        holders = await copies(self._parts, wanted.model)
        command = AgentCommand.copy(wanted.model, wanted.destination)
        return self._begin(command, Chosen(holders), placement)

    def _load(
        self, wanted: NewOperation, agents: list[AgentState], placement: Placement
    ) -> Operation:
        row = agents[0].inventory.available[model_key(wanted.model)]
        embeds = "embedding" in row.model.capabilities
        command = AgentCommand.load(wanted.model, keep_alive=wanted.keep_alive, embeds=embeds)
        return self._begin(command, Chosen(agents), placement)

    def _unload(self, name: str, copies: list[AgentState]) -> Operation:
        key = model_key(name)
        loaded = [agent for agent in copies if agent.inventory.is_loaded(key)]
        return self._begin(AgentCommand.unload(name), Chosen(loaded or copies), Placement())

    def _begin(self, command: AgentCommand, found: Chosen, placement: Placement) -> Operation:
        return self._operations.start(
            command,
            found.chosen,
            placement=placement,
            spare=found.spare,
            left_out=found.left_out,
            detached=True,
        )
