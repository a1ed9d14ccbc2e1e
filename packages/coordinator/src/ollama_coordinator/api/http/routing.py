"""How Ollama's router answers: several methods on one path, wrong methods, slashes too many."""

from collections.abc import Iterable, Mapping, Sequence

from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

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


def _text(text: str, status: int, headers: Mapping[str, str] | None = None) -> Response:
    """Plain text as Go's router sends it, with no charset."""
    return Response(text, status, {"content-type": "text/plain", **(headers or {})})


class Methods:
    """The ASGI application of one path: each method's own, and 405 naming them all."""

    def __init__(self, by_method: Mapping[str, ASGIApp]) -> None:
        self.by_method = by_method

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        app = self.by_method.get(scope["method"])
        if app is None:
            headers = {"allow": ", ".join(sorted(self.by_method))}
            app = _text("405 method not allowed", 405, headers)
        await app(scope, receive, send)


def gathered(routes: Iterable[BaseRoute]) -> list[BaseRoute]:
    """The routes with one entry a path, so that a wrong method is told of all the right ones.

    Left to itself the router stops at the first route of a path.
    """
    by_path: dict[str, dict[str, ASGIApp]] = {}
    others: list[BaseRoute] = []
    for route in routes:
        if not isinstance(route, Route) or route.methods is None:
            others.append(route)
            continue
        methods = by_path.setdefault(route.path, {})
        for method in route.methods:
            if method != "HEAD" or route.path not in WITHOUT_HEAD:
                methods.setdefault(method, route.app)
    return [*(Route(path, Methods(methods)) for path, methods in by_path.items()), *others]


class NearMiss:
    """What answers when no route does: a redirect for a slash too many, else Ollama's 404."""

    def __init__(self, routes: Sequence[BaseRoute]) -> None:
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await self._answer(scope)(scope, receive, send)

    def _answer(self, scope: Scope) -> Response:
        path: str = scope["path"]
        trimmed = path.rstrip("/")
        if trimmed and trimmed != path and self._serves({**scope, "path": trimmed}):
            query = scope["query_string"].decode("latin-1")
            target = f"{trimmed}?{query}" if query else trimmed
            return RedirectResponse(target, 301 if scope["method"] == "GET" else 307)
        return _text("404 page not found", 404)

    def _serves(self, scope: Scope) -> bool:
        for route in self._routes:
            match, _ = route.matches(scope)
            if match is Match.FULL and isinstance(route, Route):
                endpoint = route.endpoint
                return isinstance(endpoint, Methods) and scope["method"] in endpoint.by_method
        return False
