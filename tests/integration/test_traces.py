"""Traces: what a receiver on a real socket gets of requests, and what goes on to Ollama."""

import subprocess
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from unittest.mock import ANY

import pytest
from aiohttp import web

from ollama_coordinator.traces import Traces
from support.coordinator import Running, running
from support.ollama import StandIn

pytest.importorskip("opentelemetry.sdk")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CHAT = {"model": "llama3.2", "messages": [{"role": "user", "content": "hi"}], "stream": False}


class Receiver:
    """Takes spans by OTLP over HTTP, as a collector does."""

    def __init__(self) -> None:
        self.url = ""
        self.spans: list[Any] = []
        self.services: set[str] = set()
        self.asked_by: list[str] = []

    async def take(self, request: web.Request) -> web.Response:
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

        sent = trace_service_pb2.ExportTraceServiceRequest()
        sent.ParseFromString(await request.read())
        self.asked_by.append(request.headers.get("X-Token", ""))
        for resource in sent.resource_spans:
            facts = {one.key: one.value.string_value for one in resource.resource.attributes}
            self.services.add(facts["service.name"])
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]
        answer = trace_service_pb2.ExportTraceServiceResponse()
        return web.Response(body=answer.SerializeToString(), content_type="application/x-protobuf")

    def by_name(self) -> dict[str, list[Any]]:
        """The spans by their names, in the order in which they began."""
        found = defaultdict(list)
        for span in sorted(self.spans, key=lambda span: span.start_time_unix_nano):
            found[span.name].append(span)
        return found


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    app = web.Application()
    app.router.add_post("/v1/traces", receiver.take)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    receiver.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield receiver
    finally:
        await runner.cleanup()


@pytest.fixture(autouse=True)
def of_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-token=secret")


def facts(span: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


async def chat(coordinator: Running, model: str = "llama3.2", **headers: str) -> int:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    async with coordinator.session.post(
        f"{coordinator.url}/api/chat", json={**CHAT, "model": model}, headers=given
    ) as answer:
        await answer.read()
        return answer.status


@pytest.mark.spec("OPERATION-83")
async def test_a_request_its_waits_and_its_attempts_are_spans_of_the_clients_trace() -> None:
    async with receiving() as receiver, StandIn() as bad, StandIn() as good:
        named = {"bad": bad, "good": good}
        async with running(otlp_endpoint=f"{receiver.url}/") as coordinator:
            ids = [await coordinator.register(one, name) for name, one in named.items()]
            url = f"{coordinator.url}/api/agents/{ids[0]}"
            async with coordinator.session.patch(url, json={"preference": 100}) as changed:
                assert changed.status == 200
            bad.faults.fin(paths=["/api/chat"])
            status = await chat(
                coordinator, traceparent=f"00-{TRACE}-{PARENT}-01", tracestate="a=b"
            )
            assert status == 200
            sent = (one for node in (bad, good) for one in node.seen.requests)
            passed = [one.headers for one in sent if one.path == "/api/chat"]
        spans = receiver.by_name()
    (request,) = spans["chat llama3.2"]
    assert {span.trace_id.hex() for span in receiver.spans} == {TRACE}
    assert request.parent_span_id.hex() == PARENT
    assert [len(spans[name]) for name in ("queue", "attempt")] == [2, 2]
    for span in (*spans["queue"], *spans["attempt"]):
        assert span.parent_span_id == request.span_id
        assert request.start_time_unix_nano <= span.start_time_unix_nano
        assert span.end_time_unix_nano <= request.end_time_unix_nano
    for attempt, headers, name in zip(spans["attempt"], passed, ("bad", "good"), strict=True):
        assert headers["traceparent"] == f"00-{TRACE}-{attempt.span_id.hex()}-01"
        assert headers["tracestate"] == "a=b"
        assert facts(attempt)["ollama_coordinator.agent.name"] == name
    failed, served = spans["attempt"]
    assert facts(failed)["error.type"] == facts(failed)["ollama_coordinator.result"]
    assert failed.status.code == 2
    assert facts(served)["ollama_coordinator.result"] == "served"
    assert facts(served)["server.port"] == good.port
    known = facts(request)
    assert known["gen_ai.operation.name"] == "chat"
    assert known["http.response.status_code"] == 200
    assert known["gen_ai.usage.output_tokens"] > 0
    assert request.status.code == 0
    assert receiver.services == {"ollama-coordinator"}
    assert set(receiver.asked_by) == {"secret"}


@pytest.mark.spec("OPERATION-83")
async def test_what_is_refused_is_told_and_a_broken_parent_is_none() -> None:
    async with receiving() as receiver, StandIn() as ollama:
        async with running(otlp_endpoint=receiver.url) as coordinator:
            await coordinator.register(ollama)
            assert await chat(coordinator, "none", traceparent="00-x-y-01") == 404
            ollama.faults.status(500, {"error": "no"}, times=3)
            assert await chat(coordinator, traceparent="\xe9" * 99) >= 500
        spans = receiver.by_name()
    (refused,), (failed,) = spans["chat none"], spans["chat llama3.2"]
    assert facts(refused)["http.response.status_code"] == 404
    assert (refused.status.code, failed.status.code) == (0, 2)
    assert not refused.parent_span_id
    assert not failed.parent_span_id


@pytest.mark.spec("OPERATION-83")
async def test_without_an_endpoint_a_parent_passes_as_it_came_and_nothing_is_made(
    coordinator: Running, ollama: StandIn
) -> None:
    parent = f"00-{TRACE}-{PARENT}-01"
    assert await chat(coordinator, traceparent=parent) == 200
    assert ollama.seen.last.headers["traceparent"] == parent
    assert coordinator.parts.traces.begin(ANY, "/api/chat", [], 0.0) is None


@pytest.mark.spec("OPERATION-83")
async def test_a_receiver_that_is_away_holds_up_no_request_and_no_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ollama_coordinator.traces.CLOSE_SECONDS", 0.1)
    async with StandIn() as ollama:
        async with running(otlp_endpoint="http://127.0.0.1:1") as coordinator:
            await coordinator.register(ollama)
            assert await chat(coordinator) == 200


@pytest.mark.spec("OPERATION-83")
async def test_without_the_extra_a_sentence_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    traces = Traces("http://127.0.0.1:1")
    async with traces.running():
        assert traces.begin(ANY, "/api/chat", [], 0.0) is None
    assert "ollama-coordinator[otel]" in caplog.text


@pytest.mark.spec("OPERATION-83")
def test_nothing_of_it_is_imported_where_it_is_not_configured() -> None:
    listed = "import sys, ollama_coordinator.server; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", listed], capture_output=True, text=True, check=True)
    assert "ollama_coordinator.traces" in ran.stdout.split()
    assert not any(name.startswith("opentelemetry") for name in ran.stdout.split())
