"""Finding the model a request means, with the refusals each route words its own way."""

from __future__ import annotations

from support.ollama import names
from support.ollama.models import Model
from support.ollama.node import Node
from support.ollama.wire import ApiError

SIGNIN_URL = "https://ollama.com/connect?name=stand-in&key=c3RhbmQtaW4"


def resolve(node: Node, asked: str, missing: str) -> Model:
    """The model, or the refusal: `missing` is the 404's text. Cloud names never run here."""
    if names.names_both_sources(asked):
        raise ApiError(400, f'use either :local or :cloud, not both: "{asked}"')
    base, source = names.split_source(asked)
    model = node.store.find(base)
    if source == "cloud" and model is None:
        raise cloud_refusal(node, "remote inference is unavailable")
    if model is None:
        raise ApiError(404, missing)
    return model


def cloud_refusal(node: Node, what: str) -> ApiError:
    if node.settings.cloud_disabled:
        return ApiError(403, f"ollama cloud is disabled: {what}")
    return ApiError(401, "unauthorized", signin_url=SIGNIN_URL)


def require_name(asked: str) -> None:
    """For the routes that tell a missing name from one that is no name at all."""
    if not asked:
        raise ApiError(400, "model is required")
    if not names.names_both_sources(asked) and names.parse(asked.split(":cloud")[0]) is None:
        raise ApiError(400, "invalid model name")


def single_quoted(asked: str) -> str:
    return f"model '{asked}' not found"


def double_quoted(asked: str) -> str:
    return f'model "{asked}" not found, try pulling it first'


def require(model: Model, asked: str, capability: str, named: str) -> None:
    if capability not in model.capabilities:
        raise ApiError(400, f'"{asked}" does not support {named}')


def require_tools(model: Model) -> None:
    if "tools" not in model.capabilities:
        parsed = names.parse(model.name)
        full = parsed.canonical if parsed else model.name
        raise ApiError(400, f"{full} does not support tools")
