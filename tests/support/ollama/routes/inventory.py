"""What the node is and has: version, tags, ps, show; and copy and delete."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from support.ollama import names
from support.ollama.exchange import Exchange
from support.ollama.models import Model
from support.ollama.runner import Runner
from support.ollama.wire import ApiError, local_time

from .lookup import require_name, resolve, single_quoted


async def root(exchange: Exchange) -> web.StreamResponse:
    return exchange.text("Ollama is running", content_type="text/plain; charset=utf-8")


async def version(exchange: Exchange) -> web.StreamResponse:
    return exchange.json({"version": exchange.node.settings.version})


async def status(exchange: Exchange) -> web.StreamResponse:
    disabled = exchange.node.settings.cloud_disabled
    source = "env" if disabled else "none"
    return exchange.json({"cloud": {"disabled": disabled, "source": source}})


async def tags(exchange: Exchange) -> web.StreamResponse:
    return exchange.json({"models": [_on_disk(model) for model in exchange.node.store]})


async def ps(exchange: Exchange) -> web.StreamResponse:
    here = [runner for runner in exchange.node.engine.loaded if not runner.model.remote]
    return exchange.json({"models": [_in_memory(exchange, runner) for runner in here]})


async def show(exchange: Exchange) -> web.StreamResponse:
    fields = exchange.fields("ShowRequest")
    asked, verbose = fields.name(), fields.flag("verbose")
    require_name(asked)
    parsed = names.parse(names.split_source(asked)[0])
    shown = parsed.short if parsed else asked
    model = resolve(
        exchange.node,
        asked,
        single_quoted(shown),
        disabled="remote model details are unavailable",
    )
    return exchange.json(_shown(model, verbose=verbose))


async def copy(exchange: Exchange) -> web.StreamResponse:
    fields = exchange.fields("CopyRequest")
    ends = {key: fields.text(key) for key in ("source", "destination")}
    for key, name in ends.items():
        if names.parse(name) is None:
            raise ApiError(400, f'{key} "{name}" is invalid')
    store = exchange.node.store
    source = store.find(ends["source"])
    if source is None:
        raise ApiError(404, f'model "{ends["source"]}" not found')
    store.copy(source, ends["destination"])
    return exchange.nothing()


async def delete(exchange: Exchange) -> web.StreamResponse:
    asked = exchange.fields("DeleteRequest").name()
    if not asked:
        raise ApiError(400, "model is required")
    if names.parse(asked) is None:
        raise ApiError(400, f'name "{asked}" is invalid')
    if exchange.node.store.remove(asked) is None:
        raise ApiError(404, single_quoted(asked))
    return exchange.nothing()


async def recommendations(exchange: Exchange) -> web.StreamResponse:
    return exchange.json({"recommendations": []})


def _on_disk(model: Model) -> dict[str, Any]:
    lengths = {
        "context_length": model.context_length,
        "embedding_length": model.embedding_length,
    }
    return {
        "name": model.name,
        "model": model.name,
        "modified_at": local_time(model.modified_at),
        "size": model.size_bytes,
        "digest": model.digest,
        **_remote(model),
        "details": {**model.details, **lengths},
        "capabilities": list(model.capabilities),
    }


def _remote(model: Model) -> dict[str, Any]:
    """What only a stub has: where it runs."""
    if not model.remote:
        return {}
    return {"remote_model": model.name, "remote_host": "https://ollama.com:443"}


def _in_memory(exchange: Exchange, runner: Runner) -> dict[str, Any]:
    model = runner.model
    return {
        "name": model.name,
        "model": model.name,
        "size": runner.memory_bytes,
        "digest": model.digest,
        "details": model.details,
        "expires_at": local_time(exchange.node.engine.expiry(runner)),
        "size_vram": runner.vram_bytes,
        "context_length": runner.settings.num_ctx,
    }


def _shown(model: Model, *, verbose: bool) -> dict[str, Any]:
    parameters = "\n".join(f"{key:<30} {value}" for key, value in model.parameters.items())
    optional = {
        "license": model.license,
        "parameters": parameters,
        "system": model.system,
        "tensors": [{"name": "token_embd.weight", "type": "Q4_K", "shape": [64, 64]}]
        if verbose
        else None,
    }
    return {
        **{key: value for key, value in optional.items() if value},
        "modelfile": model.modelfile,
        "template": model.template,
        **_remote(model),
        "details": model.details,
        "model_info": model.info(verbose=verbose),
        "capabilities": list(model.capabilities),
        "modified_at": local_time(model.modified_at),
    }
