"""The nouns of model operations: what is done, to which model, on which agents, how far it is.

OperationError
├── Refused           an agent's Ollama answered that it cannot
│   └── Lacking       it has no file of which the model is made
├── NoAgentForModel   the placement leaves no agent
└── UnknownOperation  no operation has this id
"""

from datetime import datetime
from enum import Enum

import msgspec
from msgspec import Struct, field

from ollama_coordinator_common.error import OllamaCoordinatorError
from ollama_coordinator_common.names import model_key
from ollama_coordinator_common.types import AgentId


class OperationError(OllamaCoordinatorError):
    """A model operation cannot be done."""


class Refused(OperationError):
    """An agent's Ollama answered that it cannot; `status` is its own, 500 in mid-stream."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Lacking(Refused):
    """An agent is to make a model of a file that neither it nor the coordinator has."""

    def __init__(self, agent_name: str, digest: str) -> None:
        text = f"agent {agent_name} does not have blob {digest}, nor does the coordinator"
        super().__init__(400, f"{text}; upload it (POST /api/blobs/{digest}) and create again")


class NoAgentForModel(OperationError):
    """The placement leaves no agent that could be asked now."""


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
    """Where an operation, or its part on one agent, stands."""

    WAITING = "waiting"
    """The agent is away; it goes on as soon as it is back."""
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    PENDING = "pending"
    """Nobody waits for it any more; it is done when the agent returns."""
    CANCELLED = "cancelled"

    @property
    def is_over(self) -> bool:
        """Whether nothing more happens of itself in this operation."""
        return self not in (OperationState.WAITING, OperationState.RUNNING)


class AgentCommand(Struct, frozen=True):
    """What one agent's Ollama is to do: a request to it. `blobs` it must have before."""

    kind: OperationKind
    name: str
    key: str
    method: str
    path: str
    body: str
    blobs: tuple[str, ...] = ()

    @classmethod
    def pull(cls, name: str, *, insecure: bool = False) -> "AgentCommand":
        """Fetch a model from a registry."""
        body = _text(model=name, insecure=insecure, stream=True)
        return cls(OperationKind.PULL, name, model_key(name), "POST", "/api/pull", body)

    @classmethod
    def push(cls, name: str, *, insecure: bool = False) -> "AgentCommand":
        """Upload a model to a registry."""
        body = _text(model=name, insecure=insecure, stream=True)
        return cls(OperationKind.PUSH, name, model_key(name), "POST", "/api/push", body)

    @classmethod
    def create(cls, name: str, body: bytes, blobs: tuple[str, ...]) -> "AgentCommand":
        """Build a model; `body` is the client's own, asking for a stream."""
        return cls(
            OperationKind.CREATE,
            name,
            model_key(name),
            "POST",
            "/api/create",
            body.decode(),
            blobs=blobs,
        )

    @classmethod
    def copy(cls, source: str, destination: str) -> "AgentCommand":
        """Give a model a second name."""
        body = _text(source=source, destination=destination)
        return cls(
            OperationKind.COPY, destination, model_key(destination), "POST", "/api/copy", body
        )

    @classmethod
    def delete(cls, name: str) -> "AgentCommand":
        """Remove a model from disk."""
        body = _text(model=name, name=name)
        return cls(OperationKind.DELETE, name, model_key(name), "DELETE", "/api/delete", body)

    @classmethod
    def load(
        cls, name: str, *, keep_alive: int | str | None = None, embeds: bool = False
    ) -> "AgentCommand":
        """Bring a model into memory; a model that embeds is not asked to generate."""
        fields: dict[str, object] = {"model": name}
        if keep_alive is not None:
            fields["keep_alive"] = keep_alive
        path = "/api/embed" if embeds else "/api/generate"
        return cls(OperationKind.LOAD, name, model_key(name), "POST", path, _text(**fields))

    @classmethod
    def unload(cls, name: str) -> "AgentCommand":
        """Drop a model from memory."""
        body = _text(model=name, keep_alive=0)
        return cls(OperationKind.UNLOAD, name, model_key(name), "POST", "/api/generate", body)


class DeferredCommand(Struct, frozen=True):
    """A deed that an agent still owes, kept across restarts."""

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


def _text(**fields: object) -> str:
    return msgspec.json.encode(fields).decode()
