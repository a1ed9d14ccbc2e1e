"""`/api/requests`, `/api/queue`: live requests; `/api/explain`: where a request would go."""

from typing import Any, Literal

import msgspec
from msgspec import Raw, Struct, structs
from starlette.requests import Request
from starlette.responses import Response

from ollama_coordinator.access import caller_of
from ollama_coordinator.api.http.dialects import INFERENCE_ROUTES
from ollama_coordinator.api.http.errors import HttpError, own_body, reply
from ollama_coordinator.api.http.openapi import Either, operation
from ollama_coordinator.api.http.routing import tell
from ollama_coordinator.api.inference.request import read_any, schedulable
from ollama_coordinator.db import Finished
from ollama_coordinator.journal import (
    Attempt,
    Journal,
    JournalEntry,
    RequestState,
    RequestView,
)
from ollama_coordinator.parts import Parts
from ollama_coordinator.scheduler import Decision, Estimate, RequestId

CHAT = next(route for route in INFERENCE_ROUTES if route.path == "/api/chat")

CANCELLED_BY_OPERATOR = "cancelled by the operator of the coordinator"


def _detailed(name: str, base: type[Struct], about: str, **fields: Any) -> Any:
    """A type with the fields of `base`, less those of the names in `fields`, and with these."""
    kept = [(field.name, field.type) for field in structs.fields(base) if field.name not in fields]
    both = [*kept, *fields.items()]
    return msgspec.defstruct(name, both, kw_only=True, namespace={"__doc__": about})


RequestViews = list[RequestView]
Estimates = list[Estimate]
LiveRequest = _detailed(
    "LiveRequest",
    RequestView,
    "A live request with every attempt so far, and the decision that would be made `now`.",
    attempts=list[Attempt],
    now=Decision | None,
)
FinishedRequest = _detailed(
    "FinishedRequest",
    Finished,
    "A request that has ended, with its attempts and why each went where it did.",
    attempts=list[Attempt],
    state=Literal["finished"],
)


class ChatRequest(Struct, frozen=True):
    """A request of `/api/chat` or `/api/generate`; fields that are not here are not read."""

    model: str
    messages: list[dict[str, Any]] = []
    prompt: str = ""
    options: dict[str, Any] = {}


class RequestsApi:
    """The handlers of requests."""

    def __init__(self, parts: Parts) -> None:
        self._history = parts.observation.history
        self._journal: Journal = parts.observation.journal
        self._dispatch = parts.dispatch
        self._scheduler = parts.scheduler
        self._settings = parts.settings
        self._aliases = parts.aliases
        self._clock = parts.clock
        self._reading = parts.reading

    @operation(gives={200: RequestViews})
    async def list(self, request: Request) -> Response:
        """Every live request, the oldest first."""
        return reply(self._journal.views(self._clock.now()))

    @operation(gives={200: RequestViews})
    async def queue(self, request: Request) -> Response:
        """The requests that wait for a place, next first within each model."""
        waiting = [
            view
            for view in self._journal.views(self._clock.now())
            if view.state is RequestState.WAITING
        ]
        waiting.sort(key=lambda view: (view.model, view.position or 0))
        return reply(waiting)

    @operation(gives={200: Either(LiveRequest, FinishedRequest)}, errors=(404, 503))
    async def show(self, request: Request) -> Response:
        """One request, live or finished, and why it went where it did."""
        request_id = request.path_params["request_id"]
        entry = self._journal.live.get(request_id)
        if entry is not None:
            return reply(self._live(entry))
        ended = self._journal.find_ended(request_id)
        if ended is not None:
            return reply(_over(ended.request, ended.attempts))
        kept = await self._history.find(request_id)
        if kept is None:
            raise _unknown(request_id)
        return reply(_over(kept[0], Raw(kept[1])))

    @operation(gives={204: None}, errors=(404,))
    async def cancel(self, request: Request) -> Response:
        """End a request: its client gets an error, its agent stops working on it."""
        request_id = request.path_params["request_id"]
        entry = self._journal.live.get(RequestId(request_id))
        if entry is not None:
            tell(request.scope, request_id, client=entry.request.client, model=entry.request.name)
        if not self._dispatch.cancel(RequestId(request_id), CANCELLED_BY_OPERATOR):
            raise _unknown(request_id)
        return Response(status_code=204)

    @operation(takes=ChatRequest, gives={200: Decision}, errors=(404, 409, 503))
    async def explain(self, request: Request) -> Response:
        """Where a request would go, and why; nothing is sent."""
        routing = await read_any(CHAT, await own_body(request), self._reading)
        alias = self._aliases.find(routing.name)
        if alias is not None:
            caller = caller_of(request.scope)
            usable = self._aliases.usable(alias, caller)
            name = self._aliases.first_held(alias, caller) or usable[0]
            routing = structs.replace(routing, name=name)
        now = self._clock.now()
        asked = schedulable(
            CHAT, routing, request.scope, now, pace=self._settings.config.reading_pace
        )
        return reply(self._scheduler.explain(asked, now))

    @operation(gives={200: Estimates}, errors=(409,))
    async def estimates(self, request: Request) -> Response:
        """Learned speeds of every model on every agent."""
        return reply(self._scheduler.estimates())

    def _live(self, entry: JournalEntry) -> Any:
        now = self._clock.now()
        view = next(view for view in self._journal.views(now) if view.id == entry.request.id)
        more = {
            "attempts": entry.attempt_views(self._clock),
            "now": self._journal.explain(entry, now),
        }
        return LiveRequest(**{**structs.asdict(view), **more})


def _over(request: Finished, attempts: Any) -> Any:
    more = {"state": "finished", "attempts": attempts}
    return FinishedRequest(**{**structs.asdict(request), **more})


def _unknown(request_id: str) -> HttpError:
    return HttpError(
        404, f"request '{request_id}' is not known; see /api/requests and /api/history"
    )
