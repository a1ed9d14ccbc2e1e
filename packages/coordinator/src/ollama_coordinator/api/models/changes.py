"""`/api/copy` and `/api/delete`: done on every agent that has the model, also by those away."""

from starlette.requests import Request
from starlette.responses import Response

from ollama_coordinator.agent_queries import AgentQueries
from ollama_coordinator.api.http.errors import HttpError, own_body
from ollama_coordinator.api.http.gojson import read_fields
from ollama_coordinator.db import Store
from ollama_coordinator.operations import (
    AgentCommand,
    Operation,
    Operations,
    OperationState,
    TargetChooser,
)
from ollama_coordinator.registry import AgentState, Registry
from ollama_coordinator.scheduler import ModelNotFound
from ollama_coordinator_common.names import model_key

from .transfer import is_name


class ChangesApi:
    """The handlers of the routes that change what is on disk, and say nothing when it worked."""

    def __init__(
        self,
        operations: Operations,
        targets: TargetChooser,
        asking: AgentQueries,
        registry: Registry,
        store: Store,
    ) -> None:
        self._operations = operations
        self._targets = targets
        self._asking = asking
        self._registry = registry
        self._store = store

    async def copy(self, request: Request) -> Response:
        """`POST /api/copy`: 200 with no body; agents that are away copy when they return."""
        fields = read_fields(await own_body(request), "api.CopyRequest")
        source, destination = fields.text("source"), fields.text("destination")
        for role, name in (("source", source), ("destination", destination)):
            if not is_name(name):
                raise HttpError(400, f'{role} "{name}" is invalid')
        try:
            await self._asking.holders(source)
        except ModelNotFound as exc:
            raise HttpError(404, f'model "{source}" not found') from exc
        holders = self._registry.holders(model_key(source))
        operation = self._operations.start(AgentCommand.copy(source, destination), holders)
        await self._settled(operation)
        return Response()

    async def delete(self, request: Request) -> Response:
        """`DELETE /api/delete`: 200 with no body; 404 only when no agent has it."""
        name = read_fields(await own_body(request), "api.DeleteRequest").model()
        if not name:
            raise HttpError(400, "model is required")
        if not is_name(name):
            raise HttpError(400, f'name "{name}" is invalid')
        await self.delete_everywhere(name)
        return Response()

    async def delete_everywhere(self, name: str) -> Operation:
        """Delete on every agent, whatever its content.

        Raises:
            HttpError: 404, no agent has it.
            Refused: an agent could not.
        """
        key = model_key(name)
        operation = self._operations.start(AgentCommand.delete(name), await self.copies(name))
        await self._settled(operation)
        for target in operation.targets.values():
            agent = self._registry.find(target.agent_id)
            if agent is not None and target.state is OperationState.PENDING:
                # It is as good as deleted: no list shows it any more.
                self._registry.note_missing(agent, key)
        return operation

    async def copies(self, name: str) -> list[AgentState]:
        """Every agent that has some content under this name.

        Raises:
            HttpError: 404, none has.
            HoldersUnavailable: those that have it are away, and so is everybody else.
        """
        copies = self._targets.copies(model_key(name))
        if copies:
            return copies
        try:
            return await self._asking.holders(name)
        except ModelNotFound as exc:
            raise HttpError(404, f"model '{name}' not found") from exc

    async def _settled(self, operation: Operation) -> None:
        """Wait for the end, and for debts to be on disk.

        Raises:
            Refused: an agent could not.
        """
        async with self._operations.followed(operation):
            await operation.feed.over()
        await self._store.flush()
        failed = [t for t in operation.targets.values() if t.state is OperationState.FAILED]
        if failed and failed[0].error is not None:
            raise failed[0].error
