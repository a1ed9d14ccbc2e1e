"""Finding the model a request means, with the refusals each route words its own way."""

from __future__ import annotations

from support.ollama import names
from support.ollama.models import Model
from support.ollama.node import Node
from support.ollama.wire import ApiError

SIGNIN_URL = "https://ollama.com/connect?name=stand-in&key=c3RhbmQtaW4"


def resolve(
    node: Node, asked: str, missing: str, *, disabled: str = "remote model is unavailable"
) -> Model:
    """The model, or the refusal: `missing` is the 404's text, `disabled` that without the cloud."""
    if names.names_both_sources(asked):
        raise ApiError(400, f'use either :local or :cloud, not both: "{asked}"')
    base, source = names.split_source(asked)
    if source == "cloud":
        return _of_the_cloud(node, base, missing, disabled)
    model = node.store.find(base)
    if model is None:
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
    """For the routes that tell a missing name from one that is no name at all."""
    if not asked:
        raise ApiError(400, "model is required")
    if not names.names_both_sources(asked) and names.parse(names.split_source(asked)[0]) is None:
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
