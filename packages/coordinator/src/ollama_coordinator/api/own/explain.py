"""`POST /api/explain`: where a request would go, and why; nothing is sent."""

from typing import Any

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from ollama_coordinator.api.http.dialects import InferenceRoute
from ollama_coordinator.api.http.errors import own_body, reply
from ollama_coordinator.api.http.openapi import operation
from ollama_coordinator.api.inference.request import read_routing, take_in
from ollama_coordinator.clock import Clock
from ollama_coordinator.scheduler import Decision, Estimate, Scheduler


class ChatRequest(Struct, frozen=True):
    """What is read of a request of `/api/chat` or `/api/generate`; it may have all their fields."""

    model: str
    messages: list[dict[str, Any]] = []
    prompt: str = ""
    options: dict[str, Any] = {}


class ExplainApi:
    """The handlers that return what the scheduler predicts."""

    def __init__(self, scheduler: Scheduler, surface: InferenceRoute, clock: Clock) -> None:
        self._scheduler = scheduler
        self._surface = surface
        self._clock = clock

    @operation(
        "Where a request would go, and why",
        takes=ChatRequest,
        gives={200: Decision},
        errors=(404, 409, 503),
    )
    async def explain(self, request: Request) -> Response:
        """The body is one of `/api/chat` or `/api/generate`; the answer a `Decision`."""
        routing = read_routing(self._surface, await own_body(request))
        now = self._clock.now()
        asked = take_in(self._surface, routing, request.scope, now)
        return reply(self._scheduler.explain(asked, now))

    @operation(
        "Learned speeds of every model on every agent", gives={200: list[Estimate]}, errors=(409,)
    )
    async def estimates(self, request: Request) -> Response:
        """`GET /api/estimates`: what is predicted of every model on every agent."""
        return reply(self._scheduler.estimates())
