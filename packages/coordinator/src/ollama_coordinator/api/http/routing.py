"""How Ollama's router answers: several methods on one path, wrong methods, slashes too many.

And what it never meets: a request that goes in a circle.
"""

import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from http import HTTPStatus
from secrets import token_hex
from typing import Any, NamedTuple
from urllib.parse import quote

import msgspec
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ollama_coordinator.access import FREE, SAFE_METHODS, Access, Denied, Right, caller_of
from ollama_coordinator.db import Change
from ollama_coordinator.upstream import VIA_HEADER, passed

from .dialects import dialect_of
from .errors import JSON, HttpError, error_reply, login_page
from .headers import first

access_log = logging.getLogger("ollama_coordinator.access_log")

IN_PATHS = "/:@$&+,;="
"""The characters that Go's servers leave as they are in a path."""

SUBJECT_CHARACTERS = 300

CLIENT_LEFT = 499
"""The status of a request without an answer, as nginx logs it."""

VIA = VIA_HEADER.lower().encode()

WITHOUT_HEAD = frozenset(
    {
        "/api/ps",
        "/api/status",
        "/v1/models",
        "/v1/models/{model}",
        "/api/experimental/model-recommendations",
    }
)
"""Routes for which Ollama registers GET alone."""


ALLOWED = ("HEAD", "GET", "POST", "DELETE", "PATCH")
"""The order in which Ollama's router names the methods of a path."""

CIRCLE = (
    "this coordinator is among its own agents, directly or by way of another coordinator, so that "
    "requests go in circles; remove that agent (DELETE /api/agents/ID), and register an Ollama"
)


NO_HTTP1 = (
    "this coordinator cannot take links: they need its own HTTP/1; set COORDINATOR_HTTP=auto (and"
    " install httptools), or let the coordinator reach this machine (AGENT_TRANSPORT=direct)"
)


class CircleGuard:
    """ASGI middleware: a request that this coordinator sent is answered 508."""

    def __init__(self, app: ASGIApp, instance_id: str) -> None:
        self._app = app
        self._instance_id = instance_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        via = first(scope["headers"], VIA) if scope["type"] == "http" else None
        if via is None:
            await self._app(scope, receive, send)
        elif self._instance_id in via.split(","):
            await error_reply(HttpError(508, CIRCLE))(scope, receive, send)
        else:
            token = passed.set(via)
            try:
                await self._app(scope, receive, send)
            finally:
                passed.reset(token)


def _text(text: str, status: int, headers: Mapping[str, str] | None = None) -> Response:
    """Plain text as Go's router sends it, with no charset."""
    return Response(text, status, {"content-type": "text/plain", **(headers or {})})


class Endpoint(NamedTuple):
    """One method of one path, and its handler: a function of a request, or an ASGI application.

    `right`: what a caller must have of it; several joined mean any of them.
    """

    method: str
    path: str
    right: Right
    handler: Callable[..., Any]


class Guarded(NamedTuple):
    """The handler of one method, the right that it needs, and its path where it changes something.

    What a machine of the fleet does for itself, and what only asks, is no change.
    """

    right: Right
    app: ASGIApp
    changes: str = ""


ABOUT = "about"
"""The key of a scope under which a handler tells what it changes."""


def tell(scope: Scope, subject: str = "", **details: object) -> None:
    """Say what a request is about, for the audit; never a secret."""
    scope[ABOUT] = (subject, details)


def change_of(scope: Scope, path: str, status: int) -> Change:
    """What a request has changed, by the route of a path."""
    caller = caller_of(scope)
    named = " ".join(scope.get("path_params", {}).values())
    subject, details = scope.get(ABOUT, ("", {}))
    return Change(
        id=token_hex(8),
        at=datetime.now(UTC),
        by=caller.name,
        key="" if caller.key is None else caller.key.name,
        address=caller.client.address,
        action=f"{scope['method']} {path}",
        subject=(subject or named)[:SUBJECT_CHARACTERS],
        details=details,
        http_status=status,
    )


class Methods:
    """The ASGI application of one path: each method's own, and 405 naming them all.

    `access` lets a request in to its handler, or says why not; `note` hears of changes.
    """

    def __init__(
        self, access: Access, note: Callable[[Change], None], by_method: Mapping[str, Guarded]
    ) -> None:
        self._access = access
        self._note = note
        self.by_method = by_method

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        guarded = self.by_method.get(scope["method"])
        if scope["path"].endswith("\n"):  # which Starlette's patterns pass over
            await _text("404 page not found", 404)(scope, receive, send)
            return
        if guarded is None:
            headers = {"allow": ", ".join(sorted(self.by_method, key=ALLOWED.index))}
            await _text("405 method not allowed", 405, headers)(scope, receive, send)
            return
        try:
            self._access.admit(scope, guarded.right)
        except Denied as denied:
            await refusal(scope, denied)(scope, receive, send)
            return
        if guarded.changes:
            send = self._noting(scope, guarded, send)
        await guarded.app(scope, receive, send)

    def _noting(self, scope: Scope, guarded: Guarded, send: Send) -> Send:
        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                status = message["status"]
                # What is answered 503 after it was told counts, but is not in the database yet.
                # A machine that registers again changes nothing.
                done = status < 400 or (status == 503 and ABOUT in scope)
                if done and (not guarded.right & Right.ASK or status == 201):
                    self._note(change_of(scope, guarded.changes, status))
            await send(message)

        return noting


