"""The connections to the agents: kept from one request to the next, and how they are made."""

import asyncio
import socket
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import aiohttp
from aiohttp import AddrInfoType
from aiohttp.abc import AbstractStreamWriter

CONNECT_SECONDS = 3.0
"""A machine on a network answers a connection within milliseconds or not at all."""

STALE_SECONDS = 1.0
"""How soon a request fails on a connection that its agent had closed: after a round trip."""

KEEPALIVE_IDLE_SECONDS = 10
KEEPALIVE_INTERVAL_SECONDS = 5
KEEPALIVE_PROBES = 3
UNACKNOWLEDGED_MILLISECONDS = 20_000

Headers = list[tuple[str, str]]


class LargeBody(aiohttp.Payload):
    """A request body sent in slices, so that neither a copy of it nor a long write is made."""

    SLICE_BYTES = 256 * 1024

    def __init__(self, value: bytes) -> None:
        super().__init__(value, content_type="application/octet-stream")
        self._size = len(value)

    async def write(self, writer: AbstractStreamWriter) -> None:
        """Send it; waits whenever the agent does not keep up."""
        whole = memoryview(self._value)
        for start in range(0, len(whole), self.SLICE_BYTES):
            await writer.write(whole[start : start + self.SLICE_BYTES])

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """The body as text; nobody here asks for it."""
        return str(self._value, encoding, errors)


class _Passage:
    """How a request went out.

    `reused` is a connection that had served another one before; `sent_at` is when the last part
    of the request went out, on the clock of the event loop.
    """

    def __init__(self) -> None:
        self.reused = False
        self.sent_at = 0.0

    @staticmethod
    async def reuse(session: aiohttp.ClientSession, context: SimpleNamespace, _: object) -> None:
        """Called by aiohttp for each request that gets a kept connection."""
        context.trace_request_ctx.reused = True
        context.trace_request_ctx.sent_at = asyncio.get_running_loop().time()

    @staticmethod
    async def send(session: aiohttp.ClientSession, context: SimpleNamespace, _: object) -> None:
        """Called by aiohttp for each part of a body."""
        context.trace_request_ctx.sent_at = asyncio.get_running_loop().time()

    def is_stale(self, exc: Exception, now: float) -> bool:
        """Whether the agent most likely closed the connection before it saw the request."""
        at_once = now - self.sent_at <= STALE_SECONDS
        return self.reused and at_once and not _began(exc)


class Pool:
    """Connections to all agents; open between `async with` only.

    A kept connection that its agent closes just when a request goes out says nothing about the
    agent: where it ends at once and no byte of an answer came, the request is sent once more, on
    a new connection. One that ends later may have been worked on meanwhile, as in a cold load.
    """

    def __init__(self) -> None:
        self._kept: aiohttp.ClientSession | None = None
        self._fresh: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "Pool":
        noting = aiohttp.TraceConfig()
        noting.on_connection_reuseconn.append(_Passage.reuse)
        noting.on_request_chunk_sent.append(_Passage.send)
        self._kept = _session(keepalive_timeout=60, trace_configs=[noting])
        self._fresh = _session(force_close=True)
        return self

    async def __aexit__(self, *raised: object) -> None:
        for session in (self._kept, self._fresh):
            if session is not None:
                await session.close()

    async def send(
        self,
        method: str,
        url: str,
        headers: Headers,
        body: bytes,
        stream: AsyncIterator[bytes] | None,
    ) -> aiohttp.ClientResponse:
        """Send a request; the answer, once its head is here.

        Raises:
            aiohttp.ClientError, TimeoutError, OSError, UnicodeError: there is none.
        """
        if self._kept is None or self._fresh is None:
            raise RuntimeError("the upstream connections are not open")
        passage = _Passage()
        try:
            return await self._kept.request(
                method,
                url,
                headers=headers,
                data=_payload(body) if stream is None else stream,
                allow_redirects=False,
                trace_request_ctx=passage,
            )
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as exc:
            now = asyncio.get_running_loop().time()
            if stream is not None or not passage.is_stale(exc, now):
                raise
        return await self._fresh.request(
            method, url, headers=headers, data=_payload(body), allow_redirects=False
        )


def _payload(body: bytes) -> bytes | LargeBody | None:
    return LargeBody(body) if len(body) > LargeBody.SLICE_BYTES else body or None


def _session(
    *, trace_configs: list[aiohttp.TraceConfig] | None = None, **connections: Any
) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        auto_decompress=False,
        # What an agent gives one client to remember is not for the next.
        cookie_jar=aiohttp.DummyCookieJar(),
        connector=aiohttp.TCPConnector(
            limit=0, socket_factory=_socket, ttl_dns_cache=60, **connections
        ),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        read_bufsize=2**18,
        trace_configs=trace_configs,
    )


def _began(exc: Exception) -> bool:
    """Whether a part of an answer's head had come before the connection ended."""
    return isinstance(exc, aiohttp.ServerDisconnectedError) and not isinstance(exc.message, str)


def _socket(address: AddrInfoType) -> socket.socket:
    """A socket that notices a vanished machine within half a minute, where the platform can."""
    family, kind, protocol, _, _ = address
    sock = socket.socket(family, kind, protocol)
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_IDLE_SECONDS),
        ("TCP_KEEPALIVE", KEEPALIVE_IDLE_SECONDS),
        ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL_SECONDS),
        ("TCP_KEEPCNT", KEEPALIVE_PROBES),
        ("TCP_USER_TIMEOUT", UNACKNOWLEDGED_MILLISECONDS),
    ):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return sock
