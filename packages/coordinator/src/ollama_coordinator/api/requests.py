"""`/api/requests` and `/api/queue`: what runs and waits, why it went where it is, and its end."""

from typing import Any

import msgspec
from msgspec import Raw
from starlette.requests import Request
from starlette.responses import Response

from ollama_coordinator.clock import Clock
from ollama_coordinator.db import Finished
from ollama_coordinator.dispatch import Dispatch
from ollama_coordinator.journal import Entry, Journal, Observation, RequestView, State
from ollama_coordinator.scheduler import RequestId

from .wire import HttpError, reply

CANCELLED_BY_OPERATOR = "cancelled by the operator of the coordinator"


class RequestsApi:
    """The handlers of living requests."""

    def __init__(self, observation: Observation, dispatch: Dispatch, clock: Clock) -> None:
        self._history = observation.history
        self._journal: Journal = observation.journal
        self._dispatch = dispatch
        self._clock = clock

    async def list(self, request: Request) -> Response:
        """`GET /api/requests`: every living request, the oldest first."""
        return reply(self._journal.views(self._clock.now()))

    async def queue(self, request: Request) -> Response:
        """`GET /api/queue`: those without a place, next first within each model."""
        waiting = [
            view for view in self._journal.views(self._clock.now()) if view.state is State.WAITING
        ]
        waiting.sort(key=lambda view: (view.model, view.position or 0))
        return reply(waiting)

    async def show(self, request: Request) -> Response:
        """`GET /api/requests/{id}`: one request, living or over, and why it went where it did."""
        request_id = request.path_params["request_id"]
        entry = self._journal.live.get(request_id)
        if entry is not None:
            return reply(self._living(entry))
        ended = self._journal.find_ended(request_id)
        if ended is not None:
            return reply(_over(ended.request, ended.attempts))
        kept = await self._history.find(request_id)
        if kept is None:
            raise _unknown(request_id)
        return reply(_over(kept[0], Raw(kept[1])))

    async def cancel(self, request: Request) -> Response:
        """`DELETE /api/requests/{id}`: its client gets an error, its agent stops working on it."""
        request_id = request.path_params["request_id"]
        if not self._dispatch.cancel(RequestId(request_id), CANCELLED_BY_OPERATOR):
            raise _unknown(request_id)
        return Response(status_code=204)

    def _living(self, entry: Entry) -> dict[str, Any]:
        now = self._clock.now()
        view = next(view for view in self._journal.views(now) if view.id == entry.request.id)
        return {
            **_fields(view),
            "attempts": entry.attempts(self._clock),
            "now": self._journal.explain(entry, now),
        }


def _fields(view: RequestView | Finished) -> dict[str, Any]:
    return msgspec.structs.asdict(view)


def _over(request: Finished, attempts: Any) -> dict[str, Any]:
    return {**_fields(request), "state": "finished", "attempts": attempts}


def _unknown(request_id: str) -> HttpError:
    return HttpError(
        404, f"request '{request_id}' is not known; see /api/requests and /api/history"
    )
