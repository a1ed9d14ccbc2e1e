"""The fleet's model lists, as if from one Ollama: from what is known, without asking the agents."""

from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ollama_coordinator.asking import Answer
from ollama_coordinator.clock import Clock
from ollama_coordinator.monitor import Monitor
from ollama_coordinator.registry import (
    AgentState,
    AvailableRow,
    LoadedRow,
    Registry,
    modified_at,
    newest,
)
from ollama_coordinator_common.error import InvalidModelName
from ollama_coordinator_common.names import ModelName, model_key

from .dialects import Dialect
from .versions import UNKNOWN, lowest
from .wire import JSON, HttpError, error_reply, reply

LONG_AGO = datetime.fromtimestamp(0, UTC)


Cloud = Callable[[str, str], Awaitable[Answer]]
"""Asks ollama.com about a model: method and path."""


class ModelsApi:
    """The handlers of the lists."""

    def __init__(self, registry: Registry, monitor: Monitor, clock: Clock, cloud: Cloud) -> None:
        self._registry = registry
        self._cloud = cloud
        self._monitor = monitor
        self._clock = clock
        self._tags: tuple[int, bytes] = (-1, b"")

    async def root(self, request: Request) -> Response:
        """`GET /`: what every Ollama client asks first."""
        return Response("Ollama is running", media_type="text/plain")

    async def version(self, request: Request) -> Response:
        """`GET /api/version`: the lowest of the fleet, since clients gate features on it."""
        now = self._clock.now()
        routable = [agent for agent in self._registry if self._registry.is_routable(agent, now)]
        return reply({"version": _lowest(routable) or _lowest(self._registry) or UNKNOWN})

    async def tags(self, request: Request) -> Response:
        """`GET /api/tags`: the union, one row a name, newest first; offline holders count too."""
        if self._tags[0] != self._registry.changes:
            rows = sorted(self._preferred(), key=modified_at, reverse=True)
            body = b'{"models":[' + b",".join(row.raw for row in rows) + b"]}"
            self._tags = (self._registry.changes, body)
        return Response(self._tags[1], media_type=JSON)

    async def ps(self, request: Request) -> Response:
        """`GET /api/ps`: one row per model in memory anywhere, latest expiry first."""
        await self._monitor.refresh(self._registry, older_than=1.0, seconds=1.0)
        now = self._clock.now()
        rows: defaultdict[tuple[str, str], list[LoadedRow]] = defaultdict(list)
        for agent in self._registry:
            if self._registry.is_online(agent, now):
                for row in agent.inventory.loaded.values():
                    if row.raw is not None:
                        rows[row.key, row.model.digest].append(row)
        merged = [_merge(same) for same in rows.values()]
        merged.sort(key=lambda row: row[0], reverse=True)
        body = b'{"models":[' + b",".join(raw for _, raw in merged) + b"]}"
        return Response(body, media_type=JSON)

    async def v1_list(self, request: Request) -> Response:
        """`GET /v1/models`: the same as OpenAI lists them; Ollama says null where there is none."""
        rows = sorted(self._preferred(), key=modified_at, reverse=True)
        return _v1({"object": "list", "data": [_openai_row(row) for row in rows] or None})

    async def v1_show(self, request: Request) -> Response:
        """`GET /v1/models/{model}`."""
        name = request.path_params["model"]
        try:
            key = model_key(name)
        except InvalidModelName as exc:
            return error_reply(exc, Dialect.OPENAI)
        row = next((row for row in self._preferred() if row.key == key), None)
        if row is None and ModelName.parse(name).runs_in_the_cloud:
            told = await self._cloud("GET", f"/v1/models/{quote(name, safe=':')}")
            return Response(told.body, told.status, media_type="application/json")
        if row is None:
            return error_reply(HttpError(404, f"model '{name}' not found"), Dialect.OPENAI)
        return _v1({**_openai_row(row), "id": name})

    def _preferred(self) -> Iterable[AvailableRow]:
        """One row a name: the newest of the preferred content."""
        for key in self._registry.models():
            holders = self._registry.holders(key)
            yield newest([agent.inventory.available[key] for agent in holders])


def _v1(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _lowest(agents: Iterable[AgentState]) -> str | None:
    return lowest(agent.registration.ollama_version for agent in agents)


def _openai_row(row: AvailableRow) -> dict[str, Any]:
    parsed = ModelName.parse(row.model.name)
    return {
        "id": row.model.name,
        "object": "model",
        "created": int(modified_at(row).timestamp()),
        "owned_by": parsed.namespace,
    }


def _merge(rows: list[LoadedRow]) -> tuple[datetime, bytes]:
    """One row of `/api/ps` for a model that several agents have in memory, and its expiry.

    Sizes add up (the command line shows their ratio), the context is the smallest: who sizes a
    prompt by it must fit everywhere.
    """
    latest = max(rows, key=lambda row: row.model.expires_at or LONG_AGO)
    expires_at = latest.model.expires_at or LONG_AGO
    if len(rows) == 1:
        return expires_at, latest.raw or b""
    merged: dict[str, Any] = msgspec.json.decode(latest.raw or b"{}")
    merged["size"] = sum(row.model.size for row in rows)
    merged["size_vram"] = sum(row.model.size_vram for row in rows)
    contexts = [row.model.context_length for row in rows if row.model.context_length is not None]
    if contexts:
        merged["context_length"] = min(contexts)
    return expires_at, msgspec.json.encode(merged)
