"""Where aiohttp's client gets its connections to agents that have a link.

A connector's `_create_connection` and `_factory` are aiohttp's own, as for `UnixConnector`; a test
runs requests through this one with the release that is installed.
"""

from typing import TYPE_CHECKING, Any

import aiohttp

from ollama_coordinator_common.network import linked_agent

from .links import LinkDown, Links

if TYPE_CHECKING:
    from aiohttp.client_proto import ResponseHandler


class LinkConnector(aiohttp.TCPConnector):
    """Connects to the host of a linked agent by its link, to others by TCP.

    A request waits at most `seconds` for one of the connections that the agent keeps parked.
    """

    def __init__(self, links: Links, seconds: float, **more: Any) -> None:
        super().__init__(**more)
        self._links = links
        self._seconds = seconds

    async def _create_connection(
        self, req: Any, traces: Any, timeout: aiohttp.ClientTimeout
    ) -> "ResponseHandler":
        agent_id = linked_agent(req.url.host or "")
        if agent_id is None:
            return await super()._create_connection(req, traces, timeout)
        try:
            connection = await self._links.take(agent_id, self._seconds)
        except LinkDown as exc:
            raise aiohttp.ClientConnectorError(req.connection_key, exc) from exc
        protocol: ResponseHandler = self._factory()
        connection.use(protocol)
        return protocol
