"""One machine's Ollama without its sockets: what is on disk, in memory, wrong, and seen."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .disk import DiskStore
from .engine import Engine
from .faults import Faults
from .gate import Gate
from .hardware import Hardware
from .models import Model, Store
from .script import AnswerFunction
from .seen import Seen

VERSION = "0.33.0"


@dataclass
class Settings:
    """How the node is set up; most are Ollama's own environment variables."""

    version: str = VERSION
    slots: int = 1  # OLLAMA_NUM_PARALLEL
    max_loaded_models: int = 3
    max_queue: int = 512
    keep_alive: float = 300.0
    default_context: int | None = None  # None: by memory
    origins: Sequence[str] = ()  # OLLAMA_ORIGINS, `*` as a wildcard
    cloud_disabled: bool = True
    signed_in_as: str | None = None
    cloud_models: Sequence[str] = ()  # what ollama.com runs for those that are signed in
    evaluates_on: bool = True  # prompts whose client has left, as until 0.30
    download_bytes_per_second: float = float("inf")
    models_path: str = "/usr/share/ollama/.ollama/models"  # OLLAMA_MODELS
    on_disk: bool = False  # models are files in models_path, which others may read and write
    may_push: bool = True
    lacks: Sequence[str] = ()  # routes an older version does not have yet: 404
    answer: AnswerFunction | None = None

    def since(self, version: str) -> bool:
        """Whether what came with that version of Ollama is there."""
        return _numbers(self.version) >= _numbers(version)

    def blob_path(self, digest: str) -> str:
        return f"{self.models_path}/blobs/{digest.replace(':', '-')}"


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


@dataclass
class Node:
    """What the routes work on."""

    settings: Settings
    hardware: Hardware
    store: Store
    registry: Store  # what can be pulled
    seen: Seen
    gate: Gate
    faults: Faults
    engine: Engine
    audible: asyncio.Event = field(default_factory=asyncio.Event)  # cleared by a black hole

    @classmethod
    def build(
        cls,
        settings: Settings,
        hardware: Hardware,
        models: Iterable[Model],
        registry: Iterable[Model],
        faults: Faults,
    ) -> Node:
        seen = Seen()
        gate = Gate(seen)

        def load_failure(model: Model) -> str | None:
            hit = faults.pick(("load",), model=model.name)
            return hit.fault.text if hit else None

        engine = Engine(
            hardware=hardware,
            seen=seen,
            gate=gate,
            slots=settings.slots,
            max_loaded_models=settings.max_loaded_models,
            max_queue=settings.max_queue,
            keep_alive=settings.keep_alive,
            default_context=settings.default_context,
            evaluates_on=settings.evaluates_on,
            load_failure=load_failure,
        )
        return cls(
            settings=settings,
            hardware=hardware,
            store=DiskStore(Path(settings.models_path), models)
            if settings.on_disk
            else Store(models),
            registry=Store(registry),
            seen=seen,
            gate=gate,
            faults=faults,
            engine=engine,
        )
