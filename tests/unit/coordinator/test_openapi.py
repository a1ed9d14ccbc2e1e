"""The description of our own routes holds against the route table, and against OpenAPI's rules."""

import json
import re
from typing import Any

import msgspec
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator
from starlette.requests import Request
from starlette.responses import Response

from ollama_coordinator.access import FREE
from ollama_coordinator.api.http.openapi import Either, Media, document, operation
from ollama_coordinator.api.http.routing import Endpoint
from ollama_coordinator.api.routes import endpoints
from support.coordinator import Running

OLLAMAS = {
    ("get", "/"),
    *(("get", f"/api/{name}") for name in ("version", "tags", "ps", "status")),
    *(("post", f"/api/{name}") for name in ("show", "generate", "chat", "embed", "embeddings")),
    *(("post", f"/api/{name}") for name in ("pull", "push", "create", "copy", "me", "signout")),
    *(("post", f"/api/experimental/{name}") for name in ("web_search", "web_fetch")),
    ("get", "/api/experimental/model-recommendations"),
    ("delete", "/api/delete"),
    ("delete", "/api/user/keys/{key}"),
    ("head", "/api/blobs/{digest}"),
    ("post", "/api/blobs/{digest}"),
    *(("post", f"/v1/{name}") for name in ("chat/completions", "completions", "embeddings")),
    *(("post", f"/v1/{name}") for name in ("responses", "messages", "audio/transcriptions")),
    *(("post", f"/v1/images/{name}") for name in ("generations", "edits")),
    ("get", "/v1/models"),
    ("get", "/v1/models/{model}"),
}
"""Every route of an Ollama that the fleet has; what is not here is our own."""


def routed(coordinator: Running) -> set[tuple[str, str]]:
    """Methods and paths of the route table, without the HEAD that comes with a GET."""
    return {
        (one.method.lower(), re.sub(r":\w+\}", "}", one.path))
        for one in endpoints(coordinator.parts)
    }


@pytest.fixture
async def shown(coordinator: Running) -> Any:
    return await coordinator.get("/api/openapi.json")


def described(shown: Any) -> dict[tuple[str, str], Any]:
    return {
        (method, path): one
        for path, methods in shown["paths"].items()
        for method, one in methods.items()
    }


@pytest.mark.spec("SURFACE-40")
async def test_every_route_is_in_the_description_and_no_other(
    coordinator: Running, shown: Any
) -> None:
    assert set(described(shown)) == routed(coordinator)


@pytest.mark.spec("SURFACE-40")
async def test_every_route_of_our_own_is_described(shown: Any) -> None:
    by_tag = {key: one["tags"] for key, one in described(shown).items()}
    assert {key for key, tags in by_tag.items() if tags == ["ollama"]} == OLLAMAS
    for key, one in described(shown).items():
        if one["tags"] == ["coordinator"]:
            assert one["summary"], key
            assert any(status[0] in "23" or status == "101" for status in one["responses"]), key


@pytest.mark.spec("SURFACE-40")
async def test_the_description_is_openapi_3_1(shown: Any) -> None:
    assert shown["openapi"].startswith("3.1.")
    OpenAPIV31SpecValidator(shown).validate()
    names = [one["operationId"] for one in described(shown).values()]
    assert len(names) == len(set(names))


@pytest.mark.spec("SURFACE-40")
async def test_no_type_is_described_that_nothing_uses(shown: Any) -> None:
    text = json.dumps(shown)
    for name in shown["components"]["schemas"]:
        assert f'"#/components/schemas/{name}"' in text, name


class One(msgspec.Struct):
    """What one is.

    And what it is not.
    """

    number: int


class Other(msgspec.Struct):
    text: str = ""


def test_a_declaration_becomes_a_description() -> None:
    @operation(
        takes=One,
        gives={200: Either(One, Other), 202: Media("text/plain"), 204: None},
        errors=(404,),
        relays=True,
    )
    async def make(request: Request) -> Response:
        """Make it.

        Or not.
        """
        return Response()

    shown = document([Endpoint("PUT", "/things/{name:path}", FREE, make)])
    made = shown["paths"]["/things/{name}"]["put"]
    assert made["summary"] == "Make it"
    assert [parameter["name"] for parameter in made["parameters"]] == ["name"]
    assert list(made["responses"]) == ["200", "202", "204", "400", "404", "408", "413", "default"]
    one_of = made["responses"]["200"]["content"]["application/json"]["schema"]["anyOf"]
    assert [schema["$ref"].rpartition("/")[2] for schema in one_of] == ["One", "Other"]
    assert list(made["responses"]["202"]["content"]) == ["text/plain"]
    assert "content" not in made["responses"]["204"]
    assert shown["components"]["schemas"]["One"]["description"] == (
        "What one is.\n\nAnd what it is not."
    )
