"""The one table of errors and statuses, and our own API's bodies."""

import importlib
import json
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
from msgspec import Struct
from starlette.requests import Request
from starlette.types import Message

import ollama_coordinator
from ollama_coordinator.access import Denied
from ollama_coordinator.api.http.dialects import Dialect
from ollama_coordinator.api.http.errors import (
    JSON,
    OWN_BODY_LIMIT,
    STATUS,
    HttpError,
    decode,
    error_reply,
    headers_of,
    reply,
    send_error,
    status_of,
)
from ollama_coordinator.commands.client import NoAnswer
from ollama_coordinator.db import DatabaseError
from ollama_coordinator.front.front import LeaderReplaced
from ollama_coordinator.operations import Refused, UploadError
from ollama_coordinator.operations.supply import WriterLost
from ollama_coordinator.registry import UnknownAgent
from ollama_coordinator.scheduler import (
    HoldersUnavailable,
    ModelNotFound,
    NoAgentRegistered,
    QueueFull,
    SchedulerError,
)
from ollama_coordinator.upstream import AgentLost, Cut, Unreachable, UpstreamError
from ollama_coordinator.workers import WorkerFailed
from ollama_coordinator_common.error import (
    ConfigError,
    ConflictingSource,
    InvalidModelName,
    OllamaCoordinatorError,
)
from ollama_coordinator_common.services import CannotInstall

NEVER_ANSWERED: dict[type[OllamaCoordinatorError], str] = {
    OllamaCoordinatorError: "the root; only its children are raised",
    UpstreamError: "a branch; only its children are raised",
    SchedulerError: "a branch; only its children are raised",
    ConfigError: "ends the program before it serves",
    WorkerFailed: "ends the program that started the processes",
    LeaderReplaced: "has the request passed on again, or its answer broken off",
    CannotInstall: "is for the command line that installs the coordinator as a service",
    NoAnswer: "is for the command line that asks a coordinator",
    WriterLost: "has the operation go on once the agent answers again, or ends it as Refused",
}
BRINGS_ITS_OWN = (Denied, HttpError, Refused, UploadError)


def modules(package: Any) -> Iterator[str]:
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not found.name.endswith("__main__"):
            yield found.name


def every_error() -> set[type[OllamaCoordinatorError]]:
    """Every error class that the coordinator's process can have."""
    for name in modules(ollama_coordinator):
        importlib.import_module(name)
    found: set[type[OllamaCoordinatorError]] = set()
    new = {OllamaCoordinatorError}
    while new:
        found |= new
        new = {child for parent in new for child in parent.__subclasses__()} - found
    ours = ("ollama_coordinator.", "ollama_coordinator_common.")
    return {kind for kind in found if kind.__module__.startswith(ours)}


def test_every_error_that_can_reach_a_client_has_a_status() -> None:
    silent = {
        kind
        for kind in every_error() - NEVER_ANSWERED.keys()
        if not issubclass(kind, BRINGS_ITS_OWN)
        and not any(parent in STATUS for parent in kind.__mro__)
    }
    assert silent == set()


def test_nothing_is_excused_that_has_a_status() -> None:
    assert STATUS.keys() & NEVER_ANSWERED.keys() == set()
    assert STATUS.keys() | NEVER_ANSWERED.keys() <= every_error()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidModelName("x y"), 400),
        (ConflictingSource("x:local:cloud"), 400),
        (ModelNotFound("m"), 404),
        (UnknownAgent("a"), 404),
        (NoAgentRegistered(), 503),
        (HoldersUnavailable("m", {"gpu-1": "offline"}), 503),
        (QueueFull(3.2), 503),
        (Unreachable("refused"), 503),
        (AgentLost("gone"), 503),
        (Cut("cut"), 502),
        (DatabaseError("in memory", "full"), 503),
        (HttpError(418, "short and stout"), 418),
    ],
)
def test_an_error_has_the_status_of_its_nearest_ancestor(
    error: OllamaCoordinatorError, status: int
) -> None:
    assert status_of(error) == status
    answer = error_reply(error)
    assert answer.status_code == status
    assert answer.media_type == JSON
    assert json.loads(bytes(answer.body)) == {"error": str(error)}


@pytest.mark.parametrize(("seconds", "header"), [(0.2, "1"), (3.2, "3"), (60.0, "60")])
def test_a_full_queue_says_when_to_come_back(seconds: float, header: str) -> None:
    assert headers_of(QueueFull(seconds)) == {"retry-after": header}
    assert headers_of(ModelNotFound("m")) == {}


def test_sentences_tell_an_operator_what_to_do() -> None:
    text = str(HoldersUnavailable("m", {"b": "offline", "a": "draining"}, ["gpu-2", "gpu-1"]))
    assert "a: draining; b: offline" in text
    assert "gpu-1, gpu-2" in text
    assert "pull the model elsewhere" in text
    assert "ollama-coordinator-agent run" in str(NoAgentRegistered())


async def test_an_error_is_sent_whole_in_the_clients_dialect() -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await send_error(send, Dialect.OPENAI, QueueFull(7))
    start, body = sent
    headers = dict(start["headers"])
    assert start["status"] == 503
    assert headers[b"retry-after"] == b"7"
    assert headers[b"content-type"] == b"application/json"
    assert headers[b"content-length"] == str(len(body["body"])).encode()
    assert not body["more_body"]
    assert json.loads(body["body"])["error"]["type"] == "api_error"


class Thing(Struct):
    """A body of our own API."""

    number: int


def request(*parts: bytes) -> Request:
    left = list(parts)

    async def receive() -> Message:
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    return Request({"type": "http", "method": "POST", "headers": []}, receive)


async def test_a_body_becomes_its_type() -> None:
    assert (await decode(Thing, request(b'{"num', b'ber":1}'))).number == 1


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "missing request body"),
        (b" \n", "missing request body"),
        (b'{"number":"x"}', r"invalid request body: .*\$\.number"),
        (b"{}", "number"),
        (b"{", "invalid request body"),
        (b'{"number":1}x', "invalid request body"),
        (b'{"\xff":1}', "invalid request body|number"),
        (b'{"a":' + b"[" * 100_000, "invalid request body"),
    ],
)
async def test_another_body_is_refused_with_what_is_wrong(body: bytes, text: str) -> None:
    with pytest.raises(HttpError, match=text) as caught:
        await decode(Thing, request(body))
    assert caught.value.status == 400


async def test_a_body_of_our_own_api_has_a_limit() -> None:
    half = b" " * (OWN_BODY_LIMIT // 2 + 1)
    with pytest.raises(HttpError, match="too large") as caught:
        await decode(Thing, request(half, half, b"{}"))
    assert caught.value.status == 413


def test_a_reply_is_json() -> None:
    answer = reply(Thing(1), 201)
    assert (answer.status_code, bytes(answer.body)) == (201, b'{"number":1}')
    assert answer.headers["content-type"] == JSON
