"""What a route of our own takes and gives, declared where it is handled.

`openapi.py` makes the description of the API of it; a route without a declaration fails a test.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from msgspec import Struct

Handler = TypeVar("Handler", bound=Callable[..., Any])

BODY_ERRORS = (400, 408, 413)
"""What every route that takes a body may answer to one that is wrong, stands still, or too long."""


class ErrorBody(Struct, frozen=True):
    """Every error of the coordinator's own routes: one sentence that says what to do."""

    error: str


class Query(Struct, frozen=True):
    """One parameter behind the `?`; `type` is what its text has to mean."""

    name: str
    text: str
    type: Any = str


class Media(Struct, frozen=True):
    """An answer that is not a JSON object of one type: its content type, and what is in it."""

    type: str
    holds: Any = str


class Either(Struct, frozen=True):
    """An answer that is of one type or of another."""

    one: Any
    other: Any


class Operation(Struct, frozen=True):
    """One method of one path.

    `takes` is the type of the body; `gives` the body of each answer by its status: a type, an
    `Either`, a `Media` or several of them for what is not JSON, `None` for no body. `errors` are
    the statuses that have an `ErrorBody`. `relays`: also the errors that an agent's Ollama
    answers, with their status.
    """

    summary: str
    takes: Any = None
    gives: Mapping[int, Any] = {}
    query: tuple[Query, ...] = ()
    errors: tuple[int, ...] = ()
    relays: bool = False

    @property
    def all_errors(self) -> tuple[int, ...]:
        """The errors, those of the body included."""
        return tuple(sorted({*self.errors, *(BODY_ERRORS if self.takes is not None else ())}))


def operation(summary: str, **declared: Any) -> Callable[[Handler], Handler]:
    """Declare what a handler takes and gives; see `Operation`."""

    def declare(handler: Handler) -> Handler:
        handler.operation = Operation(summary, **declared)  # type: ignore[attr-defined]
        return handler

    return declare


def operation_of(endpoint: object) -> Operation | None:
    """What was declared of a route's handler; nothing is of Ollama's own routes."""
    found = getattr(endpoint, "operation", None)
    return found if isinstance(found, Operation) else None
