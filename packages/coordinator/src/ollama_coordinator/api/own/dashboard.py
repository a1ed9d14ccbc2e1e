"""`/dashboard`: the page's files and the event stream it listens to."""

import gzip
import re
from contextlib import aclosing
from functools import cache
from hashlib import sha256
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import Receive, Scope, Send

from ollama_coordinator.api.http.body_timeout import until_disconnect
from ollama_coordinator.api.http.errors import SECURITY, ClientLeft
from ollama_coordinator.api.http.openapi import Media, RouteDescription, operation
from ollama_coordinator.parts import Parts

EVENT_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    # Reverse proxies buffer a body unless they know that it is a stream.
    "x-accel-buffering": "no",
    "x-content-type-options": "nosniff",
}


KINDS = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "txt": "text/plain; charset=utf-8",
}
WORTH_COMPRESSING_BYTES = 500
"""A shorter file hardly becomes shorter."""


RUNNING = "Ollama is running"
"""Clients look for these words, some of them with a browser's `Accept`."""

_PREFIX = re.compile(r"(?:/[A-Za-z0-9._~-]+)+")


class File(Struct, frozen=True):
    """One file as it is sent; `packed` is empty where compressing it gains nothing."""

    kind: str
    body: bytes
    packed: bytes
    tag: str
    for_ever: bool


@cache
def all_files() -> dict[str, File]:
    """Every file of the dashboard by its path below it."""
    return dict(_walk(files("ollama_coordinator") / "dashboard", ""))


def _walk(folder: Traversable, prefix: str) -> list[tuple[str, File]]:
    found: list[tuple[str, File]] = []
    for entry in folder.iterdir():
        path = prefix + entry.name
        if entry.is_dir():
            found += _walk(entry, path + "/")
        elif (kind := KINDS.get(entry.name.rpartition(".")[2])) is not None:
            found.append((path, _file(path, kind, entry.read_bytes())))
    return found


def _file(path: str, kind: str, body: bytes) -> File:
    packed = gzip.compress(body, 9, mtime=0) if len(body) > WORTH_COMPRESSING_BYTES else b""
    # A vendored file has its version in its name, so its content never changes.
    for_ever = path.startswith("vendor/")
    return File(kind, body, packed, sha256(body).hexdigest()[:24], for_ever)


def send_file(file: File, request: Request) -> Response:
    """A file, or that the browser has it already."""
    packed = bool(file.packed) and "gzip" in request.headers.get("accept-encoding", "")
    tag = f'"{file.tag}-gzip"' if packed else f'"{file.tag}"'
    headers = {
        **SECURITY,
        "etag": tag,
        "vary": "accept-encoding",
        "cache-control": "public, max-age=31536000, immutable" if file.for_ever else "no-cache",
    }
    known = request.headers.get("if-none-match", "")
    if tag in (part.strip().removeprefix("W/") for part in known.split(",")):
        return Response(status_code=304, headers=headers)
    if packed:
        headers["content-encoding"] = "gzip"
    return Response(file.packed if packed else file.body, headers=headers, media_type=file.kind)


class DashboardApi:
    """The handlers of the dashboard's files."""

    async def root(self, request: Request) -> Response:
        """`GET /`: the dashboard for a browser, Ollama's own text for any other client."""
        if "text/html" in request.headers.get("accept", ""):
            prefix = request.headers.get("x-forwarded-prefix", "").rstrip("/")
            # Without a prefix relative: a proxy that serves us below another path may not say so.
            where = f"{prefix}/dashboard" if _PREFIX.fullmatch(prefix) else "dashboard"
            headers = {"location": where, "vary": "accept, x-forwarded-prefix"}
            return Response(RUNNING, 307, headers, media_type="text/plain")
        return Response(RUNNING, media_type="text/plain")

    @operation(
        gives={
            200: (Media("text/html"), Media("*/*")),
            304: None,
            307: None,
            404: Media("text/plain"),
        }
    )
    async def page(self, request: Request) -> Response:
        """The dashboard and its files."""
        path = request.path_params.get("path")
        if path == "":
            # The page's addresses are relative to `/dashboard`.
            return RedirectResponse("../dashboard", 307)
        path = path or "index.html"
        file = all_files().get(path)
        if file is None:
            return Response("404 page not found", 404, headers=SECURITY, media_type="text/plain")
        return send_file(file, request)


class EventsApi:
    """`GET /dashboard/events` as a plain ASGI application: one viewer of the feed."""

    operation = RouteDescription(
        "Changes of the fleet, as server-sent events", gives={200: Media("text/event-stream")}
    )

    def __init__(self, parts: Parts) -> None:
        self._feed = parts.feed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the viewer leaves or the coordinator stops."""
        last_id = dict(scope["headers"]).get(b"last-event-id", b"").decode("latin-1")
        headers = [(name.encode(), value.encode()) for name, value in EVENT_HEADERS.items()]
        try:
            async with until_disconnect(scope, receive):
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                if scope["method"] != "HEAD":
                    await self._send_all(last_id, send)
                await send(_body(b"", more=False))
        except ClientLeft:
            return

    async def _send_all(self, last_id: str, send: Send) -> None:
        async with aclosing(self._feed.follow(last_id)) as events:
            async for event in events:
                await send(_body(event, more=True))


def _body(data: bytes, *, more: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}
