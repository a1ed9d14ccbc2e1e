"""The types of the wire: agents, their machines, and the models on them."""

from datetime import datetime
from enum import Enum
from typing import Annotated, Any, NewType

from msgspec import Meta, Struct

AgentId = NewType("AgentId", str)

Port = Annotated[int, Meta(ge=1, le=65535)]
Percent = Annotated[float, Meta(ge=0)]
"""A share of 100; a machine with several cores may report more than 100 for one process."""


class AgentStatus(Enum):
    """The status of an agent; `offline`: silent for `AGENT_TIMEOUT`, or it said that it leaves."""

    ONLINE = "online"
    OFFLINE = "offline"
    DRAINING = "draining"


class Gpu(Struct, frozen=True, omit_defaults=True):
    """One accelerator; `None` is a reading that its driver does not have.

    `integrated`: a part of the processor without memory of its own, which Ollama uses only where it
    can; one of Apple's, which it always uses, is none.
    """

    name: str
    index: int = 0
    memory_total_bytes: int | None = None
    memory_used_bytes: int | None = None
    utilization_percent: float | None = None
    temperature_celsius: float | None = None
    integrated: bool = False


class RunnerSettings(Struct, frozen=True, omit_defaults=True):
    """How an Ollama was configured; `None` is unknown: Ollama's API has none of it."""

    num_parallel: Annotated[int, Meta(ge=1)] | None = None
    max_loaded_models: Annotated[int, Meta(ge=0)] | None = None
    max_queue: Annotated[int, Meta(ge=0)] | None = None
    context_length: Annotated[int, Meta(ge=0)] | None = None


class AvailableModel(Struct, frozen=True):
    """One row of Ollama's `/api/tags`, as far as we read it: a model on an agent's disk."""

    name: str
    digest: str = ""
    size: int = 0
    modified_at: datetime | None = None
    details: dict[str, Any] = {}
    capabilities: list[str] = []
    remote_host: str = ""


class LoadedModel(Struct, frozen=True):
    """One row of Ollama's `/api/ps`, as far as we read it: a model in an agent's memory."""

    name: str
    digest: str = ""
    size: int = 0
    size_vram: int = 0
    context_length: int | None = None
    expires_at: datetime | None = None
