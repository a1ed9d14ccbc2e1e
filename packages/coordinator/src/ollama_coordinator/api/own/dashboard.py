"""`/dashboard`: the page's files and the event stream it listens to."""

import gzip
from collections.abc import Awaitable, Callable
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
from ollama_coordinator.api.http.errors import ClientLeft, reply
from ollama_coordinator.api.http.openapi import Media, Operation, operation
from ollama_coordinator.clock import Clock
from ollama_coordinator.feed import Feed, Rows
from ollama_coordinator.journal import AgentEvent, Observation
from ollama_coordinator.registry import AgentState, Registry
from ollama_coordinator.scheduler import Estimate

Handler = Callable[[Request], Awaitable[Response]]

EVENT_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    # Reverse proxies buffer what they do not know to be a stream.
    "x-accel-buffering": "no",
    "x-content-type-options": "nosniff",
}


class DashboardApi:
    """The handlers of the dashboard; `plain_root` answers `/` to everybody but browsers."""

    def __init__(self, plain_root: Handler) -> None:
        self._plain_root = plain_root

    async def root(self, request: Request) -> Response:
        """`GET /`: a browser is sent to the dashboard, any other client learns who runs here."""
        if "text/html" in request.headers.get("accept", ""):
            return RedirectResponse("/dashboard", 307, headers={"vary": "accept"})
        return await self._plain_root(request)

    @operation(
        "The dashboard and its files",
        gives={200: (Media("text/html"), Media("*/*")), 304: None, 404: Media("text/plain")},
    )
    async def page(self, request: Request) -> Response:
        """`GET /dashboard` and the files below it."""
        path = request.path_params.get("path") or "index.html"
        file = all_files().get(path)
        if file is None:
            return Response("404 page not found", 404, headers=SECURITY, media_type="text/plain")
        return send_file(file, request)


class EventsApi:
    """`GET /dashboard/events` as a plain ASGI application: one viewer of the feed."""

    operation = Operation(
        "What changes in the fleet, as server-sent events", gives={200: Media("text/event-stream")}
    )

    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the viewer leaves or the coordinator stops."""
        last_id = dict(scope["headers"]).get(b"last-event-id", b"").decode("latin-1")
        headers = [(name.encode(), value.encode()) for name, value in EVENT_HEADERS.items()]
        try:
            async with until_disconnect(receive):
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


class ModelOnAgent(Struct, frozen=True):
    """One model on an agent's disk, and what is predicted of it there."""

    name: str
    size: int
    digest: str
    details: dict[str, Any]
    capabilities: list[str]
    loaded: bool
    estimate: Estimate | None


class AgentDetails(Struct, frozen=True):
    """`GET /api/agents/{id}/details`: `agent` is its row in the event stream."""

    agent: dict[str, Any]
    models: list[ModelOnAgent]
    events: list[AgentEvent]


class DetailsApi:
    """`GET /api/agents/{id}/details`: everything the agent's page shows beside the live row."""

    def __init__(
        self, registry: Registry, observation: Observation, rows: Rows, clock: Clock
    ) -> None:
        self._registry = registry
        self._observation = observation
        self._rows = rows
        self._clock = clock

    @operation(
        "An agent's models with what is predicted of them, and what was logged about it",
        gives={200: AgentDetails},
        errors=(404,),
    )
    async def show(self, request: Request) -> Response:
        """Its models with what is predicted of them, and what was logged about it."""
        agent = self._registry.get(request.path_params["agent_id"])
        return reply(
            AgentDetails(
                agent=self._rows.agent(agent),
                models=[self._model(agent, key) for key in sorted(agent.inventory.available)],
                events=self._observation.events.of(agent.id),
            )
        )

    def _model(self, agent: AgentState, key: str) -> ModelOnAgent:
        row = agent.inventory.available[key]
        return ModelOnAgent(
            name=row.model.name,
            size=row.model.size,
            digest=row.model.digest,
            details=row.model.details,
            capabilities=row.model.capabilities,
            loaded=agent.inventory.is_loaded(key),
            estimate=self._rows.estimate(agent.id, key),
        )


KINDS = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "txt": "text/plain; charset=utf-8",
}
WORTH_COMPRESSING_BYTES = 500

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
