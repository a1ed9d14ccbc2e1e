"""What Ollama's manifests on disk say of each model: its weights, its content, and if it is whole.

The digest in `/api/tags` is that of the manifest file. Old versions wrote it in their own way, and
that of a created model has a path of its machine in it (`from`). Servers of all versions agree on
the layers alone: the weights, the template, the system prompt, the parameters and so on.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from ollama_coordinator_common.error import InvalidModelName
from ollama_coordinator_common.names import ModelName

MODEL_LAYER = "application/vnd.ollama.image.model"


class Layer(msgspec.Struct, rename={"media_type": "mediaType"}):
    """One layer of a manifest; `size` in bytes."""

    media_type: str = ""
    digest: str = ""
    size: int | None = None


class Manifest(msgspec.Struct):
    """The part of a manifest that we read."""

    layers: list[Layer]
    config: Layer | None = None


class OnDisk(msgspec.Struct, frozen=True):
    """By model's name: the digest of its weights, of its content, and what its files lack.

    The content is the set of its layers' types and digests, whatever the manifest says beside them.
    """

    blobs: dict[str, str] = {}
    contents: dict[str, str] = {}
    broken: dict[str, str] = {}


def read_manifests(
    models: Iterable[tuple[str, str]], folders: Sequence[Path], *, is_certain: bool
) -> OnDisk:
    """What the manifests say of each model, where they can be read.

    `models` are (name, digest) pairs of `/api/tags`. Unless it `is_certain` that the server uses
    these folders, a manifest counts only if its bytes have the digest that the server gave.
    """
    found = OnDisk({}, {}, {})
    for name, digest in models:
        for folder in folders:
            content = _manifest(folder, name)
            if content is None:
                continue
            if not is_certain and hashlib.sha256(content).hexdigest() != digest:
                continue
            if layers := _layers(content):
                _note(found, name, layers, folder)
                break
    return found


def _note(found: OnDisk, name: str, layers: list[Layer], folder: Path) -> None:
    weights = next((layer.digest for layer in layers if layer.media_type == MODEL_LAYER), None)
    if weights is not None:
        found.blobs[name] = weights
    parts = sorted({f"{layer.media_type} {layer.digest}" for layer in layers})
    found.contents[name] = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    fault = next((text for layer in layers if (text := _fault(layer, folder / "blobs"))), None)
    if fault is not None:
        found.broken[name] = f"{fault}; pull or create the model again"


def _fault(layer: Layer, blobs: Path) -> str | None:
    """What is wrong with a layer's file; `None` where it is whole or cannot be looked at."""
    try:
        size = (blobs / layer.digest.replace(":", "-")).stat().st_size
    except FileNotFoundError:
        # Old versions have a colon in the name. Without the folder nothing can be said.
        if not blobs.is_dir() or (blobs / layer.digest).exists():
            return None
        return f"its file {layer.digest} is missing"
    except (OSError, ValueError):
        return None
    if layer.size is None or size == layer.size:
        return None
    return f"its file {layer.digest} has {size} bytes in place of {layer.size}"


def _manifest(folder: Path, name: str) -> bytes | None:
    try:
        return manifest_of(folder, name)
    except OSError:
        return None


def manifest_of(folder: Path, name: str) -> bytes:
    """The bytes of a model's manifest in one of Ollama's folders.

    Raises:
        FileNotFoundError: there is none, or no model can have the name.
        OSError: it cannot be read.
    """
    try:
        parts = ModelName.parse(name)
    except InvalidModelName as exc:
        raise FileNotFoundError(name) from exc
    path = folder / "manifests" / parts.host / parts.namespace / parts.model / parts.tag
    return path.read_bytes()


def all_layers(content: bytes) -> list[Layer]:
    """Everything that a manifest names: its layers, then its config; empty where it is none."""
    try:
        manifest = msgspec.json.decode(content, type=Manifest)
    except msgspec.DecodeError:
        return []
    config = manifest.config
    return [*manifest.layers, *([config] if config is not None and config.digest else ())]


def digests_of(content: bytes) -> set[str]:
    """The digests of everything that a manifest names."""
    return {layer.digest for layer in all_layers(content)}


def _layers(content: bytes) -> list[Layer]:
    try:
        return msgspec.json.decode(content, type=Manifest).layers
    except msgspec.DecodeError:
        return []
