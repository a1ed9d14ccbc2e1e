"""The fleet's model lists, as if from one Ollama: from what is known, without asking the agents."""

from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from ollama_coordinator.agent_queries import Answer
from ollama_coordinator.aio import Slices
from ollama_coordinator.api.http.dialects import Dialect
from ollama_coordinator.api.http.errors import JSON, HttpError, error_reply, reply
from ollama_coordinator.api.http.openapi import operation
from ollama_coordinator.api.http.versions import UNKNOWN, lowest
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

from .fleet_models import FleetModel, fleet_model
from .lists import KeptList

LONG_AGO = datetime.fromtimestamp(0, UTC)


class FleetModels(Struct, frozen=True):
    """`GET /api/models`."""

    models: list[FleetModel]


Cloud = Callable[[str, str], Awaitable[Answer]]
"""Asks ollama.com about a model: method and path."""


class ModelsApi:
    """The handlers of the lists."""

    def __init__(self, registry: Registry, monitor: Monitor, clock: Clock, cloud: Cloud) -> None:
        self._registry = registry
        self._cloud = cloud
        self._monitor = monitor
        self._clock = clock
        self._lists = KeptList(registry, _listed, _write_lists)
        self._fleet = KeptList(registry, _of_the_fleet, _write_fleet)

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
        tags, _ = await self._lists.bodies()
        return Response(tags, media_type=JSON)

    async def ps(self, request: Request) -> Response:
        """`GET /api/ps`: one row per model in memory anywhere, latest expiry first."""
        slices = Slices()
        await self._monitor.refresh(self._registry, older_than=1.0, seconds=1.0)
        now = self._clock.now()
        rows: defaultdict[tuple[str, str], list[LoadedRow]] = defaultdict(list)
        for agent in list(self._registry):
            await slices.pause()
            if self._registry.is_online(agent, now):
                for row in agent.inventory.loaded.values():
                    if row.raw is not None:
                        rows[row.key, row.model.digest].append(row)
        merged = []
        for same in rows.values():
            await slices.pause()
            merged.append(_merge(same))
        merged.sort(key=lambda row: row[0], reverse=True)
        body = b'{"models":[' + b",".join(raw for _, raw in merged) + b"]}"
        return Response(body, media_type=JSON)

    async def v1_list(self, request: Request) -> Response:
        """`GET /v1/models`: the same as OpenAI lists them; Ollama says null where there is none."""
        _, openai = await self._lists.bodies()
        return _v1(openai)

    @operation("Every model of the fleet, and who has it", gives={200: FleetModels})
    async def fleet(self, request: Request) -> Response:
        """`GET /api/models`: every model with its contents, who has it, and where it is loaded."""
        (body,) = await self._fleet.bodies()
        return Response(body, media_type=JSON)

    async def v1_show(self, request: Request) -> Response:
        """`GET /v1/models/{model}`."""
        name = request.path_params["model"]
        try:
            key = model_key(name)
        except InvalidModelName as exc:
            return error_reply(exc, Dialect.OPENAI)
        row = _preferred_row(self._registry, key)
        if row is None and ModelName.parse(name).runs_in_the_cloud:
            told = await self._cloud("GET", f"/v1/models/{quote(name, safe=':')}")
            return Response(told.body, told.status, media_type="application/json")
        if row is None:
            return error_reply(HttpError(404, f"model '{name}' not found"), Dialect.OPENAI)
        return _v1(msgspec.json.encode({**_openai_row(row), "id": name}))


class ListedModel(Struct, frozen=True):
    """One model in Ollama's list and in OpenAI's; JSON."""

    modified_at: datetime
    tags: bytes
    openai: bytes


def _listed(registry: Registry, key: str) -> ListedModel | None:
    row = _preferred_row(registry, key)
    if row is None:
        return None
    return ListedModel(modified_at(row), row.raw, msgspec.json.encode(_openai_row(row)))


def _write_lists(models: Iterable[ListedModel]) -> tuple[bytes, bytes]:
    """The bodies of `/api/tags` and of `/v1/models`, newest first."""
    newest_first = sorted(models, key=lambda model: model.modified_at, reverse=True)
    tags = b'{"models":[' + b",".join(model.tags for model in newest_first) + b"]}"
    rows = b",".join(model.openai for model in newest_first)
    return tags, b'{"object":"list","data":' + (b"[" + rows + b"]" if rows else b"null") + b"}"


def _of_the_fleet(registry: Registry, key: str) -> bytes | None:
    return msgspec.json.encode(fleet_model(registry, key)) if registry.holders(key) else None


def _write_fleet(models: Iterable[bytes]) -> tuple[bytes]:
    return (b'{"models":[' + b",".join(models) + b"]}",)


def _preferred_row(registry: Registry, key: str) -> AvailableRow | None:
    """The newest row of the preferred content; `None` where nobody has the model."""
    rows = [agent.inventory.available[key] for agent in registry.holders(key)]
    return newest(rows) if rows else None


def _openai_row(row: AvailableRow) -> dict[str, Any]:
    return {
        "id": row.model.name,
        "object": "model",
        "created": int(modified_at(row).timestamp()),
        "owned_by": ModelName.parse(row.model.name).namespace,
    }


def _v1(body: bytes) -> Response:
    return Response(body, media_type="application/json")


def _lowest(agents: Iterable[AgentState]) -> str | None:
    return lowest(agent.registration.ollama_version for agent in agents)


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
