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
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager

import aiohttp

from ollama_coordinator_common.error import OllamaCoordinatorError

from .pool import CONNECT_SECONDS, Pool

log = logging.getLogger(__name__)


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


class Upstreams:
    """What is asked of all agents, over one pool; open between `async with` only.

    There is no total and no read time-out: a cold load or a long prompt may be silent for minutes.
    A machine that vanished is noticed by TCP itself (keep-alive, unacknowledged data) and by the
    monitor's probes.
    """

    def __init__(self) -> None:
        self._pool = Pool()

    async def __aenter__(self) -> "Upstreams":
        await self._pool.__aenter__()
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self._pool.__aexit__(*raised)

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
        try:
            response = await self._pool.send(method, url, list(headers), body, stream)
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
            advice = "is its Ollama stuck, or a firewall in the way?"
            raise Unreachable(f"no answer within {seconds:g} s; {advice}") from exc
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
