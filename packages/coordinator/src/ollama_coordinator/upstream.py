"""The connections to the agents' Ollamas; every transport error is translated here, once.

UpstreamError
├── Unreachable   nothing of an answer arrived: refused, timed out, no HTTP
│   ├── NotConnected     no connection was made
│   │   └── Gone         but for one that ended as the request went out
│   ├── TimedOut         no whole answer in time
│   └── ConnectionLost   the connection ended after the request had gone out
│       └── LostTwice    as did the one on which it was sent once more
├── Cut           the answer ended before its end
├── AgentLost     somebody else found out that the agent does not answer any more
├── ModelStuck    the agent answers, but not for this model
├── TakenBack     another agent serves the request sooner
└── RequestCancelled   an operator ended the request; the agent is well
"""

import asyncio
import errno
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextvars import ContextVar
from functools import partial
from secrets import token_hex
from typing import Any

import aiohttp
from aiohttp import AddrInfoType
from aiohttp.abc import AbstractStreamWriter
from aiohttp.client_proto import ResponseHandler
from aiohttp.http import RawResponseMessage
from yarl import URL

from ollama_coordinator_common.error import OllamaCoordinatorError
from ollama_coordinator_common.network import (
    LINK_DOMAIN,
    cause_of,
    is_no_machine,
    keep_alive,
    parse_address,
)

from .clock import Clock
from .link import KeyAt, LinkConnector, Links, no_key

log = logging.getLogger(__name__)

VIA_HEADER = "X-Ollama-Coordinator-Via"
"""The coordinators that a request has passed, by a random id of each process: no Ollama reads it,
a coordinator refuses a request that it has sent itself (RFC 5842, 508 Loop Detected)."""

passed: ContextVar[str] = ContextVar("passed", default="")
"""`VIA_HEADER` of the request that is served; what is sent and started for it passes it on."""

CONNECT_SECONDS = 3.0
"""A machine on a network answers a connection within milliseconds or not at all."""

LAG_TRIES = 3
"""Repetitions of what timed out while our event loop lagged: one that always lags must end too."""

STALE_SECONDS = 1.0
"""A request on a connection that its agent had closed fails after a round trip, hence within it."""

KEPT_SECONDS = 60.0
"""An idle connection is kept so long. Ollama itself never closes one, a proxy before it may."""

DNS_SECONDS = 60
"""How long a name's addresses are kept: agents with a new address register it."""

READ_BUFFER_BYTES = 256 * 1024
"""An agent that is faster than its client is read this far ahead, twice over."""

KEEPALIVE_IDLE_SECONDS = 10
KEEPALIVE_INTERVAL_SECONDS = 5
KEEPALIVE_PROBES = 3
"""TCP asks a silent machine after 10 s, and gives it up 15 s later: within half a minute."""

SMALL_ANSWER_BYTES = 1024 * 1024
"""Of a version, a setting, an error: Ollama sends some hundred."""

MOST_INTERIM = 8
"""1xx responses before one answer; Ollama sends at most the one that asks for a body."""

UNACKNOWLEDGED_MILLISECONDS = 20_000
"""The same for a machine that does not acknowledge what it is sent."""


NO_KEYS: Mapping[str, str] = {}


def bearer(key: str) -> tuple[str, str]:
    """The header with an API key (RFC 6750)."""
    return ("Authorization", f"Bearer {key}")


class UpstreamError(OllamaCoordinatorError):
    """An agent's Ollama did not give a whole answer."""


class Unreachable(UpstreamError):
    """Nothing of an answer arrived."""


class NotConnected(Unreachable):
    """There was no connection: the request has not reached the agent, and did no work there."""


class Gone(NotConnected):
    """The kept connection ended as the request went out, and there is no other to be had.

    Either the agent's Ollama was stopped just then and never saw the request, or died of it.
    """


class TimedOut(Unreachable):
    """There was no whole answer in time."""


class ConnectionLost(Unreachable):
    """The connection ended after the request had gone out, before an answer."""


