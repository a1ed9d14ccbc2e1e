"""The request path, in the order a request meets it.

Read the routing fields; lease a place; open the upstream; relay until either side ends; settle the
lease with what was learned; or answer the error in the client's dialect. Bodies pass as they are.
"""

from secrets import token_hex

from starlette.types import Receive, Scope, Send

from ollama_coordinator.clock import Clock
from ollama_coordinator.dispatch import Dispatch, Held
from ollama_coordinator.monitor import Monitor
from ollama_coordinator.registry import Registry
from ollama_coordinator.scheduler import (
    Kind,
    Lane,
    ModelNotFound,
    Request,
    RequestId,
    SchedulerError,
)
from ollama_coordinator.upstream import UpstreamError, Upstreams
from ollama_coordinator_common.error import OllamaCoordinatorError
from ollama_coordinator_common.names import model_key

from .departure import until_departure
from .dialects import Surface
from .headers import declared_length, to_ollama
from .reading import Routing, read_body, read_routing
from .relay import Call, Failure, Relay
from .wire import ClientLeft, HttpError, send_error, send_whole


class Proxy:
    """The ASGI application of one inference route."""

    def __init__(
        self,
        surface: Surface,
        registry: Registry,
        dispatch: Dispatch,
        monitor: Monitor,
        upstreams: Upstreams,
        clock: Clock,
        *,
        body_limit: int,
    ) -> None:
        self._surface = surface
        self._registry = registry
        self._dispatch = dispatch
        self._monitor = monitor
        self._upstreams = upstreams
        self._clock = clock
        self._body_limit = body_limit

    @property
    def path(self) -> str:
        """The route that this serves."""
        return self._surface.path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        try:
            declared = declared_length(dict(scope["headers"]))
            body = await read_body(receive, self._body_limit, declared)
            async with until_departure(receive):
                call = await self._read(scope, body, send)
                await self._serve(call)
        except ClientLeft:
            return
        except OllamaCoordinatorError as error:
            await send_error(send, self._surface.dialect, error)

    # ── read ──────────────────────────────────────────────────────────────────────────────────

    async def _read(self, scope: Scope, body: bytes, send: Send) -> Call:
        routing = read_routing(self._surface, body)
        request = self._request(scope, routing)
        if not self._registry.holders(request.model):
            # Perhaps pulled a moment ago on an agent that does not report its models by itself.
            await self._monitor.refresh(self._registry, older_than=2.0, seconds=1.0)
        return Call(self._surface, request, to_ollama(scope["headers"]), body, send)

    def _request(self, scope: Scope, routing: Routing) -> Request:
        client = scope.get("client")
        embedding = self._surface.kind is Kind.EMBED
        return Request(
            id=RequestId(token_hex(8)),
            model=model_key(routing.name),
            name=routing.name,
            arrived_at=self._clock.now(),
            kind=self._surface.kind,
            lane=Lane.EMBEDDING if embedding else Lane.INTERACTIVE,
            client=client[0] if client else "",
            prompt_tokens=routing.prompt_tokens,
            prefix=routing.prefix,
            output_limit=routing.output_limit,
            options=routing.options,
            load_only=routing.load_only,
        )

    # ── lease and try, each agent at most once ────────────────────────────────────────────────

    async def _serve(self, call: Call) -> None:
        request = call.request
        failure: Failure | None = None
        while True:
            try:
                async with self._dispatch.lease(request) as held:
                    failure = await self._attempt(call, held)
            except ModelNotFound as exc:
                if failure is None:
                    text = self._surface.missing.format(name=request.name)
                    raise HttpError(404, text) from exc
                break
            except SchedulerError:
                if failure is None:
                    raise
                break
            if failure is None:
                return
            request = request.without([held.agent.id])
        await self._answer_failure(call, failure)

    async def _attempt(self, call: Call, held: Held) -> Failure | None:
        """Try one agent; `None` when the client has its answer, also a broken-off one."""
        relay = Relay(call, held, self._dispatch)
        try:
            async with (
                held.interrupt,
                self._upstreams.open(
                    "POST",
                    held.agent.url + call.surface.path,
                    headers=call.headers,
                    body=call.body,
                ) as response,
            ):
                return await relay.run(response)
        except UpstreamError as exc:
            return await relay.broken(exc)

    async def _answer_failure(self, call: Call, failure: Failure) -> None:
        """Every agent failed: the last one's own words, or what happened on the way to it."""
        if failure.status:
            await send_whole(call.send, failure.status, failure.headers, failure.body)
            return
        text = f"no agent could serve model '{call.request.name}': {failure.outcome.reason}"
        raise HttpError(503, text)
