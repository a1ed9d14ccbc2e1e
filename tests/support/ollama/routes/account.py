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
    """Search and fetch, which a stand-in never does: it is refused, or told to sign in."""
    raise cloud_refusal(exchange.node, "web search and fetch are unavailable")


def _user(exchange: Exchange) -> str:
    user = exchange.node.settings.signed_in_as
    if user is None:
        raise ApiError(401, "unauthorized", signin_url=SIGNIN_URL)
    return user