def refusal(scope: Scope, denied: Denied) -> Response:
    """The answer to a request that may not come in, in the dialect of its route."""
    path: str = scope["path"]
    takes_key = denied.status == 401 or caller_of(scope).key is not None
    if path == "/dashboard" and takes_key and _wants_html(scope):
        return login_page(str(denied), denied.status)
    return error_reply(denied, dialect_of(path))


def _wants_html(scope: Scope) -> bool:
    return "text/html" in (first(scope["headers"], b"accept") or "")


class Gate:
    """ASGI middleware: who sends a request is known to all that comes after it."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._identify = access.identify

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Serve one request; no coroutine of its own, which each step of an answer would pass."""
        if scope["type"] == "http":
            self._identify(scope)
        return self._app(scope, receive, send)


class AccessLog:
    """ASGI middleware: each request is a line of the log, once it has ended."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, size, request = time.monotonic(), 0, 0, None

        async def counted(message: Message) -> None:
            nonlocal status, size, request
            if message["type"] == "http.response.start":
                status = message["status"]
                request = first(message.get("headers", ()), b"x-ollama-coordinator-request")
            else:
                size += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, counted)
        finally:
            facts = {
                "client": caller_of(scope).name,
                "method": scope["method"],
                "path": scope["path"],  # the query, and a key in the path, stay out of logs
                "status": status or CLIENT_LEFT,
                "bytes": size,
                "seconds": round(time.monotonic() - began, 4),
                "request": request,
            }
            access_log.info("request", extra=facts)


def _changes(method: str, right: Right) -> bool:
    """Whether a route changes something: a log-in, and what needs one of these rights."""
    if method in SAFE_METHODS:
        return False
    return right == FREE or bool(right & (Right.MANAGE | Right.OPERATE | Right.ASK))


def gathered(
    access: Access, endpoints: Iterable[Endpoint], note: Callable[[Change], None]
) -> list[Route]:
    """The endpoints as routes, one a path, so that a 405 names all the methods of its path.

    Left to itself the router stops at the first route of a path.
    """
    by_path: dict[str, dict[str, Guarded]] = {}
    for endpoint in endpoints:
        route = Route(endpoint.path, endpoint.handler, methods=[endpoint.method])
        methods = by_path.setdefault(endpoint.path, {})
        for method in route.methods or ():
            if method != "HEAD" or endpoint.path not in WITHOUT_HEAD:
                changes = endpoint.path if _changes(method, endpoint.right) else ""
                methods.setdefault(method, Guarded(endpoint.right, route.app, changes))
    return [Route(path, Methods(access, note, methods)) for path, methods in by_path.items()]


class Shortcut:
    """ASGI middleware: the routes of these paths are found without the router's patterns.

    Their handlers answer their own errors, so they need nothing of what Starlette does around one.
    """

    def __init__(self, app: ASGIApp, routes: Iterable[BaseRoute], paths: Iterable[str]) -> None:
        self._app = app
        wanted = frozenset(paths)
        self._found = {
            route.path: route.app
            for route in routes
            if isinstance(route, Route) and route.path in wanted
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        app = self._found.get(scope.get("path", ""), self._app)
        await app(scope, receive, send)


async def _refuse_websocket(send: Send) -> None:
    """Answer a WebSocket where Hypercorn serves alone; our own server leaves it to its route."""
    body = msgspec.json.encode({"error": NO_HTTP1})
    headers = [(b"content-type", JSON.encode()), (b"content-length", b"%d" % len(body))]
    await send({"type": "websocket.http.response.start", "status": 501, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body, "more_body": False})


class NearMiss:
    """The answer to a path without a route: a redirect for a slash too many, else Ollama's 404."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "websocket":
            await _refuse_websocket(send)
            return
        await self._answer(scope)(scope, receive, send)

    def _answer(self, scope: Scope) -> Response:
        path: str = scope["path"]
        raw = scope["raw_path"].decode("latin-1")
        if raw == "*":  # the server as a whole: RFC 9110, section 9.3.7
            return Response(status_code=200 if scope["method"] == "OPTIONS" else 400)
        if raw.startswith("/") and (clean := clean_path(raw)) != raw:
            return _redirect(clean, 307, scope)
        trimmed = path.rstrip("/")
        if trimmed and trimmed != path and self._serves({**scope, "path": trimmed}):
            status = 301 if scope["method"] == "GET" else 307
            return _redirect(quote(trimmed, safe=IN_PATHS), status, scope)
        return _text("404 page not found", 404)

    def _serves(self, scope: Scope) -> bool:
        for route in self._routes:
            match, _ = route.matches(scope)
            if match is Match.FULL:
                return isinstance(route.app, Methods) and scope["method"] in route.app.by_method
        return False


def clean_path(path: str) -> str:
    """A path as Go's router wants it: without empty, `.` and `..` segments; a last slash stays."""
    kept: list[str] = []
    for segment in path.split("/"):
        if segment == "..":
            del kept[-1:]
        elif segment not in ("", "."):
            kept.append(segment)
    return "/" + "/".join(kept) + ("/" if kept and path.endswith("/") else "")


def _redirect(path: str, status: int, scope: Scope) -> Response:
    """A redirect, below the key that stood in the path, with the page that Go's servers add."""
    query = scope["query_string"].decode("latin-1")
    target = f"{scope.get('key_prefix', '')}{path}" + (f"?{query}" if query else "")
    if scope["method"] not in ("GET", "HEAD"):
        return Response(status_code=status, headers={"location": target})
    page = f'<a href="{escape(target)}">{HTTPStatus(status).phrase}</a>.\n\n'
    return Response(page, status, {"location": target}, "text/html; charset=utf-8")
