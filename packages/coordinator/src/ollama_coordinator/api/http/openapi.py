"""The description of our own routes, in OpenAPI 3.1: `GET /api/openapi.json`.

What a handler takes and gives is declared beside it, with `operation`; a route of our own without a
declaration fails a test. The description is made of the route list, the declarations and the types
on the wire. Ollama's routes are listed only: what they take and give is Ollama's to say.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from importlib.metadata import version
from inspect import cleandoc
from typing import Any, TypeVar

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from ollama_coordinator.api.http.errors import JSON
from ollama_coordinator.api.http.routing import Endpoint

Handler = TypeVar("Handler", bound=Callable[..., Any])

BODY_ERRORS = (400, 408, 413)
"""The errors of every route that takes a body: it is wrong, stands still, or is too long."""


class ErrorBody(Struct, frozen=True):
    """Every error of the coordinator's own routes: one sentence that says what to do."""

    error: str


class Query(Struct, frozen=True):
    """One parameter of the query; its text has to be a value of `type`."""

    name: str
    text: str
    type: Any = str


class Media(Struct, frozen=True):
    """An answer that is not JSON of one type: its content type, and the type of its content."""

    type: str
    holds: Any = str


class Either(Struct, frozen=True):
    """A body that is of one type or of another."""

    one: Any
    other: Any


class RouteDescription(Struct, frozen=True):
    """One method of one path.

    `takes` is the type of the body, or an `Either`; `gives` the body of each answer by its status:
    a type, an `Either`, a `Media` or several of them for what is not JSON, `None` for no body.
    `errors` are the statuses that have an `ErrorBody`. `relays`: it also answers the errors of an
    agent's Ollama, with their status.
    """

    summary: str
    description: str = ""
    takes: Any = None
    gives: Mapping[int, Any] = {}
    query: tuple[Query, ...] = ()
    errors: tuple[int, ...] = ()
    relays: bool = False

    @property
    def all_errors(self) -> tuple[int, ...]:
        """The errors, those of the body included."""
        return tuple(sorted({*self.errors, *(BODY_ERRORS if self.takes is not None else ())}))


def operation(**declared: Any) -> Callable[[Handler], Handler]:
    """Declare what a handler takes and gives; its docstring is the summary and the description."""

    def declare(handler: Handler) -> Handler:
        summary, _, more = cleandoc(handler.__doc__ or "").partition("\n\n")
        described = RouteDescription(summary.removesuffix("."), more.replace("\n", " "), **declared)
        handler.operation = described  # type: ignore[attr-defined]
        return handler

    return declare


def operation_of(endpoint: object) -> RouteDescription | None:
    """The declaration of a handler; `None` for a route of Ollama's."""
    found = getattr(endpoint, "operation", None)
    return found if isinstance(found, RouteDescription) else None


SCHEMA_REF = "#/components/schemas/{name}"
ABOUT = (
    "The coordinator's own routes, beside those of Ollama. Times are RFC 3339 in UTC, sizes in "
    "bytes, durations in seconds. A GET route answers HEAD too. A request with an `Origin` that "
    "is not allowed is answered 403 with no body, whatever the route."
)
MEANING = {
    400: "The request is wrong; `error` says where.",
    401: "A key is needed that has the right of this route.",
    403: "The caller may not do this.",
    404: "There is no such thing.",
    408: "Nothing came of the body for too long.",
    409: "Not as things are; `error` says what is in the way and what to do.",
    413: "The body is too long.",
    426: "It takes an upgrade to a WebSocket, which did not arrive.",
    429: "Too many; `Retry-After` says when to try again.",
    501: "This server cannot do it as it is set up; `error` says what to set.",
    503: "Not now: the database or the agents that are needed cannot be reached.",
}

_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")

Json = dict[str, Any]


def document(endpoints: Sequence[Endpoint]) -> Json:
    """The description of these endpoints; HEAD beside GET is not worth a line."""
    listed = [(one.method, one.path, operation_of(one.handler)) for one in endpoints]
    types = _Types([declared for _, _, declared in listed if declared is not None])
    paths: dict[str, Json] = {}
    for method, path, declared in listed:
        described = _ollamas(path) if declared is None else _own(path, declared, types)
        described["operationId"] = _name(method, path)
        paths.setdefault(_PARAMETER.sub(r"{\1}", path), {})[method.lower()] = described
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Ollama Coordinator",
            "version": version("ollama-coordinator"),
            "description": ABOUT,
        },
        "tags": [
            {"name": "coordinator", "description": "Agents, requests, operations, settings."},
            {"name": "ollama", "description": "As one Ollama answers them; not described here."},
        ],
        "paths": dict(sorted(paths.items())),
        "components": {"schemas": types.components},
    }


