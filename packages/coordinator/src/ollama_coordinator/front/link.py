"""One connection of a link, from an agent through a front to the leader."""

import asyncio
import ssl
from hashlib import sha256
from typing import cast
from urllib.parse import urlsplit

import msgspec
from starlette.types import Scope

from ollama_coordinator.api.http.errors import HttpError
from ollama_coordinator.api.http.headers import first
from ollama_coordinator.api.http.routing import NO_HTTP1
from ollama_coordinator.carry import FRONT
from ollama_coordinator.clock import Clock
from ollama_coordinator.http1 import CLIENT_CONNECTION, EXCHANGE, ClientConnection, Exchange
from ollama_coordinator_common.pump import Pipe

HEAD_SECONDS = 10.0
"""For the leader to take a connection and to answer its head."""

NOT_PASSED = (FRONT, b"content-length", b"transfer-encoding")
"""Of the head; a body does not pass, and the leader would wait for it."""

NOBODY_LEADS = "none of the coordinators leads now; please try again"


def target(scope: Scope) -> str:
    query = scope["query_string"].decode("latin-1")
    path: str = scope["raw_path"].decode("latin-1")
    return f"{path}?{query}" if query else path


def is_link(scope: Scope) -> bool:
    """Whether an agent opens a connection of its link; nothing else is upgraded."""
    path: str = scope["path"]
    upgrade = (first(scope["headers"], b"upgrade") or "").lower()
    return upgrade == "websocket" and path.startswith("/api/agents/") and path.endswith("/link")


async def pass_link_on(
    scope: Scope,
    url: str,
    path: str,
    credentials: bytes,
    certificate: bytes | None,
    clock: Clock,
) -> None:
    """Join the connection with one to the leader at a URL, until both have ended.

    `credentials`: what shows that a coordinator speaks, and for which client.

    Raises:
        HttpError: the leader does not take the connection.
    """
    exchange: Exchange | None = scope["state"].get(EXCHANGE)
    client: ClientConnection | None = scope["state"].get(CLIENT_CONNECTION)
    if exchange is None or client is None:
        raise HttpError(501, NO_HTTP1)
    where = urlsplit(url)
    head = [f"GET {path} HTTP/1.1".encode(), b"%b: %b" % (FRONT, credentials)]
    head += [b"%b: %b" % pair for pair in scope["headers"] if pair[0] not in NOT_PASSED]
    far, near = Pipe(), Pipe()
    try:
        async with clock.timeout(HEAD_SECONDS):
            reader, writer = await asyncio.open_connection(
                where.hostname, where.port, ssl=_unverified() if where.scheme == "https" else None
            )
        _check(writer, certificate)
    except OSError as exc:
        raise HttpError(503, NOBODY_LEADS) from exc
    try:
        async with clock.timeout(HEAD_SECONDS):
            writer.write(b"\r\n".join([*head, b"", b""]))
            status, answered = await _head_of_answer(reader)
            if status != 101:
                length = int(first(answered, b"content-length") or 0)
                text = (await reader.readexactly(min(length, 4096))).decode("utf-8", "replace")
                raise HttpError(status, _error_in(text))
        client.of_link = True
        _take_over(exchange.hand_over(answered), near)
        _take_over(cast(asyncio.Transport, writer.transport), far)
        reader.feed_eof()
        near.send(await reader.read())
        far.join(near)
        await near.ended.wait()
        await far.ended.wait()
    except (OSError, EOFError, asyncio.LimitOverrunError) as exc:
        raise HttpError(503, NOBODY_LEADS) from exc
    finally:
        near.reset()
        far.reset()
        writer.transport.abort()


def _unverified() -> ssl.SSLContext:
    """No authority vouches for a coordinator's certificate, which the database names."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _check(writer: asyncio.StreamWriter, certificate: bytes | None) -> None:
    """Send nothing to whoever shows another certificate.

    Raises:
        OSError: it is another one.
    """
    connection = writer.get_extra_info("ssl_object")
    if connection is None:
        return
    shown = connection.getpeercert(binary_form=True) or b""
    if certificate is None or sha256(shown).digest() != certificate:
        writer.transport.abort()
        raise OSError("the leader shows another certificate than the database names")


def _take_over(transport: asyncio.Transport, pipe: Pipe) -> None:
    transport.set_protocol(pipe)
    pipe.connection_made(transport)


async def _head_of_answer(reader: asyncio.StreamReader) -> tuple[int, list[tuple[bytes, bytes]]]:
    """Status and headers of a coordinator's answer."""
    first_line, *lines = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")[:-2]
    pairs = (line.partition(b":") for line in lines)
    return int(first_line.split()[1]), [(name.lower(), value.strip()) for name, _, value in pairs]


def _error_in(text: str) -> str:
    try:
        return str(msgspec.json.decode(text, type=dict[str, str])["error"])
    except (msgspec.DecodeError, KeyError):
        return text
