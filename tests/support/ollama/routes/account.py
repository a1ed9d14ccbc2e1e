"""The account of the node's key at ollama.com, and what is proxied there."""

from __future__ import annotations

from aiohttp import web

from support.ollama.exchange import Exchange
from support.ollama.wire import ApiError

from .lookup import SIGNIN_URL, cloud_refusal


async def me(exchange: Exchange) -> web.StreamResponse:
    return exchange.json({"id": "stand-in", "name": _user(exchange), "email": ""})


async def signout(exchange: Exchange) -> web.StreamResponse:
    _user(exchange)
    exchange.node.settings.signed_in_as = None
    return exchange.json(None)


async def web_tool(exchange: Exchange) -> web.StreamResponse:
    """Search and fetch, for those that are signed in; a stand-in finds nothing."""
    what = exchange.path.rpartition("_")[2]
    refusal = cloud_refusal(exchange.node, f"web {what} is unavailable")
    if refusal is not None:
        raise refusal
    return exchange.json({"results": []})


def _user(exchange: Exchange) -> str:
    user = exchange.node.settings.signed_in_as
    if user is None:
        raise ApiError(401, "unauthorized", signin_url=SIGNIN_URL)
    return user
