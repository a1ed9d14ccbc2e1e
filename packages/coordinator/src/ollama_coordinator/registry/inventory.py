"""The models of one agent, read from its Ollama's own lists.

Each row is kept as Ollama wrote it (`raw`), so that the fleet's `/api/tags` has every field, known
here or not. Only what routing needs is decoded.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
from msgspec import Raw, Struct, structs

from ollama_coordinator_common.error import InvalidModelName
from ollama_coordinator_common.names import model_key
from ollama_coordinator_common.tickets import is_passing
from ollama_coordinator_common.types import AvailableModel, LoadedModel

MOST_MODELS = 1000
"""Of one machine. Reading and indexing as many takes 20 ms, for which nothing else is done."""

MOST_VALUES = 20 * MOST_MODELS
"""Of objects and lists, or of commas, in one machine's list: Ollama's rows have five and twelve."""


class AvailableRow(Struct, frozen=True):
    """A model on an agent's disk: its routing key, what routing reads, and Ollama's own row.

    `blob` is the digest of its weights, `content` one of all its layers; empty where not known.
    """

    key: str
    model: AvailableModel
    raw: bytes
    blob: str = ""
    content: str = ""

    @property
    def identity(self) -> str:
        """What distinguishes two contents of one name: the digest of its layers if known."""
        return self.content or self.model.digest

    @property
    def embeds(self) -> bool:
        """Whether it only embeds; older versions of Ollama list no capabilities."""
        if self.model.capabilities:
            return "embedding" in self.model.capabilities and not self.completes
        return "bert" in str(self.model.details.get("family", ""))

    @property
    def completes(self) -> bool:
        """Whether it is known to write answers; such a model embeds with all its slots."""
        return "completion" in self.model.capabilities

    @property
    def writes_tokens(self) -> bool:
        """Whether it writes text or embeds it, as far as is known: not images alone."""
        known = self.model.capabilities
        return not known or self.completes or "embedding" in known


class LoadedRow(Struct, frozen=True):
    """A model in an agent's memory; `raw` is `None` if inferred from a finished request."""

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

EMPTY: Mapping[str, str] = {}

Model = TypeVar("Model", AvailableModel, LoadedModel)