def _name(method: str, path: str) -> str:
    words = re.findall(r"\w+", _PARAMETER.sub(r"by \1", path))
    return "_".join([method.lower(), *words])


def _path_parameters(path: str) -> list[Json]:
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in _PARAMETER.findall(path)
    ]


def _ollamas(path: str) -> Json:
    described: Json = {
        "tags": ["ollama"],
        "summary": "Ollama's",
        "responses": {"default": {"description": "What Ollama answers."}},
    }
    parameters = _path_parameters(path)
    return {**described, "parameters": parameters} if parameters else described


def _own(path: str, declared: RouteDescription, types: "_Types") -> Json:
    described: Json = {"tags": ["coordinator"], "summary": declared.summary}
    if declared.description:
        described["description"] = declared.description
    query = [
        {"name": one.name, "in": "query", "description": one.text, "schema": types.of(one.type)}
        for one in declared.query
    ]
    parameters = [*_path_parameters(path), *query]
    if parameters:
        described["parameters"] = parameters
    if declared.takes is not None:
        described["requestBody"] = {"required": True, "content": types.content(declared.takes)}
    described["responses"] = _responses(declared, types)
    return described


def _responses(declared: RouteDescription, types: "_Types") -> Json:
    error = {"application/json": {"schema": types.of(ErrorBody)}}
    responses: Json = {}
    for status, given in declared.gives.items():
        responses[str(status)] = {"description": HTTPStatus(status).phrase}
        if given is not None:
            responses[str(status)]["content"] = types.content(given)
    for status in declared.all_errors:
        known = responses.setdefault(str(status), {"description": MEANING[status]})
        known.setdefault("content", error)
    if declared.relays:
        words = "What an agent's Ollama refused, in its own words."
        responses["default"] = {"description": words, "content": error}
    return responses


class _Types:
    """The schemas of all types that are declared, as components that refer to each other."""

    def __init__(self, declared: Sequence[RouteDescription]) -> None:
        used: list[Any] = [ErrorBody]
        for one in declared:
            used += [query.type for query in one.query]
            used += [
                kind for given in (one.takes, *one.gives.values()) for kind in _types_in(given)
            ]
        schemas, components = msgspec.json.schema_components(used, ref_template=SCHEMA_REF)
        self._schemas = {id(kind): schema for kind, schema in zip(used, schemas, strict=True)}
        self._used = used  # an id means something only as long as its owner lives
        self.components = {name: _tidy(schema) for name, schema in sorted(components.items())}

    def of(self, kind: Any) -> Json:
        """The schema of a declared type."""
        return self._schemas[id(kind)]

    def content(self, given: Any) -> Json:
        """The bodies of an answer by content type."""
        if isinstance(given, Media | tuple):
            media = given if isinstance(given, tuple) else (given,)
            return {one.type: {"schema": self.of(one.holds)} for one in media}
        schemas = [self.of(kind) for kind in _types_in(given)]
        schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
        return {"application/json": {"schema": schema}}


def _types_in(given: Any) -> list[Any]:
    """The types that an answer, or a body, consists of."""
    if isinstance(given, Either):
        return [given.one, given.other]
    if isinstance(given, Media | tuple):
        return [one.holds for one in (given if isinstance(given, tuple) else (given,))]
    return [] if given is None else [given]


def _tidy(schema: Json) -> Json:
    """Docstrings without the indentation of the source."""
    if "description" in schema:
        return {**schema, "description": cleandoc(schema["description"])}
    return schema


class OpenApi:
    """The handler of the description of `endpoints`, itself included."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self._endpoints = endpoints
        self._body = b""

    @operation(gives={200: dict[str, Any]})
    async def show(self, request: Request) -> Response:
        """This description."""
        if not self._body:
            self._body = msgspec.json.encode(document(self._endpoints))
        return Response(self._body, media_type=JSON)
