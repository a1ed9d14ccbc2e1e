"""The route table: every path of the node, what answers it, and how near misses are answered."""

from __future__ import annotations

import html
import posixpath
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import NamedTuple

from aiohttp import web

from support.ollama.exchange import Exchange

from . import anthropic, audio, embed, inventory, native, openai, responses, transfer

Handler = Callable[[Exchange], Awaitable[web.StreamResponse]]


class Route(NamedTuple):
    handler: Handler
    reads_body: bool = False


def _get(handler: Handler, *, head: bool = False) -> dict[str, Route]:
    route = Route(handler)
    return {"GET": route, "HEAD": route} if head else {"GET": route}


def _post(handler: Handler) -> dict[str, Route]:
    return {"POST": Route(handler, reads_body=True)}


ROUTES: dict[str, dict[str, Route]] = {
    "/": _get(inventory.root, head=True),
    "/api/version": _get(inventory.version, head=True),
    "/api/status": _get(inventory.status),
    "/api/tags": _get(inventory.tags, head=True),
    "/api/ps": _get(inventory.ps),
    "/api/show": _post(inventory.show),
    "/api/generate": _post(native.generate),
    "/api/chat": _post(native.chat),
    "/api/embed": _post(embed.embed),
    "/api/embeddings": _post(embed.embeddings),
    "/api/copy": _post(inventory.copy),
    "/api/delete": {"DELETE": Route(inventory.delete, reads_body=True)},
    "/api/pull": _post(transfer.pull),
    "/api/push": _post(transfer.push),
    "/api/create": _post(transfer.create),
    "/api/me": _post(inventory.me),
    "/api/signout": _post(inventory.signout),
    "/api/experimental/web_search": _post(inventory.web_tool),
    "/api/experimental/web_fetch": _post(inventory.web_tool),
    "/v1/images/generations": _post(audio.image),
    "/v1/images/edits": _post(audio.image),
    "/v1/audio/transcriptions": {"POST": Route(audio.transcriptions)},
    "/v1/chat/completions": _post(openai.chat_completions),
    "/v1/completions": _post(openai.completions),
    "/v1/embeddings": _post(openai.embeddings),
    "/v1/responses": _post(responses.responses),
    "/v1/messages": _post(anthropic.messages),
    "/v1/models": _get(openai.models),
    "/api/experimental/model-recommendations": _get(inventory.recommendations),
}
ALLOWED = ("HEAD", "GET", "POST", "DELETE")
"""The order in which the router names the methods of a path."""

# Routes whose last segment is an argument; a `/` in it makes another path.
WITH_ARGUMENT: dict[str, dict[str, Route]] = {
    "/v1/models": _get(openai.model),
    "/api/blobs": {"HEAD": Route(transfer.blob_head), "POST": Route(transfer.blob_post)},
    "/api/user/keys": {"DELETE": Route(inventory.signout)},
}


def find(exchange: Exchange) -> Route:
    """The route of a request; for a path that is none, the route that says so."""
    path, method = exchange.path, exchange.request.method
    methods = _methods(exchange, path)
    if methods is None:
        trimmed = path.rstrip("/")
        nearby = _methods(exchange, trimmed) if path.endswith("/") else None
        return Route(_redirect if nearby and method in nearby else _not_found)
    route = methods.get(method)
    if route is None:
        exchange.argument = ", ".join(sorted(methods, key=ALLOWED.index))
        return Route(not_allowed)
    return route


def _methods(exchange: Exchange, path: str) -> dict[str, Route] | None:
    if path in exchange.node.settings.lacks:
        return None
    if path in ROUTES:
        return ROUTES[path]
    head, _, exchange.argument = path.rpartition("/")
    return WITH_ARGUMENT.get(head) if exchange.argument else None


async def _not_found(exchange: Exchange) -> web.StreamResponse:
    return exchange.text("404 page not found", 404)


async def not_allowed(exchange: Exchange) -> web.StreamResponse:
    answer = exchange.text("405 method not allowed", 405)
    answer.headers["Allow"] = exchange.argument
    return answer


async def _redirect(exchange: Exchange) -> web.StreamResponse:
    query = exchange.request.query_string
    location = exchange.path.rstrip("/") + (f"?{query}" if query else "")
    return _moved(exchange, 301 if exchange.request.method == "GET" else 307, location)


def unclean(exchange: Exchange) -> web.StreamResponse | None:
    """The redirect of a path with a doubled slash or a dot segment; it comes before all else."""
    path, _, query = exchange.request.raw_path.partition("?")
    if exchange.request.method == "CONNECT" or not path.startswith("/"):
        return None
    clean = posixpath.normpath(path).replace("//", "/", 1)
    if path.endswith("/") and clean != "/":
        clean += "/"
    if clean == path:
        return None
    return _moved(exchange, 307, clean + (f"?{query}" if query else ""))


def _moved(exchange: Exchange, status: int, location: str) -> web.StreamResponse:
    answer = exchange.nothing(status)
    if exchange.request.method in ("GET", "HEAD"):
        page = f'<a href="{html.escape(location)}">{HTTPStatus(status).phrase}</a>.\n\n'
        answer = exchange.text(page, status, "text/html; charset=utf-8")
    answer.headers["Location"] = location
    return answer