class LostTwice(ConnectionLost):
    """So did the new connection, on which the request was sent once more."""


class Cut(UpstreamError):
    """The answer ended before its end."""


class AgentLost(UpstreamError):
    """Somebody else found out that the agent does not answer any more."""


class ModelStuck(UpstreamError):
    """The monitor found out that the agent does not answer for this model."""


class TakenBack(UpstreamError):
    """Another agent serves the request sooner; this one is well."""


class RequestCancelled(UpstreamError):
    """An operator ended the request; the agent is well."""


SendAgain = Callable[[float], bool]
"""Whether a request may be sent once more, whose connection had been idle for so many seconds."""


def _always(idle_seconds: float) -> bool:
    return True


class Upstreams:
    """The connections to all agents' Ollamas; open between `async with` only.

    There is no total and no read time-out: a cold load or a long prompt may be silent for minutes.
    A machine that vanished is noticed by TCP itself (keep-alive, unacknowledged data) and by the
    monitor's probes.

    `api_keys` are by URLs of Ollamas. A request gets the key of its own Ollama and of no other; no
    redirect is followed. `relay_key_at` is what connections to relays begin with.

    A kept connection that its agent closes just when a request goes out says nothing about the
    agent. Where it ends at once and before a byte of an answer, the request is sent once more, on
    a new connection. One that ends later may have been worked on meanwhile, as in a cold load.
    """

    def __init__(
        self,
        clock: Clock | None = None,
        links: Links | None = None,
        api_keys: Mapping[str, str] = NO_KEYS,
        relay_key_at: KeyAt = no_key,
    ) -> None:
        self._clock = Clock() if clock is None else clock
        self._links = Links(self._clock) if links is None else links
        self._api_keys = api_keys
        self._relay_key_at = relay_key_at
        self.instance_id = token_hex(8)
        self._kept: aiohttp.ClientSession | None = None
        self._fresh: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "Upstreams":
        known = self._links, self._clock, self._relay_key_at
        self._kept = _session(*known, keepalive_timeout=KEPT_SECONDS)
        self._fresh = _session(*known, force_close=True)
        return self

    async def __aexit__(self, *raised: object) -> None:
        for session in (self._kept, self._fresh):
            if session is not None:
                await session.close()

    def open(
        self,
        method: str,
        url: str | URL,
        *,
        headers: Iterable[tuple[str, str]] = (),
        body: bytes | bytearray = b"",
        stream: AsyncIterator[bytes] | None = None,
        again: SendAgain = _always,
        certificate: bytes | None = None,
    ) -> "_Opened":
        """`async with` sends a request, and has the response once its headers are here.

        `stream` is a body in pieces, in place of `body`. `again`: whether it may be sent once more.
        `certificate`: the SHA-256 of the one that must be shown, in place of one that an authority
        vouches for. Leaving the block before the end of the response's body closes the connection,
        by which Ollama learns that its client has left.

        Raises (at the block's start):
            Unreachable: no headers arrived.
        """
        before = passed.get()
        via = f"{before},{self.instance_id}" if before else self.instance_id
        sent = [*headers, (VIA_HEADER, via)]
        if self._api_keys and (key := self._key_of(str(url))):
            sent.append(bearer(key))
        tls = True if certificate is None else aiohttp.Fingerprint(certificate)
        return _Opened(self._send(method, url, sent, body, stream, again, tls))

    def has_key(self, url: str) -> bool:
        """Whether the Ollama that a URL leads to has an API key, which nobody else knows."""
        return bool(self._api_keys) and bool(self._key_of(url))

    def _key_of(self, url: str) -> str:
        """The API key of the Ollama that a URL leads to; empty where it has none."""
        bases = (base for base in self._api_keys if url.startswith((f"{base}/api/", f"{base}/v1/")))
        return self._api_keys.get(max(bases, key=len, default=""), "")

    async def _send(
        self,
        method: str,
        url: str | URL,
        headers: list[tuple[str, str]],
        body: bytes | bytearray,
        stream: AsyncIterator[bytes] | None,
        again: SendAgain,
        tls: aiohttp.Fingerprint | bool,
        tries: int = LAG_TRIES,
    ) -> aiohttp.ClientResponse:
        """The response, once its headers are here.

        Raises:
            aiohttp.ClientError, TimeoutError, OSError, UnicodeError: there is none.
            Gone, LostTwice: it was sent once more.
        """
        if self._kept is None or self._fresh is None:
            raise RuntimeError("the upstream connections are not open")
        sending, began = _Sending(), self._clock.now()
        _under_way.set(sending)
        try:
            return await self._kept.request(
                method,
                url,
                headers=headers,
                data=_payload(body, sending) if stream is None else stream,
                allow_redirects=False,
                ssl=tls,
            )
        except aiohttp.ConnectionTimeoutError:
            if not tries or not self._clock.has_lagged_since(began):
                raise
            return await self._send(method, url, headers, body, stream, again, tls, tries - 1)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as exc:
            now = asyncio.get_running_loop().time()
            is_stale = stream is None and sending.was_stale(exc, now)
            if not (is_stale and again(sending.idle_seconds)):
                raise
        try:
            return await self._fresh.request(
                method,
                url,
                headers=headers,
                data=_payload(body, sending),
                allow_redirects=False,
                ssl=tls,
            )
        except aiohttp.ClientConnectorError as exc:
            _forget_frames(exc)
            raise Gone(_reason(exc)) from exc
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as exc:
            _forget_frames(exc)
            raise LostTwice(_reason(exc)) from exc

    async def fetch(
        self,
        method: str,
        url: str,
        *,
        seconds: float,
        headers: Iterable[tuple[str, str]] = (),
        body: bytes = b"",
        tries: int = LAG_TRIES,
        limit: int = SMALL_ANSWER_BYTES,
    ) -> tuple[int, bytes]:
        """A small request with a time-out for all of it: status and body.

        It is sent again, `tries` times at most, if our own event loop lagged meanwhile.

        Raises:
            Unreachable: no whole answer within `seconds`, or one of more than `limit` bytes.
        """
        began = self._clock.now()
        try:
            async with (
                self._clock.timeout(seconds),
                self.open(method, url, headers=headers, body=body) as response,
            ):
                return response.status, await whole(response, limit)
        except TimeoutError as exc:
            if tries and self._clock.has_lagged_since(began):
                tries -= 1
                return await self.fetch(
                    method,
                    url,
                    seconds=seconds,
                    headers=headers,
                    body=body,
                    tries=tries,
                    limit=limit,
                )
            other = "" if LINK_DOMAIN in url else ", or a firewall in the way"
            text = f"no answer within {seconds:g} s; is its Ollama stuck{other}?"
            raise TimedOut(text) from exc
        except Cut as exc:
            raise Unreachable(str(exc)) from exc


