"""Models and blobs on the move: pull, push, create, and raw blobs."""

from __future__ import annotations

import asyncio
import hashlib
import re
from typing import Any

from aiohttp import web

from support.ollama import names
from support.ollama.disk import DiskStore
from support.ollama.disk import pull as pull_over_http
from support.ollama.exchange import Exchange
from support.ollama.gojson import Fields
from support.ollama.models import Model, sha256_hex
from support.ollama.reply import ProgressLines, report
from support.ollama.wire import ApiError, StreamError

from .lookup import both_sources

PROGRESS_SECONDS = 0.06
NOT_IN_REGISTRY = "pull model manifest: file does not exist"
SMALL_LAYERS = {"template": 1_429, "params": 96, "config": 561}

_DIGEST = re.compile(r"sha256[:-][0-9a-fA-F]{64}")


async def pull(exchange: Exchange) -> web.StreamResponse:
    fields = exchange.fields("PullRequest")
    asked = fields.name()
    if names.names_both_sources(asked):
        raise ApiError(400, both_sources(asked))
    if names.parse(asked) is None:
        raise ApiError(400, "invalid model name")

    async def work(lines: ProgressLines) -> None:
        await _pulled(exchange, asked, lines, insecure=fields.flag("insecure", False))
        await lines.send("success")

    return await report(exchange, work, stream=fields.flag("stream", True))


async def push(exchange: Exchange) -> web.StreamResponse:
    fields = exchange.fields("PushRequest")
    asked = fields.name()
    if not asked:
        raise ApiError(400, "model is required")

    async def work(lines: ProgressLines) -> None:
        await lines.send("retrieving manifest")
        model = exchange.node.store.find(asked)
        if model is None:
            await lines.send("couldn't retrieve manifest")
            raise StreamError(_no_manifest(exchange, asked))
        if not exchange.node.settings.may_push:
            raise StreamError("you are not authorized to push to this namespace")
        await _pushed(exchange, model, lines)
        await lines.send("success")

    return await report(exchange, work, stream=fields.flag("stream", True))


async def create(exchange: Exchange) -> web.StreamResponse:
    fields = exchange.fields("CreateRequest")
    asked = fields.name()
    files = {str(file): str(blob) for file, blob in fields.mapping("files", "string").items()}
    if any(file.startswith("/") or ".." in file.split("/") for file in files):
        raise ApiError(400, "file path must be relative")
    if not all(files.values()):
        raise ApiError(400, "invalid digest format")
    if names.parse(asked) is None or asked != asked.strip():
        raise ApiError(400, "invalid model name")

    async def work(lines: ProgressLines) -> None:
        source = fields.text("from")
        if source:
            base = await _from_model(exchange, source, lines)
            manifest = f"{base.blob} from {base.name}"
        else:
            base = await _from_files(exchange, asked, files, lines)
            # The manifest names the file that the weights came from: on this node's disk.
            manifest = f"{base.blob} from {exchange.node.settings.blob_path(base.blob)}"
        changes = _changes(fields, base)
        await lines.send(f"using existing layer {base.blob}")
        await lines.send("writing manifest")
        digest = sha256_hex(f"manifest of {manifest} with {sorted(changes.items())}")
        exchange.node.store.copy(base, asked, digest=digest, **changes)
        await lines.send("success")

    return await report(exchange, work, stream=fields.flag("stream", True))


async def blob_head(exchange: Exchange) -> web.StreamResponse:
    if exchange.node.store.has_blob(_digest(exchange)):
        return exchange.nothing(200)
    return exchange.error(404, "blob not found")


async def blob_post(exchange: Exchange) -> web.StreamResponse:
    """A blob that is there already is answered without reading what is sent."""
    digest, store = _digest(exchange), exchange.node.store
    if store.has_blob(digest):
        return exchange.nothing(200)
    found, size = hashlib.sha256(), 0
    async for chunk in exchange.request.content.iter_any():
        found.update(chunk)
        size += len(chunk)
    actual = f"sha256:{found.hexdigest()}"
    if actual != exchange.argument:  # Ollama compares the text, not what it means
        raise ApiError(400, f'digest mismatch, expected "{exchange.argument}", got "{actual}"')
    store.uploaded[digest] = size
    return exchange.nothing(201)


