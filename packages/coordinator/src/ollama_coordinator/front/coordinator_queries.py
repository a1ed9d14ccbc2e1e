"""What a coordinator asks others to find out which of them leads."""

from contextlib import AbstractAsyncContextManager

from aiohttp import ClientResponse

from ollama_coordinator.carry import FOLLOWS, MAY_LEAD
from ollama_coordinator.clock import Clock
from ollama_coordinator.cluster import Cluster
from ollama_coordinator.upstream import NotConnected, UpstreamError, Upstreams

ANSWER_SECONDS = 0.5
"""For a coordinator to say whether it leads; one that is frozen does not."""


class CoordinatorQueries:
    """Requests of this coordinator's own to the others."""

    def __init__(self, cluster: Cluster, upstreams: Upstreams, clock: Clock) -> None:
        self._cluster = cluster
        self._upstreams = upstreams
        self._clock = clock

    def ask(
        self, method: str, url: str, path: str, body: bytes = b""
    ) -> AbstractAsyncContextManager[ClientResponse]:
        """A request to another coordinator, which is answered or refused as one of its own."""
        return self._upstreams.open(
            method,
            url + path,
            headers=[("X-Ollama-Coordinator-Front", self._cluster.secret)],
            body=body,
            certificate=self._cluster.certificate_at(url),
        )

    async def still_leads(self, url: str) -> bool:
        """Whether the coordinator at a URL answers, and leads."""
        health = self.ask("GET", url, "/healthz")
        try:
            async with self._clock.timeout(ANSWER_SECONDS), health as answer:
                return answer.status == 200
        except (UpstreamError, TimeoutError):
            return False

    async def may_lead(self, url: str) -> bool:
        """Whether the coordinator at a URL leads, or would if it found that nobody does.

        One that says nothing may; one whose process has ended may not.
        """
        health = self.ask("GET", url, "/healthz")
        try:
            async with self._clock.timeout(ANSWER_SECONDS), health as answer:
                headers = [(name.lower(), value) for name, value in answer.raw_headers]
                return answer.status == 200 or (FOLLOWS, MAY_LEAD) in headers
        except NotConnected as exc:
            error = getattr(exc.__cause__, "os_error", None)
            return not isinstance(error, ConnectionRefusedError)
        except (UpstreamError, TimeoutError):
            return True
