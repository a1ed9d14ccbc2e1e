"""Finding the model a request means, with the refusals each route words its own way."""

from __future__ import annotations

import json

from support.ollama import names
from support.ollama.models import Model
from support.ollama.node import Node
from support.ollama.wire import ApiError

SIGNIN_URL = "https://ollama.com/connect?name=stand-in&key=c3RhbmQtaW4"


def resolve(
    node: Node,
    asked: str,
    missing: str,
    *,
    disabled: str = "remote model is unavailable",
    exact: bool = False,
) -> Model:
    """The model, or the refusal: `missing` is the 404's text, `disabled` that without the cloud.

    `exact`: a name in another case than the one on disk is another name.
    """
    if not asked.strip():
        raise ApiError(404, missing)
    if names.names_both_sources(asked):
        raise ApiError(400, both_sources(asked))
    base, source = names.split_source(asked)
    name = names.parse(base)
    if name is None:
        raise ApiError(400, "invalid model name")
    if source == "cloud":
        return _of_the_cloud(node, base, missing, disabled)
    model = node.store.find(base)
    if model is None or (exact and model.name != name.short):
        raise ApiError(404, missing)
    return model


def _of_the_cloud(node: Node, asked: str, missing: str, disabled: str) -> Model:
    """A name that says so goes to ollama.com, whether a stub of it is on disk or not."""
    refusal = cloud_refusal(node, disabled)
    if refusal is not None:
        raise refusal
    known = {names.canonical(name) for name in node.settings.cloud_models}
    if names.canonical(asked) not in known:
        raise ApiError(404, missing, native=True)
    return Model(asked, size_bytes=400, remote=True)


def cloud_refusal(node: Node, what: str) -> ApiError | None:
    """Told before a route has read anything, hence in the native shape on every one."""
    if node.settings.cloud_disabled:
        return ApiError(403, f"ollama cloud is disabled: {what}", native=True)
    if node.settings.signed_in_as is None:
        return ApiError(401, "unauthorized", native=True, signin_url=SIGNIN_URL)
    return None


def require_name(asked: str) -> None:
    """For the routes that tell a missing name from one that is not there."""
    if not asked.strip():
        raise ApiError(400, "model is required")


def require_file(model: Model, missing: str) -> None:
    """For the routes that do not ask first what a model can do."""
    if model.missing:
        raise ApiError(404, missing)


def quoted(text: str) -> str:
    """As Go's `%q` writes it, but for control characters."""
    known = json.dumps(text, ensure_ascii=False)
    return "".join(one if one.isprintable() else f"\\u{ord(one):04x}" for one in known)


def both_sources(asked: str) -> str:
    return f"use either :local or :cloud, not both: {quoted(asked)}"


def single_quoted(asked: str) -> str:
    return f"model '{asked}' not found"


def try_pulling(asked: str) -> str:
    """What the embedding routes say of an unknown model; of no name at all they say less."""
    if not asked.strip():
        return single_quoted(asked)
    return f"model {quoted(asked)} not found, try pulling it first"


def require(model: Model, asked: str, capability: str, named: str) -> None:
    if capability not in model.capabilities:
        raise ApiError(400, f'"{asked}" does not support {named}')


def require_all(model: Model, *capabilities: str) -> None:
    lacks = [one for one in capabilities if one not in model.capabilities]
    if lacks:
        parsed = names.parse(model.name)
        full = parsed.canonical if parsed else model.name
        raise ApiError(400, f"{full} does not support {', '.join(lacks)}")
