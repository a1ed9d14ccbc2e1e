"""The digest of the weights behind each model name, from Ollama's manifests on disk.

The digest of the model layer is the only identity that servers of all versions agree on: the digest
in `/api/tags` is that of the manifest file, which old versions wrote in their own way.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from ollama_coordinator_common.error import InvalidModelName
from ollama_coordinator_common.names import ModelName

MODEL_LAYER = "application/vnd.ollama.image.model"


class Layer(msgspec.Struct, rename={"media_type": "mediaType"}):
    """One layer of a manifest."""

    media_type: str
    digest: str


class Manifest(msgspec.Struct):
    """The part of a manifest that we read."""

    layers: list[Layer]


def model_blobs(
    models: Iterable[tuple[str, str]], folders: Sequence[Path], *, is_certain: bool
) -> dict[str, str]:
    """Each model's weights digest, where its manifest can be read.

    `models` are (name, digest) pairs of `/api/tags`. Unless it `is_certain` that the server uses
    these folders, a manifest counts only if its bytes have the digest that the server gave.
    """
    found: dict[str, str] = {}
    for name, digest in models:
        for folder in folders:
            content = _manifest(folder, name)
            if content is None:
                continue
            if not is_certain and hashlib.sha256(content).hexdigest() != digest:
                continue
            if weights := _weights(content):
                found[name] = weights
                break
    return found


def _manifest(folder: Path, name: str) -> bytes | None:
    try:
        parts = ModelName.parse(name)
        path = folder / "manifests" / parts.host / parts.namespace / parts.model / parts.tag
        return path.read_bytes()
    except (OSError, InvalidModelName):
        return None


def _weights(content: bytes) -> str | None:
    try:
        layers = msgspec.json.decode(content, type=Manifest).layers
    except msgspec.DecodeError:
        return None
    return next((layer.digest for layer in layers if layer.media_type == MODEL_LAYER), None)
