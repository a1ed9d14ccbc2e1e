"""The edge between HTTP and everything else: decode, reply, and which error is which status.

The core raises errors; only the table here knows their status, only the dialect their shape.
"""

import base64
import logging
from collections.abc import Iterable
from hashlib import sha256
from html import escape
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Send

from ollama_coordinator.access import Denied, UnknownJoinRequest, UnknownKey, WrongKey
from ollama_coordinator.agent_queries import CloudDisabled
from ollama_coordinator.aliases import AliasInTheWay, UnknownAlias, WrongAlias
from ollama_coordinator.db import DatabaseError
from ollama_coordinator.dispatch import HandedOver
from ollama_coordinator.memory import NoRoom
from ollama_coordinator.model_probes import CannotRestart
from ollama_coordinator.operations import (
    NoAgentForModel,
    OperationError,
    Refused,
    UnknownOperation,
    UploadError,
    WrongPlacement,
)
from ollama_coordinator.registry import AgentState, NotItsOllama, TwoMachines, UnknownAgent
from ollama_coordinator.scheduler import (
    DoesNotPredict,
    HoldersUnavailable,
    ModelNotFound,
    NoAgentRegistered,
    QueueFull,
)
from ollama_coordinator.settings import NotEditable, UnknownSetting
from ollama_coordinator.upstream import (
    AgentLost,
    Cut,
    ModelStuck,
    RequestCancelled,
    TakenBack,
    Unreachable,
)
from ollama_coordinator.wake import CannotWake
from ollama_coordinator_common.error import InvalidModelName, OllamaCoordinatorError

from .dialects import Dialect, error_body

log = logging.getLogger(__name__)

T = TypeVar("T")

OWN_BODY_LIMIT = 16 * 1024 * 1024
"""Bytes of a body of Ollama's that is not inference; `create` may have a long licence."""

DECODED_BYTES, DECODED_COMMAS = 1024 * 1024, 10_000
"""Of a body of our own API: decoding as much takes 20 ms at worst."""

JSON = "application/json; charset=utf-8"


class ClientLeft(OllamaCoordinatorError):
    """The client closed its connection; an answer would not reach it."""


STATUS: dict[type[OllamaCoordinatorError], int] = {
    InvalidModelName: 400,
    CloudDisabled: 403,
    ModelNotFound: 404,
    UnknownAgent: 404,
    NoAgentRegistered: 503,
    HoldersUnavailable: 503,
    QueueFull: 503,
    NoRoom: 503,
    DoesNotPredict: 409,
    Unreachable: 503,
    AgentLost: 503,
    ModelStuck: 503,
    TakenBack: 503,
    Cut: 502,
    # As Ollama answers a cancelled request; clients do not repeat it.
    RequestCancelled: 499,
    NotEditable: 409,
    UnknownSetting: 400,
    WrongKey: 400,
    UnknownKey: 404,
    WrongAlias: 400,
    UnknownAlias: 404,
    AliasInTheWay: 409,
    TwoMachines: 409,
    CannotRestart: 409,
    NotItsOllama: 409,
    CannotWake: 409,
    UnknownJoinRequest: 404,
    DatabaseError: 503,
    ClientLeft: 499,
    HandedOver: 503,
    WrongPlacement: 400,
    NoAgentForModel: 503,
    UnknownOperation: 404,
    OperationError: 500,
}
"""The status of every error that can reach a client; `HttpError` brings its own."""


