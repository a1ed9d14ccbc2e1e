"""Types of model operations: the request to one agent, the state, the views, the errors.

OperationError
├── Refused           an agent's Ollama answered with an error
│   ├── Replaced      a newer command for the model made this one void
│   └── MissingBlob   neither the agent nor the coordinator has a file of the model
├── NoAgentForModel   the placement leaves no agent
└── UnknownOperation  no operation has this id
"""

from datetime import datetime
from enum import Enum

import msgspec
from msgspec import Struct, field, structs

from ollama_coordinator_common.error import OllamaCoordinatorError
from ollama_coordinator_common.names import is_name, model_key
from ollama_coordinator_common.types import AgentId


class OperationError(OllamaCoordinatorError):
    """A model operation cannot be done."""


class Refused(OperationError):
    """An agent's Ollama answered with an error; `status` is its own, 500 in mid-stream."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Replaced(Refused):
    """A newer command for the model made this one void."""

    def __init__(self, kind: "OperationKind") -> None:
        super().__init__(409, f"a newer {kind.value} of the model takes its place")


class MissingBlob(Refused):
    """An agent needs a file for a model, and neither the agent nor the coordinator has it."""

    def __init__(self, agent_name: str, digest: str) -> None:
        text = f"agent {agent_name} does not have blob {digest}, nor does the coordinator"
        super().__init__(400, f"{text}; upload it (POST /api/blobs/{digest}) and create again")


class NoAgentForModel(OperationError):
    """The placement leaves no agent that can be reached now."""


class UnknownOperation(OperationError):
    """No operation has this id."""

    def __init__(self, operation_id: str) -> None:
        super().__init__(f"operation '{operation_id}' is not known; GET /api/operations lists them")


class OperationKind(Enum):
    """What is done to a model."""

    PULL = "pull"
    PUSH = "push"
    CREATE = "create"
    COPY = "copy"
    DELETE = "delete"
    LOAD = "load"
    UNLOAD = "unload"

    @property
    def streams(self) -> bool:
        """Whether Ollama reports progress line by line."""
        return self in (OperationKind.PULL, OperationKind.PUSH, OperationKind.CREATE)


class OperationState(Enum):
    """The state of an operation, or of its part on one agent."""

    WAITING = "waiting"
    """The agent is away; its part starts as soon as it is back."""
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    PENDING = "pending"
    """Deferred: the operation ends without this agent, which does its part when it is back."""
    CANCELLED = "cancelled"
    LEFT_OUT = "left out"
    """The agent has no room for the model, or could not run it: nothing was begun there."""

    @property
    def is_over(self) -> bool:
        """Whether the operation waits for it no longer."""
        return self not in (OperationState.WAITING, OperationState.RUNNING)


class AgentCommand(Struct, frozen=True):
    """One request to an agent's Ollama. The agent needs the files `blobs` (digests) before it.

    `name` is the model's name as the client wrote it, `key` its routing key. `origin` is where a
    pull takes the model from: the internet if empty, `fleet` for the other machines alone, or the
    name or the id of one of them.
    """

    kind: OperationKind
    name: str
    key: str
    method: str
    path: str
    body: str
    blobs: tuple[str, ...] = ()
    origin: str = ""

    def is_like(self, other: "AgentCommand") -> bool:
        """Whether both do the same to the same model, however they spell its name."""
        if (self.kind, self.key, self.origin) != (other.kind, other.key, other.origin):
            return False
        return self == other or self._options() == other._options()

    def _options(self) -> dict[str, object]:
        fields = msgspec.json.decode(self.body, type=dict[str, object])
        return {name: value for name, value in fields.items() if name not in ("model", "name")}

    @classmethod
    def _post(
        cls, kind: OperationKind, name: str, path: str, fields: dict[str, object]
    ) -> "AgentCommand":
        body = msgspec.json.encode(fields).decode()
        return cls(kind, name, model_key(name), "POST", path, body)

    @classmethod
    def pull(cls, name: str, *, insecure: bool = False, origin: str = "") -> "AgentCommand":
        """Download a model from a model registry, or from other machines of the fleet."""
        fields = {"model": name, "insecure": insecure, "stream": True}
        command = cls._post(OperationKind.PULL, name, "/api/pull", fields)
        return structs.replace(command, origin=origin)

    @classmethod
    def push(cls, name: str, *, insecure: bool = False) -> "AgentCommand":
        """Upload a model to a model registry; Ollama has its own words for a name that is none."""
        fields = {"model": name, "insecure": insecure, "stream": True}
        body = msgspec.json.encode(fields).decode()
        key = model_key(name) if is_name(name) else name
        return cls(OperationKind.PUSH, name, key, "POST", "/api/push", body)

    @classmethod
    def create(cls, name: str, body: bytes, blobs: tuple[str, ...]) -> "AgentCommand":
        """Create a model; `body` is the client's, with `stream` true."""
        key, text = model_key(name), body.decode()
        return cls(OperationKind.CREATE, name, key, "POST", "/api/create", text, blobs)

    @classmethod
    def copy(cls, source: str, destination: str) -> "AgentCommand":
        """Give a model a second name."""
        fields: dict[str, object] = {"source": source, "destination": destination}
        return cls._post(OperationKind.COPY, destination, "/api/copy", fields)

    @classmethod
    def delete(cls, name: str) -> "AgentCommand":
        """Delete a model from disk; older Ollamas read `name` in place of `model`."""
        body = msgspec.json.encode({"model": name, "name": name}).decode()
        return cls(OperationKind.DELETE, name, model_key(name), "DELETE", "/api/delete", body)

    @classmethod
    def load(
        cls, name: str, *, keep_alive: int | str | None = None, embeds: bool = False
    ) -> "AgentCommand":
        """Load a model into memory; an embedding model (`embeds`) cannot generate."""
        fields: dict[str, object] = {"model": name}
        if keep_alive is not None:
            fields["keep_alive"] = keep_alive
        path = "/api/embed" if embeds else "/api/generate"
        return cls._post(OperationKind.LOAD, name, path, fields)

    @classmethod
    def unload(cls, name: str) -> "AgentCommand":
        """Unload a model from memory."""
        fields: dict[str, object] = {"model": name, "keep_alive": 0}
        return cls._post(OperationKind.UNLOAD, name, "/api/generate", fields)


class DeferredCommand(Struct, frozen=True):
    """A command for an agent that is away; it is kept across restarts of the coordinator.

    Databases of earlier versions hold the command as `deed`.
    """

    agent_id: AgentId
    command: AgentCommand = field(name="deed")
    since: datetime


class TargetView(Struct, frozen=True):
    """One agent's part of an operation, as the API shows it; bytes of all layers it reported."""

    agent_id: AgentId
    agent: str
    state: OperationState
    status: str = ""
    completed: int = 0
    total: int = 0
    error: str | None = None


class OperationView(Struct, frozen=True):
    """An operation as the API shows it; times are UTC."""

    id: str
    kind: OperationKind
    model: str
    state: OperationState
    started_at: datetime
    placement: str
    detached: bool
    targets: list[TargetView]
    ended_at: datetime | None = None
    error: str | None = None
