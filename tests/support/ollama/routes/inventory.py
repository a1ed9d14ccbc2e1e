"""What the node is and has: version, tags, ps, show, its account; and copy and delete."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from support.ollama import names
from support.ollama.disk import DiskStore
from support.ollama.exchange import Exchange
from support.ollama.models import Model
from support.ollama.node import Settings
from support.ollama.runner import Runner
from support.ollama.wire import ApiError, local_time

from .lookup import (
    SIGNIN_URL,
    both_sources,
    cloud_refusal,
    quoted,
    require_file,
    require_name,
    resolve,
    single_quoted,
)


async def root(exchange: Exchange) -> web.StreamResponse:
    return exchange.text("Ollama is running", content_type="text/plain; charset=utf-8")


async def version(exchange: Exchange) -> web.StreamResponse:
    return exchange.json({"version": exchange.node.settings.version})


async def status(exchange: Exchange) -> web.StreamResponse:
    disabled = exchange.node.settings.cloud_disabled
    source = "env" if disabled else "none"
    return exchange.json({"cloud": {"disabled": disabled, "source": source}})


async def tags(exchange: Exchange) -> web.StreamResponse:
    settings = exchange.node.settings
    if isinstance(exchange.node.store, DiskStore):
        exchange.node.store.written()
    listed = [_on_disk(model, settings) for model in exchange.node.store]
    return exchange.json({"models": listed})


async def ps(exchange: Exchange) -> web.StreamResponse:
    here = [runner for runner in exchange.node.engine.loaded if not runner.model.remote]
    return exchange.json({"models": [_in_memory(exchange, runner) for runner in here]})


async def show(exchange: Exchange) -> web.StreamResponse:
    fields = exchange.fields("ShowRequest")
    asked, verbose = fields.name(), fields.flag("verbose")
    require_name(asked)
    shown, _ = names.split_source(asked)
    if exchange.node.settings.since("0.33"):
        parsed = names.parse(shown)
        shown = parsed.short if parsed else shown
    model = resolve(
        exchange.node,
        asked,
        single_quoted(shown),
        disabled="remote model details are unavailable",
    )
    require_file(model, single_quoted(shown))
    if model.damage:
        raise ApiError(500, model.damage)
    return exchange.json(_shown(model, exchange.node.settings, verbose=verbose))


async def copy(exchange: Exchange) -> web.StreamResponse:
    fields = exchange.fields("CopyRequest")
    ends = {key: fields.text(key) for key in ("source", "destination")}
    for key, name in ends.items():
        if names.parse(name) is None or name != name.strip():
            raise ApiError(400, f"{key} {quoted(name)} is invalid")
    store = exchange.node.store
    source = store.find(ends["source"])
    if source is None:
        raise ApiError(404, f"model {quoted(ends['source'])} not found")
    store.copy(source, ends["destination"])
    return exchange.nothing()


async def delete(exchange: Exchange) -> web.StreamResponse:
    asked = exchange.fields("DeleteRequest").name()
    require_name(asked)
    if names.names_both_sources(asked):
        raise ApiError(400, both_sources(asked))
    if names.parse(names.split_source(asked)[0]) is None:
        raise ApiError(400, f"name {quoted(asked)} is invalid")
    if exchange.node.store.remove(asked.strip()) is None:
        raise ApiError(404, single_quoted(asked))
    return exchange.nothing()


async def recommendations(exchange: Exchange) -> web.StreamResponse:
    return exchange.json({"recommendations": []})


async def me(exchange: Exchange) -> web.StreamResponse:
    return exchange.json({"id": "stand-in", "name": _user(exchange), "email": ""})


async def signout(exchange: Exchange) -> web.StreamResponse:
    _user(exchange)
    exchange.node.settings.signed_in_as = None
    return exchange.json(None)


async def web_tool(exchange: Exchange) -> web.StreamResponse:
    """Search and fetch, for those that are signed in; a stand-in finds nothing."""
    what = exchange.path.rpartition("_")[2]
    refusal = cloud_refusal(exchange.node, f"web {what} is unavailable")
    if refusal is not None:
        raise refusal
    return exchange.json({"results": []})


def _user(exchange: Exchange) -> str:
    user = exchange.node.settings.signed_in_as
    if user is None:
        raise ApiError(401, "unauthorized", signin_url=SIGNIN_URL)
    return user


def _on_disk(model: Model, settings: Settings) -> dict[str, Any]:
    row = {
        "name": model.name,
        "model": model.name,
        "modified_at": local_time(model.modified_at),
        "size": model.size_bytes,
        "digest": model.digest,
        **_remote(model),
        "details": model.details,
    }
    if not settings.since("0.30"):
        return row
    lengths = {
        "context_length": model.context_length,
        "embedding_length": model.embedding_length,
    }
    capabilities = list(model.capabilities)
    return {**row, "details": {**model.details, **lengths}, "capabilities": capabilities}


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


def _shown(model: Model, settings: Settings, *, verbose: bool) -> dict[str, Any]:
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
        "modelfile": model.modelfile(settings.models_path),
        "template": model.template,
        **_remote(model),
        "details": model.details,
        "model_info": model.info(verbose=verbose),
        "capabilities": list(model.capabilities),
        "modified_at": local_time(model.modified_at),
    }