async def chunks(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The body as it arrives.

    Raises:
        Cut: the connection ended before the body did.
    """
    content = response.content
    try:
        while chunk := await content.readany():
            yield chunk
    except (aiohttp.ClientError, OSError) as exc:
        raise Cut(_reason(exc)) from exc


async def whole(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """The body, once it is complete.

    Raises:
        Cut: the connection ended before the body did, or the body has more than `limit` bytes.
    """
    parts: list[bytes] = []
    size = 0
    async for chunk in chunks(response):
        parts.append(chunk)
        size += len(chunk)
        if size > limit:
            raise Cut(f"answers {response.url.path} with more than {limit} bytes")
    return b"".join(parts)


class _Answers(ResponseHandler):
    """A connection's answers; one that never gets beyond 1xx ends it.

    Aiohttp takes such a head for progress and reads on, without an end and without a limit.
    """

    _interim = 0
    _answered_at = 0.0

    def set_response_params(self, **params: Any) -> None:
        """Aiohttp calls this before each request."""
        super().set_response_params(**params)
        if (sending := _under_way.get(None)) is not None:
            sending.idle_seconds = self._loop.time() - self._answered_at

    def feed_data(self, data: tuple[RawResponseMessage, Any], size: int = 0) -> None:
        """Aiohttp calls this for each head."""
        code, self._answered_at = data[0].code, self._loop.time()
        self._interim = self._interim + 1 if 100 <= code < 200 and code != 101 else 0
        if self._interim <= MOST_INTERIM:
            super().feed_data(data, size)
        elif self.transport is not None:
            self.set_exception(aiohttp.ClientError("sends one 1xx response after the other"))
            self.transport.abort()


class _Opened:
    """A response while a block uses it. The end of its connection reaches the reader of its body.

    Aiohttp 3.14 closes a connection on which it meets a malformed chunk and does not tell the
    reader of the body, which would wait for ever.
    """

    __slots__ = ("_closed", "_response", "_sending")

    def __init__(self, sending: Awaitable[aiohttp.ClientResponse]) -> None:
        self._sending = sending
        self._closed: asyncio.Future[None] | None = None

    async def __aenter__(self) -> aiohttp.ClientResponse:
        try:
            self._response = response = await self._sending
        except (aiohttp.ClientError, TimeoutError, OSError, UnicodeError) as exc:
            _forget_frames(exc)
            raise _kind(exc)(_reason(exc)) from exc
        connection = response.connection
        protocol = connection.protocol if connection is not None else None
        self._closed = closed = protocol.closed if protocol is not None else None
        if closed is not None:
            # One connection serves many responses: there is one `_seen` a connection.
            closed.remove_done_callback(_seen)
            closed.add_done_callback(_seen)
            closed.add_done_callback(self._on_closed)
        return response

    async def __aexit__(self, *raised: object) -> None:
        if self._closed is not None:
            self._closed.remove_done_callback(self._on_closed)
        response = self._response
        response.release() if response.content.is_eof() else response.close()

    def _on_closed(self, _: object) -> None:
        content = self._response.content
        if not content.is_eof() and content.exception() is None:
            content.set_exception(aiohttp.ClientPayloadError("the connection was closed"))


def _forget_frames(exc: BaseException | None) -> None:
    """Drop the tracebacks of an error and of those behind it.

    Aiohttp's frames have a name for the error that they raise: a cycle, by which the body of the
    request would stay until a full collection.
    """
    while exc is not None:
        exc.__traceback__ = None
        exc = exc.__cause__ or exc.__context__ or getattr(exc, "os_error", None)


def _seen(closed: asyncio.Future[None]) -> None:
    """Take note of a reset, which asyncio would otherwise log as overlooked."""
    if not closed.cancelled():
        closed.exception()


def _kind(exc: Exception) -> type[Unreachable]:
    """Whether there was a connection, and it ended."""
    if isinstance(exc, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        return NotConnected
    ended = aiohttp.ServerDisconnectedError | aiohttp.ClientOSError | ConnectionError
    return ConnectionLost if isinstance(exc, ended) else Unreachable


_RESET = (errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE)


def _reason(exc: Exception) -> str:
    """What an operator understands of a transport error."""
    if isinstance(exc, aiohttp.ConnectionTimeoutError | aiohttp.ServerTimeoutError):
        advice = "does a firewall on that machine let this port in?"
        return f"no connection within {CONNECT_SECONDS:g} s; {advice}"
    if isinstance(exc, aiohttp.InvalidURL | UnicodeError):
        return f"has no address that can be reached: {exc}"
    if isinstance(exc, aiohttp.ClientResponseError):
        return "answers in no form of HTTP"
    if isinstance(exc, aiohttp.ClientConnectorCertificateError | aiohttp.ClientConnectorError):
        return f"cannot connect: {cause_of(exc)}"
    if isinstance(exc, aiohttp.ServerDisconnectedError):
        return "closed the connection without an answer"
    if isinstance(exc, aiohttp.ClientPayloadError):
        return "closed the connection in the middle of the answer"
    if isinstance(exc, ConnectionResetError) or getattr(exc, "errno", None) in _RESET:
        return "reset the connection"
    return cause_of(exc)


# ── sending ───────────────────────────────────────────────────────────────────────────────────


_under_way: ContextVar["_Sending"] = ContextVar("_under_way")
"""What this task sends: aiohttp's tracing would say which connection it got, at a high price."""


class _Sending:
    """How a request is sent.

    `reused`: on a connection that has served another one before, `idle_seconds` ago. `sent_at`:
    when it went out, by the event loop's clock: at once, or with the last slice of a large body.
    """

    __slots__ = ("idle_seconds", "reused", "sent_at")

    def __init__(self) -> None:
        self.reused = True
        self.idle_seconds = 0.0
        self.sent_at = 0.0
        self.sent()

    def sent(self) -> None:
        """A part of it went out now."""
        self.sent_at = asyncio.get_running_loop().time()

    def was_stale(self, exc: Exception, now: float) -> bool:
        """Whether the agent most likely closed the connection before it saw the request."""
        at_once = now - self.sent_at <= STALE_SECONDS
        return self.reused and at_once and not _began(exc)


class LargeBody(aiohttp.Payload):
    """A request body sent in slices, so that it is neither copied nor written in one step."""

    SLICE_BYTES = 256 * 1024
    """Writing it takes a tenth of a millisecond, during which no other stream goes on."""

    def __init__(self, value: bytes | bytearray, sending: _Sending) -> None:
        super().__init__(value, content_type="application/octet-stream")
        self._size = len(value)
        self._sending = sending

    async def write(self, writer: AbstractStreamWriter) -> None:
        """Send it; waits whenever the agent does not keep up."""
        whole = memoryview(self._value)
        for start in range(0, len(whole), self.SLICE_BYTES):
            await writer.write(whole[start : start + self.SLICE_BYTES])
            self._sending.sent()

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """The body as text; aiohttp requires the method."""
        return str(self._value, encoding, errors)


def _payload(body: bytes | bytearray, sending: _Sending) -> bytes | bytearray | LargeBody | None:
    return LargeBody(body, sending) if len(body) > LargeBody.SLICE_BYTES else body or None


def _session(
    links: Links, clock: Clock, relay_key_at: KeyAt, **connections: Any
) -> aiohttp.ClientSession:
    connector = LinkConnector(
        links,
        clock,
        CONNECT_SECONDS,
        relay_key_at,
        limit=0,
        socket_factory=_socket,
        ttl_dns_cache=DNS_SECONDS,
        **connections,
    )
    make: Any = partial(_Answers, loop=asyncio.get_running_loop())
    connector._factory = make
    return aiohttp.ClientSession(
        auto_decompress=False,
        # A cookie that an agent sets for one client is not for the next.
        cookie_jar=aiohttp.DummyCookieJar(),
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        read_bufsize=READ_BUFFER_BYTES,
    )


def _began(exc: Exception) -> bool:
    """Whether a part of an answer's head had come before the connection ended."""
    return isinstance(exc, aiohttp.ServerDisconnectedError) and not isinstance(exc.message, str)


def _socket(address: AddrInfoType) -> socket.socket:
    """A socket that notices a vanished machine within half a minute, where the platform can."""
    if (sending := _under_way.get(None)) is not None:
        sending.reused = False
    family, kind, protocol, _, where = address
    parsed = parse_address(str(where[0]))
    if parsed is not None and is_no_machine(parsed):
        raise OSError(errno.EADDRNOTAVAIL, f"no Ollama can be at {where[0]}")
    sock = socket.socket(family, kind, protocol)
    sock.setblocking(False)
    keep_alive(
        sock,
        idle_seconds=KEEPALIVE_IDLE_SECONDS,
        interval_seconds=KEEPALIVE_INTERVAL_SECONDS,
        probes=KEEPALIVE_PROBES,
    )
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MILLISECONDS)
    return sock
