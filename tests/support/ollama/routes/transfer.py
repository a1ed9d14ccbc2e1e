"""Models and blobs on the move: pull, push, create, and raw blobs."""

from __future__ import annotations

import asyncio
import hashlib
import re
from typing import Any

from aiohttp import web

from support.ollama import names
from support.ollama.exchange import Exchange, StreamError
from support.ollama.gojson import Fields
from support.ollama.models import Model, sha256_hex
from support.ollama.reply import ProgressLines, report
from support.ollama.wire import ApiError

PROGRESS_SECONDS = 0.06
NOT_IN_REGISTRY = "pull model manifest: file does not exist"
SMALL_LAYERS = {"template": 1_429, "params": 96, "config": 561}

_DIGEST = re.compile(r"sha256[:-][0-9a-fA-F]{64}")


async def pull(exchange: Exchange) -> web.StreamResponse:
    fields = exchange.fields("PullRequest")
    asked = fields.name()
    if names.parse(asked) is None:
        raise ApiError(400, "invalid model name")

    async def work(lines: ProgressLines) -> None:
        await _pulled(exchange, asked, lines)
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
            raise StreamError("file does not exist")
        if not exchange.node.settings.may_push:
            raise StreamError("you are not authorized to push to this namespace")
        await _pushed(exchange, model, lines)
        await lines.send("success")

    return await report(exchange, work, stream=fields.flag("stream", True))


async def create(exchange: Exchange) -> web.StreamResponse:
    fields = exchange.fields("CreateRequest")
    asked = fields.name()
    if names.parse(asked) is None:
        raise ApiError(400, "invalid model name")
    source, files = fields.text("from"), fields.mapping("files")
    if not source and not files:
        raise ApiError(400, "neither 'from' or 'files' was specified")
    for digest in files.values():
        if not exchange.node.store.has_blob(str(digest)):
            raise ApiError(400, f"blob {digest} does not exist")

    async def work(lines: ProgressLines) -> None:
        store = exchange.node.store
        base = store.find(source) if source else _from_files(exchange, asked, files)
        if base is None:  # a node that lacks what `from` names pulls it by itself
            base = await _pulled(exchange, source, lines)
        await lines.send(f"using existing layer {base.blob}")
        await lines.send("writing manifest")
        digest = sha256_hex(f"manifest of {asked} on {base.digest}")
        store.copy(base, asked, digest=digest, **_changes(fields, base))
        await lines.send("success")

    return await report(exchange, work, stream=fields.flag("stream", True))


async def blob_head(exchange: Exchange) -> web.StreamResponse:
    return exchange.nothing(200 if exchange.node.store.has_blob(_digest(exchange)) else 404)


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


async def _pulled(exchange: Exchange, asked: str, lines: ProgressLines) -> Model:
    """Layer by layer, from where an earlier attempt was cut; then the manifest."""
    store = exchange.node.store
    await lines.send("pulling manifest")
    model = exchange.node.registry.find(asked)
    if model is None:
        raise StreamError(NOT_IN_REGISTRY)
    for digest, size in _layers(model):
        await _layer(exchange, digest, size, lines)
    await lines.send("verifying sha256 digest")
    await lines.send("writing manifest")
    for digest, _ in _layers(model):
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


def _from_files(exchange: Exchange, asked: str, files: dict[str, Any]) -> Model:
    blob = str(next(iter(files.values())))
    return Model(asked, size_bytes=exchange.node.store.uploaded.get(blob, 0), blob=blob)


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