class HttpError(OllamaCoordinatorError):
    """A refusal that exists on the wire only, such as a body that is not JSON."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class UnreadableBody(HttpError):
    """A body that cannot be read: Ollama refuses it before its route has a say, in its own form."""


class NoSuchModel(HttpError):
    """A request for inference names no model, or one that no agent has; `name` as it has it."""

    def __init__(self, status: int, message: str, name: str) -> None:
        super().__init__(status, message)
        self.name = name


class NamesNoModel(UnreadableBody, NoSuchModel):
    """The same on the routes that check the name while they read the body."""


RETRY_SECONDS = 5
"""After `NoRoom`: some of the requests that are in the way will have ended."""


def status_of(error: OllamaCoordinatorError) -> int:
    """The HTTP status of an error; that of its nearest listed ancestor."""
    if isinstance(error, HttpError | Denied | Refused | UploadError):
        return error.status
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def headers_of(error: OllamaCoordinatorError) -> dict[str, str]:
    """The headers that belong to an error."""
    if isinstance(error, NoRoom):
        return {"retry-after": str(RETRY_SECONDS)}
    if isinstance(error, QueueFull):
        return {"retry-after": str(max(1, round(error.retry_after_seconds)))}
    if isinstance(error, Denied) and error.status == 401:
        return {"www-authenticate": 'Bearer realm="Ollama Coordinator"'}
    if isinstance(error, Denied) and error.retry_after:
        return {"retry-after": str(max(1, round(error.retry_after)))}
    return {}


async def own_body(request: Request, limit: int = OWN_BODY_LIMIT) -> bytes:
    """The whole body of a request that is not inference.

    Raises:
        HttpError: 413 beyond `limit` bytes.
        ClientLeft: the client closed the connection before its end.
    """
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > limit:
                raise HttpError(413, f"request body too large: the limit is {limit} bytes")
    except ClientDisconnect as exc:
        raise ClientLeft from exc
    return bytes(body)


async def decode(
    kind: type[T], request: Request, *, limit: int = DECODED_BYTES, commas: int = DECODED_COMMAS
) -> T:
    """The body of a request to our own API as a value of this type.

    Raises:
        HttpError: 400 with the field and its fault; 413 beyond `limit` bytes or so many `commas`.
    """
    return decoded(kind, await own_body(request, limit), commas=commas)


def decoded(kind: type[T], body: bytes, *, commas: int = DECODED_COMMAS) -> T:
    """A body that was read as a value of this type.

    Raises:
        HttpError: as `decode`.
    """
    if body.count(b",") > commas:
        raise HttpError(413, f"request body has too many values: the limit is {commas} commas")
    if not body.strip():
        raise HttpError(400, "missing request body")
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        text = _unknown_fields(kind, body) or f"invalid request body: {exc}"
        raise HttpError(400, text) from exc


def _unknown_fields(kind: Any, body: bytes) -> str:
    """A sentence with the fields of a body that its type lacks; empty where it lacks none."""
    if not (isinstance(kind, type) and issubclass(kind, msgspec.Struct)):
        return ""
    try:
        given = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    known = kind.__struct_encode_fields__
    unknown = ", ".join(repr(name) for name in given if name not in known)
    if not unknown or not kind.__struct_config__.forbid_unknown_fields:
        return ""
    return f"there is no field {unknown}; there are {', '.join(known)}"


def reply(value: Any, status: int = 200) -> Response:
    """A JSON answer of our own API."""
    return Response(msgspec.json.encode(value), status, media_type=JSON)


def error_reply(error: OllamaCoordinatorError, dialect: Dialect = Dialect.NATIVE) -> Response:
    """An error as a whole answer."""
    status = status_of(error)
    kind, body = _kind_and_body(error, status, dialect)
    return Response(body, status, headers_of(error), media_type=kind)


def _kind_and_body(
    error: OllamaCoordinatorError, status: int, dialect: Dialect
) -> tuple[str, bytes]:
    """Ollama's `/v1` routes name no charset and end with a newline, but for unreadable bodies."""
    body = error_body(dialect, status, str(error))
    if dialect is Dialect.NATIVE or isinstance(error, UnreadableBody):
        return JSON, body
    return "application/json", body + b"\n"


async def send_whole(
    send: Send, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes
) -> None:
    """A whole answer on plain ASGI."""
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def send_error(
    send: Send, dialect: Dialect, error: OllamaCoordinatorError, *, kind: str | None = None
) -> None:
    """An error as a whole answer on plain ASGI; `kind` is its content type where not the usual."""
    status = status_of(error)
    usual, body = _kind_and_body(error, status, dialect)
    headers = {"content-type": kind or usual, **headers_of(error)}
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send_whole(send, status, encoded, body)


def log_event(event: str, agent: AgentState, **facts: object) -> None:
    """Log an event of an agent that came through the API."""
    log.info(event, extra={"agent_id": agent.id, "agent": agent.name, **facts})


# ── the page that takes a key ──

SECURITY = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data: blob:; font-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


_STYLE = """
:root{color-scheme:light dark;font:16px/1.5 system-ui,sans-serif}
body{display:grid;min-height:90vh;place-items:center;margin:1rem}
form{display:grid;gap:.75rem;width:min(26rem,100%)}
h1{font-size:1.25rem;margin:0}p{margin:0}
input,button{font:inherit;padding:.5rem .75rem}
"""
_LOGIN = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Log in · Ollama Coordinator</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>@STYLE</style></head><body>
<form method="post" action="@ACTION">
<h1>Ollama Coordinator</h1><p role="status">@TEXT</p>
<label for="key">Key</label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus>
<button>Log in</button>
</form></body></html>
""".replace("@STYLE", _STYLE)
"""It needs no script."""

_STYLE_HASH = base64.b64encode(sha256(_STYLE.encode()).digest()).decode()


def login_page(text: str, status: int, action: str = "dashboard/session") -> Response:
    """The page that takes a key, with a sentence on why it is shown.

    `action` is relative to the page: a proxy may serve us below another path.
    """
    policy = (
        f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; form-action 'self'; "
        "base-uri 'none'; frame-ancestors 'none'"
    )
    headers = {
        **SECURITY,
        "content-security-policy": policy,
        "cache-control": "no-store",
        # With none at all, a form's Origin is "null".
        "referrer-policy": "same-origin",
    }
    page = _LOGIN.replace("@ACTION", action).replace("@TEXT", escape(text))
    return Response(page, status, headers, "text/html; charset=utf-8")
