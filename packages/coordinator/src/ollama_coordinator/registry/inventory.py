"""The models of one agent, read from its Ollama's own lists.

The rows stay as Ollama wrote them (`raw`), so that what the fleet answers for `/api/tags` keeps
every field, known here or not; only what routing needs is decoded.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import msgspec
from msgspec import Raw, Struct

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


_rows = msgspec.json.Decoder(_Rows)
_available = msgspec.json.Decoder(AvailableModel)
_loaded = msgspec.json.Decoder(LoadedModel)


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

    def read_tags(self, tags: bytes, blobs: Mapping[str, str]) -> bool:
        """Take over a body of `/api/tags`; whether anything on disk differs from before.

        Raises:
            msgspec.DecodeError: the body is not Ollama's list.
        """
        if tags == self.tags and blobs == self.blobs:
            return False
        rows = [(Raw(row), _available.decode(row)) for row in _rows.decode(tags).models or ()]
        digests = {_key(name): blob for name, blob in blobs.items()}
        self.available = {
            key: AvailableRow(key, model, bytes(raw), digests.get(key, ""))
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
        rows = [(Raw(row), _loaded.decode(row)) for row in _rows.decode(ps).models or ()]
        before = set(self.loaded)
        self.loaded = {
            key: LoadedRow(key, model, bytes(raw))
            for raw, model in rows
            if (key := _key(model.name))
        }
        self.ps = ps
        return before != set(self.loaded)

    def note_loaded(self, key: str) -> None:
        """A request of this model just finished here, so it is in memory until a list says no."""
        row = self.available.get(key)
        if row is not None and key not in self.loaded:
            self.loaded[key] = LoadedRow(key, LoadedModel(row.model.name, row.model.digest))
            self.ps = b""

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
        """Whether the model is in memory, also under another name of the same weights."""
        if key in self.loaded:
            return True
        row = self.available.get(key)
        if row is None or not row.blob:
            return False
        return any(
            other.blob == row.blob
            for name in self.loaded
            if (other := self.available.get(name)) is not None
        )


def _key(name: str) -> str:
    """The routing key of a listed name; empty for one that no client could ask for."""
    try:
        return model_key(name)
    except InvalidModelName:
        return ""