@dataclass(slots=True)
class Inventory:
    """The models that one agent has on disk and in memory, by routing key.

    `sampled_at` is when the lists were last read (monotonic seconds), `None` before the first time.
    `blobs`, `contents` and `broken` are what its agent read on its disk, by a model's listed name.
    `passing` are names under which models arrive from other machines: no list shows them.
    """

    available: dict[str, AvailableRow] = field(default_factory=dict)
    loaded: dict[str, LoadedRow] = field(default_factory=dict)
    sampled_at: float | None = None
    tags: bytes = b""
    ps: bytes = b""
    blobs: Mapping[str, str] = field(default_factory=dict)
    contents: Mapping[str, str] = field(default_factory=dict)
    broken: Mapping[str, str] = field(default_factory=dict)
    offered: dict[str, AvailableRow] = field(default_factory=dict)
    passing: tuple[str, ...] = ()

    @property
    def servable(self) -> Mapping[str, AvailableRow]:
        """The models on disk, and the cloud models that it can pass on without a stub."""
        return {**self.offered, **self.available} if self.offered else self.available

    def read_tags(
        self,
        tags: bytes,
        blobs: Mapping[str, str],
        contents: Mapping[str, str] = EMPTY,
        broken: Mapping[str, str] = EMPTY,
    ) -> bool:
        """Read a body of `/api/tags`, without what is broken; whether anything on disk changed.

        Raises:
            msgspec.DecodeError: the body is not Ollama's list.
        """
        if (tags, blobs, contents, broken) == (self.tags, self.blobs, self.contents, self.broken):
            return False
        rows = _read(tags, _available, AvailableModel)
        weights = {_key(name): blob for name, blob in blobs.items()}
        layers = {_key(name): content for name, content in contents.items()}
        self.passing = tuple(model.name for _, model in rows if _is_passing(model.name))
        left_out = {"", *map(_key, broken), *map(_key, self.passing)}
        self.available = {
            key: AvailableRow(key, model, raw, weights.get(key, ""), layers.get(key, ""))
            for raw, model in rows
            if (key := _key(model.name)) not in left_out
        }
        self.tags, self.blobs = tags, dict(blobs)
        self.contents, self.broken = dict(contents), dict(broken)
        return True

    def note_capabilities(self, digest: str, capabilities: list[str]) -> list[str]:
        """What `/api/show` says of a manifest, where the list does not; the routing keys it has."""
        keys = [
            key
            for key, row in self.available.items()
            if row.model.digest == digest and not row.model.capabilities
        ]
        rows = [self.available[key] for key in keys]

        def able_to(model: AvailableModel) -> AvailableModel:
            return structs.replace(model, capabilities=capabilities)

        able = {row.key: structs.replace(row, model=able_to(row.model)) for row in rows}
        if able:  # a new mapping shows that something has changed
            self.available = {**self.available, **able}
        return keys

    def read_ps(self, ps: bytes) -> bool:
        """Read a body of `/api/ps`; whether anything in memory changed.

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
        """A request for this model has finished, so it is in memory until a list says otherwise.

        `context_length` is what the request asked for. Returns whether anything changed.
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
        """Whether the models in memory were inferred from requests since the last list."""
        return bool(self.loaded) and not self.ps

    def note_unloaded(self, keys: Iterable[str]) -> None:
        """The agent was asked to unload these models."""
        for key in keys:
            if self.loaded.pop(key, None) is not None:
                self.ps = b""

    def note_missing(self, key: str) -> None:
        """The agent answered that it lacks this model; that holds until its next list."""
        if self.available.pop(key, None) is not None:
            self.tags = b""
        self.note_unloaded([key])

    def is_loaded(self, key: str) -> bool:
        """Whether the model is in memory, also under another name of the same weights.

        Always true for a cloud model without a stub.
        """
        return key in self.offered or self.runner(key) is not None

    def runner(self, key: str) -> LoadedRow | None:
        """The loaded row that serves the model: its own, or that of another name of its weights."""
        mine = self.available.get(key)
        if key in self.loaded or mine is None or not mine.blob:
            return self.loaded.get(key)
        for name, row in self.loaded.items():
            other = self.available.get(name)
            if other is not None and other.blob == mine.blob:
                return row
        return None

    def namesakes(self, key: str) -> list[str]:
        """The routing keys of all names with the model's weights, itself included."""
        row = self.available.get(key)
        if row is None or not row.blob:
            return [key]
        return [name for name, other in self.available.items() if other.blob == row.blob]


def _read(
    body: bytes, decoder: msgspec.json.Decoder[Model], kind: type[Model]
) -> list[tuple[bytes, Model]]:
    """The rows of a list, raw and decoded; a row without a name is left out.

    Raises:
        msgspec.DecodeError: the body is not Ollama's list.
    """
    values = max(body.count(b"{") + body.count(b"["), body.count(b","))
    if values > MOST_VALUES:
        raise msgspec.DecodeError(f"{values} values; the limit is {MOST_VALUES}")
    try:
        body.decode()  # the database keeps it as text
        rows = [bytes(row) for row in _rows.decode(body).models or ()]
        if len(rows) > MOST_MODELS:
            raise msgspec.DecodeError(f"{len(rows)} models; the limit is {MOST_MODELS}")
        return [(row, model) for row in rows if (model := _model(row, decoder, kind)) is not None]
    except (UnicodeDecodeError, RecursionError) as exc:
        raise msgspec.DecodeError(str(exc)) from exc


def _model(row: bytes, decoder: msgspec.json.Decoder[Model], kind: type[Model]) -> Model | None:
    """One row; only its name if another field has the wrong type."""
    try:
        return decoder.decode(row)
    except msgspec.DecodeError:
        pass
    try:
        return kind(name=_named.decode(row).name)
    except msgspec.DecodeError:
        return None


def _is_passing(name: str) -> bool:
    return "/" in name and is_passing(name.split("/")[-2].lower())


def _key(name: str) -> str:
    """The routing key of a listed name; empty for one that no client can ask for."""
    try:
        return model_key(name)
    except InvalidModelName:
        return ""
