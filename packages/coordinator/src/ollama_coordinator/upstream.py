"""The connections to the agents' Ollamas; every transport error is translated here, once.

UpstreamError
├── Unreachable   nothing of an answer arrived: refused, reset, timed out, closed
├── Cut           the answer ended before its end
├── AgentLost     somebody else found out that the agent does not answer any more
└── RequestCancelled   an operator ended the request; the agent is well
"""

import asyncio
import errno
import logging
import socket
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import TracebackType

import aiohttp
from aiohttp import AddrInfoType
from aiohttp.abc import AbstractStreamWriter

from ollama_coordinator_common.error import OllamaCoordinatorError

log = logging.getLogger(__name__)

CONNECT_SECONDS = 3.0
"""A machine on a network answers a connection within milliseconds or not at all."""

KEEPALIVE_IDLE_SECONDS = 10
KEEPALIVE_INTERVAL_SECONDS = 5
KEEPALIVE_PROBES = 3
UNACKNOWLEDGED_MILLISECONDS = 20_000

Headers = list[tuple[str, str]]


class UpstreamError(OllamaCoordinatorError):
    """An agent's Ollama did not give a whole answer."""


class Unreachable(UpstreamError):
    """Nothing of an answer arrived."""


class Cut(UpstreamError):
    """The answer ended before its end."""


class AgentLost(UpstreamError):
    """Somebody else found out that the agent does not answer any more."""


class RequestCancelled(UpstreamError):
    """An operator ended the request; the agent is well."""


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


class Upstreams:
    """One pool of connections to all agents; open between `async with` only.

    There is no total and no read time-out: a cold load or a long prompt may be silent for minutes.
    A machine that vanished is noticed by TCP itself (keep-alive, unacknowledged data) and by the
    monitor's probes.
    """

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "Upstreams":
        self._session = aiohttp.ClientSession(
            auto_decompress=False,
            # What an agent gives one client to remember is not for the next.
            cookie_jar=aiohttp.DummyCookieJar(),
            connector=aiohttp.TCPConnector(
                limit=0, socket_factory=_socket, keepalive_timeout=60, ttl_dns_cache=60
            ),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            read_bufsize=2**18,
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        raised: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._session is not None:
            await self._session.close()

    @asynccontextmanager
    async def open(
        self,
        method: str,
        url: str,
        *,
        headers: Iterable[tuple[str, str]] = (),
        body: bytes = b"",
        stream: AsyncIterator[bytes] | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a request and yield the response once its headers are here.

        `stream` is a body in pieces, in place of `body`.

        Leaving the block before the end of the body closes the connection, which is how Ollama
        learns that nobody listens any more.

        Raises:
            Unreachable: no headers arrived.
        """
        if self._session is None:
            raise RuntimeError("the upstream connections are not open")
        try:
            response = await self._session.request(
                method,
                url,
                headers=list(headers),
                data=_payload(body) if stream is None else stream,
                allow_redirects=False,
            )
        except (aiohttp.ClientError, TimeoutError, OSError, UnicodeError) as exc:
            raise Unreachable(_reason(exc)) from exc
        try:
            with _noticing_the_end(response):
                yield response
        finally:
            response.release() if response.content.is_eof() else response.close()

    async def fetch(
        self, method: str, url: str, *, seconds: float, body: bytes = b""
    ) -> tuple[int, bytes]:
        """A small request with a time-out for all of it: status and body.

        Raises:
            Unreachable: no whole answer within `seconds`.
        """
        try:
            async with asyncio.timeout(seconds), self.open(method, url, body=body) as response:
                return response.status, b"".join([chunk async for chunk in chunks(response)])
        except TimeoutError as exc:
            raise Unreachable(f"no answer within {seconds:g} s") from exc
        except Cut as exc:
            raise Unreachable(str(exc)) from exc


async def chunks(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The body as it arrives.

    Raises:
        Cut: it ended before its end.
    """
    try:
        async for chunk in response.content.iter_any():
            yield chunk
    except (aiohttp.ClientError, OSError) as exc:
        raise Cut(_reason(exc)) from exc


@contextmanager
def _noticing_the_end(response: aiohttp.ClientResponse) -> Iterator[None]:
    """Whoever reads the body learns that the connection is gone, whatever the reason.

    Aiohttp 3.14 closes a connection on which it meets a malformed chunk and does not tell the
    reader of the body, which would wait for ever.
    """
    connection, content = response.connection, response.content
    protocol = connection.protocol if connection is not None else None
    closed = protocol.closed if protocol is not None else None

    def tell(_: object) -> None:
        if not content.is_eof() and content.exception() is None:
            content.set_exception(aiohttp.ClientPayloadError("the connection was closed"))

    if closed is not None:
        # One connection serves many responses: there is one of these a connection.
        closed.remove_done_callback(_seen)
        closed.add_done_callback(_seen)
        closed.add_done_callback(tell)
    try:
        yield
    finally:
        if closed is not None:
            closed.remove_done_callback(tell)


def _seen(closed: asyncio.Future[None]) -> None:
    """Take note of a reset, which asyncio would otherwise log as overlooked."""
    if not closed.cancelled():
        closed.exception()


def _payload(body: bytes) -> bytes | LargeBody | None:
    return LargeBody(body) if len(body) > LargeBody.SLICE_BYTES else body or None


_RESET = (errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE)


def _reason(exc: Exception) -> str:
    """What an operator understands of a transport error."""
    if isinstance(exc, aiohttp.ConnectionTimeoutError | aiohttp.ServerTimeoutError):
        return f"no connection within {CONNECT_SECONDS:g} s"
    if isinstance(exc, aiohttp.InvalidURL | UnicodeError):
        return f"has no address that can be reached: {exc}"
    if isinstance(exc, aiohttp.ClientResponseError):
        return "answers in no form of HTTP"
    if isinstance(exc, aiohttp.ClientConnectorCertificateError):
        return f"cannot connect: {exc.certificate_error}"
    if isinstance(exc, aiohttp.ClientConnectorError):
        return f"cannot connect: {exc.os_error.strerror or exc.os_error}"
    if isinstance(exc, aiohttp.ServerDisconnectedError):
        return "closed the connection without an answer"
    if isinstance(exc, aiohttp.ClientPayloadError):
        return "closed the connection in the middle of the answer"
    if isinstance(exc, ConnectionResetError) or getattr(exc, "errno", None) in _RESET:
        return "reset the connection"
    return str(exc) or type(exc).__name__


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
