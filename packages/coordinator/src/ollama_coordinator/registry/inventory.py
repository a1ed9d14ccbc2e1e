"""The models of one agent, read from its Ollama's own lists.

The rows stay as Ollama wrote them (`raw`), so that what the fleet answers for `/api/tags` keeps
every field, known here or not; only what routing needs is decoded.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
from msgspec import Raw, Struct, structs

from ollama_coordinator_common.error import InvalidModelName
from ollama_coordinator_common.names import model_key
from ollama_coordinator_common.types import AvailableModel, LoadedModel


class AvailableRow(Struct, frozen=True):
    """A model on an agent's disk: its routing key, what routing reads, and Ollama's own row."""

    key: str
    model: AvailableModel
    raw: bytes
    blob: str = ""

    @property
    def identity(self) -> str:
        """What tells two contents of one name apart: the digest of the weights where known."""
        return self.blob or self.model.digest


class LoadedRow(Struct, frozen=True):
    """A model in an agent's memory; `raw` is `None` when it is inferred from a finished request."""

    key: str
    model: LoadedModel
    raw: bytes | None = None


class _Rows(Struct):
    models: list[Raw] | None = None


class _Named(Struct):
    name: str


_rows = msgspec.json.Decoder(_Rows)
_available = msgspec.json.Decoder(AvailableModel)
_loaded = msgspec.json.Decoder(LoadedModel)
_named = msgspec.json.Decoder(_Named)

Model = TypeVar("Model", AvailableModel, LoadedModel)


@dataclass(slots=True)
class Inventory:
    """What one agent has on disk and in memory, by routing key.

    `sampled_at` is when the lists were last read (monotonic seconds), `None` before the first time.
    """

    available: dict[str, AvailableRow] = field(default_factory=dict)
    loaded: dict[str, LoadedRow] = field(default_factory=dict)
    sampled_at: float | None = None
    tags: bytes = b""
    ps: bytes = b""
    blobs: Mapping[str, str] = field(default_factory=dict)
    offered: dict[str, AvailableRow] = field(default_factory=dict)

    @property
    def servable(self) -> Mapping[str, AvailableRow]:
        """What is on disk, and what ollama.com runs for this agent by name alone."""
        return {**self.offered, **self.available} if self.offered else self.available

    def read_tags(self, tags: bytes, blobs: Mapping[str, str]) -> bool:
        """Take over a body of `/api/tags`; whether anything on disk differs from before.

        Raises:
            msgspec.DecodeError: the body is not Ollama's list.
        """
        if tags == self.tags and blobs == self.blobs:
            return False
        rows = _read(tags, _available, AvailableModel)
        digests = {_key(name): blob for name, blob in blobs.items()}
        self.available = {
            key: AvailableRow(key, model, raw, digests.get(key, ""))
            for raw, model in rows
            if (key := _key(model.name))
        }
        self.tags, self.blobs = tags, dict(blobs)
        return True

    def read_ps(self, ps: bytes) -> bool:
        """Take over a body of `/api/ps`; whether anything in memory differs from before.

        Raises:
            msgspec.DecodeError: the body is not Ollama's list.
        """
        if ps == self.ps:
            return False
        rows = _read(ps, _loaded, LoadedModel)
        before = {key: row.model.context_length for key, row in self.loaded.items()}
        self.loaded = {
            key: LoadedRow(key, model, raw) for raw, model in rows if (key := _key(model.name))
        }
        self.ps = ps
        return before != {key: row.model.context_length for key, row in self.loaded.items()}

    def note_loaded(self, key: str, context_length: int | None = None) -> bool:
        """A request of this model just finished here, so it is in memory until a list says no.

        `context_length` is what it asked for, if anything. Whether this is news.
        """
        known, row = self.runner(key), self.available.get(key)
        if known is None and row is not None:
            known = LoadedRow(key, LoadedModel(row.model.name, row.model.digest))
        elif known is None or context_length in (None, known.model.context_length):
            return False
        model = known.model
        if context_length is not None:
            model = structs.replace(model, context_length=context_length)
        self.loaded[known.key] = structs.replace(known, model=model)
        self.ps = b""
        return True

    @property
    def is_inferred(self) -> bool:
        """Whether what is in memory was concluded from requests since the last list."""
        return bool(self.loaded) and not self.ps

    def note_unloaded(self, keys: Iterable[str]) -> None:
        """The models were asked to leave memory."""
        for key in keys:
            if self.loaded.pop(key, None) is not None:
                self.ps = b""

    def note_missing(self, key: str) -> None:
        """The agent itself said that it does not have this model; until its next list."""
        if self.available.pop(key, None) is not None:
            self.tags = b""
        self.note_unloaded([key])

    def is_loaded(self, key: str) -> bool:
        """Whether the model is in memory, also under another name of the same weights.

        One that ollama.com runs always is, there.
        """
        return key in self.offered or self.runner(key) is not None

    def runner(self, key: str) -> LoadedRow | None:
        """What has the model in memory: its own row, or that of another name of its weights."""
        mine = self.available.get(key)
        if key in self.loaded or mine is None or not mine.blob:
            return self.loaded.get(key)
        for name, row in self.loaded.items():
            other = self.available.get(name)
            if other is not None and other.blob == mine.blob:
                return row
        return None

    def namesakes(self, key: str) -> list[str]:
        """The routing keys of every name that shares the model's weights, itself included."""
        row = self.available.get(key)
        if row is None or not row.blob:
            return [key]
        return [name for name, other in self.available.items() if other.blob == row.blob]


def _read(
    body: bytes, decoder: msgspec.json.Decoder[Model], kind: type[Model]
) -> list[tuple[bytes, Model]]:
    """The rows of a list, each as it came and as routing reads it; one without a name is left out.

    Raises:
        msgspec.DecodeError: the body is not Ollama's list.
    """
    try:
        body.decode()  # the database keeps it as text
        rows = [bytes(row) for row in _rows.decode(body).models or ()]
        return [(row, model) for row in rows if (model := _model(row, decoder, kind)) is not None]
    except (UnicodeDecodeError, RecursionError) as exc:
        raise msgspec.DecodeError(str(exc)) from exc


def _model(row: bytes, decoder: msgspec.json.Decoder[Model], kind: type[Model]) -> Model | None:
    """One row; by its name alone where another field is not what it should be."""
    try:
        return decoder.decode(row)
    except msgspec.DecodeError:
        pass
    try:
        return kind(name=_named.decode(row).name)
    except msgspec.DecodeError:
        return None


def _key(name: str) -> str:
    """The routing key of a listed name; empty for one that no client could ask for."""
    try:
        return model_key(name)
    except InvalidModelName:
        return ""
