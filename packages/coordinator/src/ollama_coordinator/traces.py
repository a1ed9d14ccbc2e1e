"""Traces: a span for each request, and below it one for each wait and each attempt.

They go by OTLP over HTTP to where `OTEL_EXPORTER_OTLP_ENDPOINT` says; OpenTelemetry's own variables
say the rest: headers, time-outs, sampling, the service's name. A client's `traceparent` is the
parent, and each attempt's goes to its agent. Without that variable, or without the extra `[otel]`,
nothing is imported and nothing is done. Names of attributes are those of OpenTelemetry's semantic
conventions for HTTP and for generative AI, as far as they have one.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from .db import Finished, Status
from .dispatch import Held
from .scheduler import Request, Result

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

log = logging.getLogger(__name__)

OPERATIONS = {
    "/api/chat": "chat", "/v1/chat/completions": "chat", "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/api/generate": "text_completion", "/v1/completions": "text_completion",
    "/api/embed": "embeddings", "/api/embeddings": "embeddings", "/v1/embeddings": "embeddings",
}  # fmt: skip
"""What the conventions call a route's work; the others go by the end of their path."""

WELL = frozenset({Result.SERVED, Result.CANCELLED, Result.TAKEN_BACK})
"""How an attempt ends that is no error."""

CLOSE_SECONDS = 3.0
"""How long the end of the coordinator waits until the last spans are sent."""

UNKNOWN_SERVICE = "unknown_service"
"""How the name of a service begins that nobody has named."""

MISSING = (
    "traces need OpenTelemetry's packages: install ollama-coordinator[otel], or unset"
    " OTEL_EXPORTER_OTLP_ENDPOINT"
)

Headers = Sequence[tuple[str, str]]


class Traces:
    """Begins a trace of each request, if there is an endpoint: a URL without `/v1/traces`."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint.rstrip("/")
        self._tracer: Tracer | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Send what is traced as long as the block runs."""
        if not self._endpoint:
            yield
            return
        try:
            provider = await asyncio.to_thread(_provider, f"{self._endpoint}/v1/traces")
        except ImportError:
            log.warning(MISSING)
            yield
            return
        self._tracer = provider.get_tracer("ollama_coordinator", version("ollama-coordinator"))
        log.info("traces are sent", extra={"to": self._endpoint})
        try:
            yield
        finally:
            self._tracer = None
            await asyncio.to_thread(_close, provider)

    def begin(
        self, request: Request, path: str, headers: Headers, now: float
    ) -> "RequestTrace | None":
        """The trace of a request that came before `now`; `None` where none are wanted."""
        if self._tracer is None:
            return None
        return RequestTrace(self._tracer, request, path, headers, now - request.arrived_at)


class RequestTrace:
    """The span of one request, from its arrival, `elapsed` seconds ago, until `ended`."""

    def __init__(
        self, tracer: "Tracer", request: Request, path: str, headers: Headers, elapsed: float
    ) -> None:
        from opentelemetry import propagate, trace

        operation = OPERATIONS.get(path) or path.rpartition("/")[2]
        parent = propagate.extract({name.lower(): value for name, value in headers})
        self.tracer = tracer
        self.arrived_at: int | None = time.time_ns() - int(elapsed * 1e9)
        self._span = tracer.start_span(
            f"{operation} {request.name}",
            parent,
            trace.SpanKind.SERVER,
            {
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "ollama",
                "gen_ai.request.model": request.name,
                "http.request.method": "POST",
                "http.route": path,
                "ollama_coordinator.request.id": request.id,
                "ollama_coordinator.lane": request.lane.value,
            },
            start_time=self.arrived_at,
        )
        self.inside = trace.set_span_in_context(self._span, parent)

    def ended(self, row: Finished) -> None:
        """The request is over, as the history has it."""
        known = {
            "http.response.status_code": row.http_status,
            "gen_ai.usage.input_tokens": row.prompt_tokens,
            "gen_ai.usage.output_tokens": row.output_tokens,
            "ollama_coordinator.first_token_seconds": row.first_token_seconds,
        }
        found = {name: value for name, value in known.items() if value is not None}
        self._span.set_attributes(found)
        if row.status is Status.FAILED:
            _fail(self._span, str(row.http_status), row.error)
        self._span.end()


class AttemptTrace:
    """The spans of one attempt: its wait for a place, the first one since the arrival; itself."""

    def __init__(self, trace: RequestTrace) -> None:
        self._trace = trace
        since, trace.arrived_at = trace.arrived_at, None
        self._span = trace.tracer.start_span("queue", trace.inside, start_time=since)
        self._held: Held | None = None

    def granted(self, held: Held, headers: Headers) -> list[tuple[str, str]]:
        """It has a place; a client's headers as they go to its agent, with this as the parent."""
        from opentelemetry import propagate, trace

        self._span.end()
        self._held, parts = held, urlsplit(held.agent.url)
        self._span = self._trace.tracer.start_span(
            "attempt",
            self._trace.inside,
            trace.SpanKind.CLIENT,
            {
                "server.address": parts.hostname or "",
                "server.port": parts.port or 0,
                "ollama_coordinator.agent.id": held.agent.id,
                "ollama_coordinator.agent.name": held.agent.name,
            },
        )
        ours: dict[str, str] = {}
        propagate.inject(ours, trace.set_span_in_context(self._span, self._trace.inside))
        replaced = propagate.get_global_textmap().fields
        kept = [(name, value) for name, value in headers if name.lower() not in replaced]
        return [*kept, *ours.items()]

    def ended(self) -> None:
        """It is over, or there was no place for it."""
        if self._held is not None:
            outcome = self._held.outcome
            self._span.set_attribute("ollama_coordinator.result", outcome.result.value)
            if outcome.result not in WELL:
                _fail(self._span, outcome.result.value, outcome.reason)
        self._span.end()


@contextmanager
def traced(trace: RequestTrace | None) -> Iterator[AttemptTrace | None]:
    """One attempt of a request, as long as the block runs; `None` where it is not traced."""
    if trace is None:
        yield None
        return
    attempt = AttemptTrace(trace)
    try:
        yield attempt
    finally:
        attempt.ended()


def _fail(span: "Span", kind: str, reason: str) -> None:
    from opentelemetry.trace import Status as SpanStatus
    from opentelemetry.trace import StatusCode

    span.set_attribute("error.type", kind)
    span.set_status(SpanStatus(StatusCode.ERROR, reason or None))


def _provider(endpoint: str) -> "TracerProvider":
    """What makes spans, and sends them from a thread of its own.

    Raises:
        ImportError: the extra [otel] is not installed.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.version": version("ollama-coordinator")})
    if str(resource.attributes.get(SERVICE_NAME, "")).startswith(UNKNOWN_SERVICE):
        resource = resource.merge(Resource({SERVICE_NAME: "ollama-coordinator"}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return provider


def _close(provider: "TracerProvider") -> None:
    """Send the last spans; who takes them may be away, which holds up nothing for long."""
    closing = threading.Thread(target=provider.shutdown, daemon=True)
    closing.start()
    closing.join(CLOSE_SECONDS)