def _no_manifest(exchange: Exchange, asked: str) -> str:
    name = names.parse(asked)
    if name is None:
        whole = names.filled(asked)
        return f"unqualified name: {whole.host}/{whole.namespace}/{whole.model}:{whole.tag}"
    path = f"{exchange.node.settings.models_path}/manifests/{name.path}"
    return f"open {path}: no such file or directory"


async def _pulled(
    exchange: Exchange, asked: str, lines: ProgressLines, *, insecure: bool = False
) -> Model:
    """Layer by layer, from where an earlier attempt was cut; then the manifest."""
    store = exchange.node.store
    await lines.send("pulling manifest")
    name = names.parse(asked)
    if isinstance(store, DiskStore) and name is not None and name.host != names.DEFAULT_HOST:
        return await pull_over_http(store, name, lines.send, insecure=insecure)
    model = exchange.node.registry.find(asked)
    if model is None:
        raise StreamError(NOT_IN_REGISTRY)
    layers = store.layers(model) if isinstance(store, DiskStore) else _layers(model)
    for digest, size in layers:
        await _layer(exchange, digest, size, lines)
    await lines.send("verifying sha256 digest")
    await lines.send("writing manifest")
    for digest, _ in layers:
        store.partial.pop(digest, None)
    return store.add(model)


async def _pushed(exchange: Exchange, model: Model, lines: ProgressLines) -> None:
    for digest, size in _layers(model):
        status = f"pushing {_short(digest)}"
        await lines.send(status, digest=digest, total=size)
        await lines.send(status, digest=digest, total=size, completed=size)
    await lines.send("pushing manifest")
    exchange.node.registry.add(model)


async def _layer(exchange: Exchange, digest: str, size: int, lines: ProgressLines) -> None:
    node, status = exchange.node, f"pulling {_short(digest)}"
    here = size if node.store.has_blob(digest) else node.store.partial.get(digest, 0)
    rate = node.settings.download_bytes_per_second * node.hardware.speed
    await lines.send(status, digest=digest, total=size, completed=here)
    while here < size:
        await asyncio.sleep(min(PROGRESS_SECONDS, (size - here) / rate))
        here = min(size, here + max(1, int(min(rate * PROGRESS_SECONDS, size))))
        node.store.partial[digest] = here
        await lines.send(status, digest=digest, total=size, completed=here)


def _layers(model: Model) -> list[tuple[str, int]]:
    small = [(f"sha256:{sha256_hex(kind)}", size) for kind, size in SMALL_LAYERS.items()]
    return [(model.blob, model.size_bytes), *small]


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12]


async def _from_model(exchange: Exchange, source: str, lines: ProgressLines) -> Model:
    if names.parse(source) is None:
        raise StreamError("invalid model name", 400)
    found = exchange.node.store.find(source)
    # A node that lacks what `from` names pulls it by itself.
    return found or await _pulled(exchange, source, lines)


async def _from_files(
    exchange: Exchange, asked: str, files: dict[str, str], lines: ProgressLines
) -> Model:
    if not files:
        raise StreamError("neither 'from' or 'files' was specified", 400)
    file, blob = next(iter(files.items()))
    store = exchange.node.store
    known = store.has_blob(blob)
    if not known and not file.endswith(".gguf"):  # it would have looked into the file
        raise StreamError("unknown type", 400)
    await lines.send("parsing GGUF")
    if not known:
        path = exchange.node.settings.blob_path(blob)
        raise StreamError(f"open {path}: no such file or directory")
    return Model(asked, size_bytes=store.uploaded.get(blob, 0), blob=blob)


def _changes(fields: Fields, base: Model) -> dict[str, Any]:
    wanted = {
        "system": fields.text("system"),
        "template": fields.text("template"),
        "parameters": {**base.parameters, **fields.mapping("parameters")},
        "adapters": tuple(str(digest) for digest in fields.mapping("adapters").values()),
    }
    return {key: value for key, value in wanted.items() if value}


def _digest(exchange: Exchange) -> str:
    if not _DIGEST.fullmatch(exchange.argument):
        raise ApiError(400, "invalid digest format")
    return exchange.argument.replace("-", ":").lower()
