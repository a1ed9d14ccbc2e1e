"""Where aiohttp's client gets its connections to agents that have a link, or a relay.

A connector's `_create_connection` and `_factory` are aiohttp's own, as for `UnixConnector`; a test
runs requests through this one with the release that is installed.
"""

import asyncio
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import aiohttp
from yarl import URL

from ollama_coordinator.clock import Clock
from ollama_coordinator_common.handshake import ANSWER_BYTES, CoordinatorSide, NotProven
from ollama_coordinator_common.network import linked_agent

from .links import LinkDown, Links

if TYPE_CHECKING:
    from aiohttp.client_proto import ResponseHandler


KeyAt = Callable[[URL], str]

relay_key_here: ContextVar[str] = ContextVar("relay_key_here", default="")
"""The key of a relay to which this task connects, and which is not known here by its URL."""


def no_key(url: URL) -> str:
    """There is no relay that asks for a handshake."""
    return ""


class LinkConnector(aiohttp.TCPConnector):
    """Connects to the host of a linked agent by its link, to others by TCP.

    A request waits at most `seconds` for one of the connections that the agent keeps parked, or for
    the handshake with a relay, whose key is `relay_key_at` its URL; empty where there is none.
    """

    def __init__(
        self, links: Links, clock: Clock, seconds: float, relay_key_at: KeyAt, **more: Any
    ) -> None:
        super().__init__(**more)
        self._links = links
        self._clock = clock
        self._seconds = seconds
        self._relay_key_at = relay_key_at

    async def _create_connection(
        self, req: Any, traces: Any, timeout: aiohttp.ClientTimeout
    ) -> "ResponseHandler":
        agent_id = linked_agent(req.url.host or "")
        if agent_id is None:
            connected = await super()._create_connection(req, traces, timeout)
            if key := relay_key_here.get() or self._relay_key_at(req.url):
                await self._shake_hands(req, connected, key)
            return connected
        try:
            connection = await self._links.take(agent_id, self._seconds)
        except LinkDown as exc:
            raise aiohttp.ClientConnectorError(req.connection_key, exc) from exc
        protocol: ResponseHandler = self._factory()
        connection.use(protocol)
        return protocol

    async def _shake_hands(self, req: Any, protocol: "ResponseHandler", key: str) -> None:
        transport = protocol.transport
        if transport is None:
            return  # closed already: the request will find that out
        hello, answering = CoordinatorSide(key), _RelayAnswer()
        transport.set_protocol(answering)
        try:
            async with self._clock.timeout(self._seconds):
                transport.write(hello.line)
                transport.write(hello.proof(await answering.answer))
        except BaseException as exc:
            transport.abort()
            if isinstance(exc, TimeoutError):
                raise aiohttp.ConnectionTimeoutError("the relay is silent") from exc
            if isinstance(exc, OSError):
                raise aiohttp.ClientConnectorError(req.connection_key, exc) from exc
            raise
        finally:
            transport.set_protocol(protocol)


class _RelayAnswer(asyncio.Protocol):
    """Waits for what a relay answers to a hello."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._came = b""

    def data_received(self, data: bytes) -> None:
        """Bytes came; after its line a relay waits, others send what they like."""
        self._came += data
        if not self.answer.done() and (b"\n" in self._came or len(self._came) >= ANSWER_BYTES):
            self.answer.set_result(self._came)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is closed."""
        if not self.answer.done():
            self.answer.set_exception(exc or NotProven())
            self.answer.exception()  # nobody may wait for it any more
