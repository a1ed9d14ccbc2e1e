"""From what was read of a request to what the scheduler decides on."""

from math import inf
from secrets import token_hex

from starlette.types import Scope

from ollama_coordinator.api.edge.dialects import Surface
from ollama_coordinator.api.edge.wire import HttpError
from ollama_coordinator.scheduler import Kind, Lane, Request, RequestId
from ollama_coordinator_common.error import InvalidModelName
from ollama_coordinator_common.names import model_key

from .reading import Routing


def client_of(scope: Scope) -> str:
    """Who asks, for fairness between clients: the address they ask from."""
    client = scope.get("client")
    return str(client[0]) if client else ""


LANE = b"x-ollama-coordinator-lane"
MAX_WAIT = b"x-ollama-coordinator-max-wait"


def lane_of(surface: Surface, scope: Scope) -> Lane:
    """How urgent it is: embeddings have a lane of their own; `batch` is for who says so.

    Raises:
        HttpError: the header names no lane.
    """
    if surface.kind is Kind.EMBED:
        return Lane.EMBEDDING
    wanted = _header(scope, LANE) or b"interactive"
    if wanted not in (b"interactive", b"batch"):
        raise HttpError(400, "X-Ollama-Coordinator-Lane: give interactive or batch")
    return Lane(wanted.decode())


def deadline_of(scope: Scope, now: float) -> float | None:
    """Until when it waits for a place, if its client says for how many seconds it does.

    Raises:
        HttpError: the header is no number of seconds.
    """
    wanted = _header(scope, MAX_WAIT)
    if wanted is None:
        return None
    try:
        seconds = float(wanted)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < inf:
        raise HttpError(400, "X-Ollama-Coordinator-Max-Wait: give a number of seconds, 0 or more")
    return now + seconds


def _header(scope: Scope, wanted: bytes) -> bytes | None:
    return next((value for name, value in scope["headers"] if name == wanted), None)


def take_in(surface: Surface, routing: Routing, scope: Scope, now: float) -> Request:
    """The request as the scheduler sees it.

    Raises:
        InvalidModelName: the model's name cannot be one, and the route says so.
        HttpError: the same on a route that only says that there is no such model; a wrong header.
    """
    return Request(
        id=RequestId(token_hex(8)),
        model=_key(surface, routing.name),
        name=routing.name,
        arrived_at=now,
        kind=surface.kind,
        lane=lane_of(surface, scope),
        client=client_of(scope),
        prompt_tokens=routing.prompt_tokens,
        prefix=routing.prefix,
        output_limit=routing.output_limit,
        options=routing.options,
        load_only=routing.load_only,
        deadline=deadline_of(scope, now),
    )


def _key(surface: Surface, name: str) -> str:
    try:
        return model_key(name)
    except InvalidModelName as exc:
        if surface.checks_names:
            raise
        raise HttpError(404, surface.missing.format(name=name)) from exc
