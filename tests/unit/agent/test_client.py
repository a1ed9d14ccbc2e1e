"""The coordinator's answers, and every way there may be none."""

import asyncio
import inspect
import os
import ssl
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from aiohttp import client_exceptions
from aioresponses import aioresponses
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from ollama_coordinator_agent.client import (
    CoordinatorClient,
    CoordinatorError,
    Forgotten,
    Rejected,
)
from ollama_coordinator_common.protocol import HealthReport, RegisterRequest
from ollama_coordinator_common.types import AgentId
from support import responses
from support.agent_world import Coordinator

assert responses

URL_BASE = "http://coordinator:8080"
REQUEST = RegisterRequest("gpu-1", "192.0.2.4", "0.33.0", 11434)
REPORT = HealthReport(AgentId("a"), 1.0, 2.0, 0)


@pytest.fixture
async def client() -> AsyncIterator[CoordinatorClient]:
    async with aiohttp.ClientSession() as session:
        yield CoordinatorClient(session, URL_BASE)


@pytest.fixture
def wire() -> Iterator[aioresponses]:
    with aioresponses() as mocked:
        yield mocked


def every_client_exception() -> list[type[BaseException]]:
    return [
        kind
        for _, kind in inspect.getmembers(client_exceptions, inspect.isclass)
        if issubclass(kind, Exception) and kind.__module__ == client_exceptions.__name__
        # A mistake in calling a WebSocket's methods; the agent opens none.
        if kind is not client_exceptions.WSMessageTypeError
    ]


def example(kind: type[BaseException]) -> BaseException:
    """One exception of a kind, made as aiohttp makes it."""
    key: Any = SimpleNamespace(host="coordinator", port=8080, ssl=True, is_ssl=True)
    request = aiohttp.RequestInfo(URL(URL_BASE), "POST", CIMultiDictProxy(CIMultiDict()))
    if issubclass(kind, client_exceptions.ClientConnectorCertificateError):
        return kind(key, ssl.SSLCertVerificationError("self-signed"))
    if issubclass(kind, client_exceptions.UnixClientConnectorError):
        return kind("/socket", key, OSError(2, "no such file"))
    if issubclass(kind, client_exceptions.ClientConnectorError):
        return kind(key, OSError(111, "refused"))
    if issubclass(kind, client_exceptions.ServerFingerprintMismatch):
        return kind(b"a", b"b", "coordinator", 8080)
    if issubclass(kind, client_exceptions.ClientResponseError):
        return kind(request, ())
    if issubclass(kind, client_exceptions.InvalidURL):
        return kind(URL_BASE)
    return kind()


@pytest.mark.spec("AGENT-15")
@pytest.mark.parametrize("kind", every_client_exception())
async def test_every_error_of_the_http_library_is_translated(
    client: CoordinatorClient, wire: aioresponses, kind: type[BaseException]
) -> None:
    wire.post(f"{URL_BASE}/api/agents", exception=example(kind))
    with pytest.raises(CoordinatorError, match=r"no answer from \S+: ."):
        await client.register(REQUEST)


@pytest.mark.spec("AGENT-15")
def test_the_list_of_the_librarys_errors_is_not_empty() -> None:
    assert len(every_client_exception()) > 15


@pytest.mark.spec("AGENT-15")
@pytest.mark.parametrize(
    ("error", "clause"),
    [
        (TimeoutError(), "firewall"),
        (ConnectionRefusedError(), "is the coordinator running"),
        (OSError(113, "No route to host"), "unreachable"),
        (UnicodeError("label too long"), "COORDINATOR_URL"),
        (example(client_exceptions.ClientConnectorDNSError), "check COORDINATOR_URL and the DNS"),
        (example(client_exceptions.ClientConnectorCertificateError), "certificate"),
        (example(client_exceptions.ServerDisconnectedError), "hung up"),
    ],
)
async def test_the_operator_is_told_where_to_look(
    client: CoordinatorClient, wire: aioresponses, error: Exception, clause: str
) -> None:
    wire.post(f"{URL_BASE}/api/health", exception=error)
    with pytest.raises(CoordinatorError, match=clause):
        await client.report(REPORT)


@pytest.mark.spec("AGENT-15")
async def test_a_cancelled_call_stays_cancelled(
    client: CoordinatorClient, wire: aioresponses
) -> None:
    wire.post(f"{URL_BASE}/api/health", exception=asyncio.CancelledError())
    with pytest.raises(asyncio.CancelledError):
        await client.report(REPORT)


@pytest.mark.spec("AGENT-14")
@pytest.mark.parametrize(
    ("status", "body", "error", "clause"),
    [
        (400, '{"error":"ip_address is missing"}', Rejected, "ip_address is missing"),
        (404, "<html>", CoordinatorError, "Set COORDINATOR_URL"),
        (404, '{"error":"x"}', CoordinatorError, "404"),
        (405, "no", CoordinatorError, "405"),
        (200, "<html>", CoordinatorError, "is no Ollama Coordinator"),
        (200, '{"id":1}', CoordinatorError, "is no Ollama Coordinator"),
        (500, "oops", CoordinatorError, "500"),
        (503, '{"error":"stopping"}', CoordinatorError, "stopping"),
        (429, '{"error":"slower"}', CoordinatorError, "slower"),
    ],
)
async def test_an_answer_that_is_no_success_is_named(
    client: CoordinatorClient,
    wire: aioresponses,
    status: int,
    body: str,
    error: type[Exception],
    clause: str,
) -> None:
    wire.post(f"{URL_BASE}/api/agents", status=status, body=body)
    with pytest.raises(error, match=clause):
        await client.register(REQUEST)


@pytest.mark.spec("AGENT-14")
async def test_a_redirect_names_where_the_coordinator_moved(
    client: CoordinatorClient, wire: aioresponses
) -> None:
    wire.post(f"{URL_BASE}/api/agents", status=301, headers={"Location": "https://c/"})
    with pytest.raises(CoordinatorError, match="redirects to https://c/"):
        await client.register(REQUEST)


@pytest.mark.spec("AGENT-10")
async def test_an_unknown_agent_is_forgotten(client: CoordinatorClient, wire: aioresponses) -> None:
    wire.post(f"{URL_BASE}/api/health", status=404, body='{"error":"no such agent"}')
    with pytest.raises(Forgotten):
        await client.report(REPORT)


@pytest.mark.spec("AGENT-16")
async def test_a_base_path_is_kept_and_a_proxy_of_the_environment_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setitem(os.environ, variable, "http://127.0.0.1:1")
    async with Coordinator("/fleet") as coordinator, aiohttp.ClientSession() as session:
        client = CoordinatorClient(session, coordinator.url + "/")
        reply = await client.register(REQUEST)
        await client.report(HealthReport(reply.agent_id, 1.0, 2.0, 0))
    assert coordinator.registrations == [REQUEST]
    assert len(coordinator.reports) == 1


@pytest.mark.spec("AGENT-4")
async def test_the_agents_are_listed_by_a_coordinator_and_by_nothing_else(
    client: CoordinatorClient, wire: aioresponses
) -> None:
    wire.get(f"{URL_BASE}/api/agents", body="[]")
    assert await client.agents() == []
    wire.get(f"{URL_BASE}/api/agents", status=404, body="404 page not found")
    with pytest.raises(CoordinatorError, match="GET /api/agents"):
        await client.agents()
