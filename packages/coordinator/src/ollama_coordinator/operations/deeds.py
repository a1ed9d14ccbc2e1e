"""What is asked of one agent's Ollama for each kind of operation; pure."""

import msgspec

from ollama_coordinator_common.names import model_key

from .types import Deed, Kind


def _text(**fields: object) -> str:
    return msgspec.json.encode(fields).decode()


def pull(name: str, *, insecure: bool = False) -> Deed:
    """Fetch a model from a registry."""
    body = _text(model=name, insecure=insecure, stream=True)
    return Deed(Kind.PULL, name, model_key(name), "POST", "/api/pull", body)


def push(name: str, *, insecure: bool = False) -> Deed:
    """Upload a model to a registry."""
    body = _text(model=name, insecure=insecure, stream=True)
    return Deed(Kind.PUSH, name, model_key(name), "POST", "/api/push", body)


def create(name: str, body: bytes, blobs: tuple[str, ...]) -> Deed:
    """Build a model; `body` is the client's own, asking for a stream."""
    return Deed(
        Kind.CREATE, name, model_key(name), "POST", "/api/create", body.decode(), blobs=blobs
    )


def copy(source: str, destination: str) -> Deed:
    """Give a model a second name."""
    body = _text(source=source, destination=destination)
    return Deed(Kind.COPY, destination, model_key(destination), "POST", "/api/copy", body)


def delete(name: str) -> Deed:
    """Remove a model from disk."""
    body = _text(model=name, name=name)
    return Deed(Kind.DELETE, name, model_key(name), "DELETE", "/api/delete", body)


def load(name: str, *, keep_alive: int | str | None = None, embeds: bool = False) -> Deed:
    """Bring a model into memory; a model that embeds is not asked to generate."""
    fields: dict[str, object] = {"model": name}
    if keep_alive is not None:
        fields["keep_alive"] = keep_alive
    path = "/api/embed" if embeds else "/api/generate"
    return Deed(Kind.LOAD, name, model_key(name), "POST", path, _text(**fields))


def unload(name: str) -> Deed:
    """Drop a model from memory."""
    body = _text(model=name, keep_alive=0)
    return Deed(Kind.UNLOAD, name, model_key(name), "POST", "/api/generate", body)
