"""The lists of models as one Ollama has them, and of the fleet; no agent is asked for them.

A fleet of a thousand machines has a hundred thousand models on its disks. A model's row is kept
until the registry's revision of its name is another. New rows are made in slices, between which
streams go on.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from ollama_coordinator.access import NOBODY, Caller, Denied, caller_of
from ollama_coordinator.aio import Slices
from ollama_coordinator.aliases import Alias, Aliases
from ollama_coordinator.api.http.dialects import Dialect
from ollama_coordinator.api.http.errors import JSON, HttpError, decode, error_reply, reply
from ollama_coordinator.api.http.openapi import operation
from ollama_coordinator.api.http.routing import tell
from ollama_coordinator.parts import Parts
from ollama_coordinator.registry import (
    AgentState,
    AvailableRow,
    LoadedRow,
    Registry,
    modified_at,
    newest,
)
from ollama_coordinator.upstream import passed
from ollama_coordinator_common.error import InvalidModelName
from ollama_coordinator_common.names import ModelName, model_key
from ollama_coordinator_common.types import AgentId

log = logging.getLogger(__name__)

LONG_AGO = datetime.fromtimestamp(0, UTC)
"""The expiry of a model whose Ollama reports none."""

UNKNOWN = "0.0.0"
"""The version of a development build of Ollama; nothing follows from it."""

Row = TypeVar("Row")


class KeptList(Generic[Row]):
    """One list of the fleet's models, in one form or several.

    `make` returns the row of a routing key, `None` when no agent has the model any more. `write`
    returns the bodies of the answers, made of all rows in order of their keys. With `rename` each
    alias has the row of the first of its models that is there, under its own name.
    """

    def __init__(
        self,
        registry: Registry,
        make: Callable[[Registry, str], Row | None],
        write: Callable[[Iterable[Row]], tuple[bytes, ...]],
        aliases: Aliases,
        rename: Callable[[Row, Alias], Row] | None = None,
    ) -> None:
        self._registry = registry
        self._aliases = aliases
        self._rename = rename
        self._make = make
        self._write = write
        self._rows: dict[str, tuple[int, Row]] = {}
        self._bodies: tuple[bytes, ...] = ()
        self._changes = (-1, -1)
        self._making = asyncio.Lock()

    async def bodies(self, caller: Caller) -> tuple[bytes, ...]:
        """The body of the list in each of its forms, with what the caller's key may use."""
        async with self._making:
            changes = (self._registry.changes, self._aliases.revision)
            if changes != self._changes:
                await self._remake()
                # A change meanwhile is left for the next call.
                self._changes = changes
        key = caller.key
        if key is None or not key.models:
            return self._bodies
        rows = [row for name, (_, row) in self._rows.items() if key.may_use(name)]
        return self._write([*rows, *self._renamed(caller)])

    def _renamed(self, caller: Caller) -> list[Row]:
        """The rows of the aliases that a caller may use."""
        found = []
        for alias in self._aliases if self._rename is not None else ():
            model = None if self._aliases.hidden_by(alias) else self._first(alias, caller)
            if model is not None and self._rename is not None:
                found.append(self._rename(self._rows[model][1], alias))
        return found

    def _first(self, alias: Alias, caller: Caller) -> str | None:
        name = self._aliases.first_held(alias, caller)
        key = None if name is None else model_key(name)
        return key if key in self._rows else None

    async def _remake(self) -> None:
        slices, aliased = Slices(), self._aliases.revision
        rows: dict[str, tuple[int, Row]] = {}
        for key in self._registry.models:
            known = self._rows.get(key)
            if known is None or known[0] != self._registry.models.revision(key):
                await slices.pause()
                revision = self._registry.models.revision(key)
                row = self._make(self._registry, key)
                known = None if row is None else (revision, row)
            if known is not None:
                rows[key] = known
        changed = rows != self._rows or not self._bodies or self._changes[1] != aliased
        self._rows = rows
        if changed:
            kept = [row for _, row in rows.values()]
            self._bodies = self._write([*kept, *self._renamed(NOBODY)])


class Content(Struct, frozen=True):
    """One content of a name. `is_preferred`: requests are routed to its holders only."""

    digest: str
    blob: str
    size: int
    modified_at: datetime
    is_preferred: bool
    holders: list[AgentId]


class FleetModel(Struct, frozen=True):
    """One row of `GET /api/models`; `conflict`: its holders do not have the same content.

    `contexts` are those of the runners in memory, in tokens, where they are known.
    """

    name: str
    digest: str
    size: int
    modified_at: datetime
    conflict: bool
    holders: list[AgentId]
    loaded_on: list[AgentId]
    contexts: dict[AgentId, int]
    contents: list[Content]


def fleet_model(registry: Registry, key: str) -> FleetModel:
    """The row of a model that at least one agent has."""
    copies = registry.models.copies(key)
    holders = [agent.id for agent in registry.holders(key)]
    groups = registry.models.contents(key)
    row = newest([copies[agent_id] for agent_id in holders])
    runners = {one: registry.get(one).inventory.runner(key) for one in copies}
    return FleetModel(
        name=row.model.name,
        digest=row.model.digest,
        size=row.model.size,
        modified_at=modified_at(row),
        conflict=len(groups) > 1,
        holders=holders,
        loaded_on=[a for a in copies if registry.get(a).inventory.is_loaded(key)],
        contexts={
            one: context
            for one, runner in runners.items()
            if runner is not None and (context := runner.model.context_length) is not None
        },
        contents=[_content(group, is_preferred=holders[0] in group) for group in groups],
    )


def _content(group: dict[AgentId, AvailableRow], *, is_preferred: bool) -> Content:
    row = newest(list(group.values()))
    return Content(
        digest=row.model.digest,
        blob=next((other.blob for other in group.values() if other.blob), ""),
        size=row.model.size,
        modified_at=modified_at(row),
        is_preferred=is_preferred,
        holders=sorted(group),
    )


class FleetModels(Struct, frozen=True):
    """`GET /api/models`."""

    models: list[FleetModel]


# ── the handlers ──────────────────────────────────────────────────────────────────────────────


class ListsApi:
    """The handlers of Ollama's lists."""

    def __init__(self, parts: Parts) -> None:
        self._registry = parts.registry
        self._monitor = parts.monitor
        self._clock = parts.clock
        self._cloud = parts.cloud
        self._instance_id = parts.upstreams.instance_id
        self._aliases = parts.aliases
        self._lists = KeptList(parts.registry, _listed, _write_lists, parts.aliases, _listed_alias)

    async def version(self, request: Request) -> Response:
        """`GET /api/version`: the lowest of the fleet, since clients gate features on it."""
        now = self._clock.now()
        routable = [agent for agent in self._registry if self._registry.is_routable(agent, now)]
        version = _lowest(routable) or _lowest(self._registry) or UNKNOWN
        if not passed.get():
            return reply({"version": version})
        # Another coordinator asks: it must not be among those whose requests come here.
        others = set[str]().union(*(agent.passes for agent in self._registry))
        return reply({"version": version, "coordinators": sorted({self._instance_id, *others})})

    async def tags(self, request: Request) -> Response:
        """`GET /api/tags`: the union, one row a name, newest first; offline holders count too."""
        tags, _ = await self._lists.bodies(caller_of(request.scope))
        return Response(tags, media_type=JSON)

    async def ps(self, request: Request) -> Response:
        """`GET /api/ps`: one row per model in memory anywhere, latest expiry first."""
        slices = Slices()
        await self._monitor.refresh(self._registry, older_than=1.0, seconds=1.0)
        now, key = self._clock.now(), caller_of(request.scope).key
        rows: defaultdict[tuple[str, str], list[LoadedRow]] = defaultdict(list)
        for agent in list(self._registry):
            await slices.pause()
            if self._registry.is_online(agent, now):
                for row in agent.inventory.loaded.values():
                    if row.raw is not None and (key is None or key.may_use(row.key)):
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
        _, openai = await self._lists.bodies(caller_of(request.scope))
        return _v1(openai)

    async def v1_show(self, request: Request) -> Response:
        """`GET /v1/models/{model}`."""
        name, caller = request.path_params["model"], caller_of(request.scope)
        if not name.strip():
            return error_reply(HttpError(400, "model is required"), Dialect.OPENAI)
        alias = self._aliases.find(name)
        try:
            model = None if alias is None else self._aliases.first_held(alias, caller)
            key = model_key(model or name)
            if alias is None:
                caller.check_model(key)
            else:
                self._aliases.usable(alias, caller)
        except (InvalidModelName, Denied) as exc:
            return error_reply(exc, Dialect.OPENAI)
        row = _preferred_row(self._registry, key)
        if row is None and ModelName.parse(name).runs_in_the_cloud:
            of_the_cloud = await self._cloud.ask_of_model(
                "GET", f"/v1/models/{quote(name, safe=':')}"
            )
            return Response(of_the_cloud.body, of_the_cloud.status, media_type="application/json")
        if row is None:
            return error_reply(HttpError(404, f"model '{name}' not found"), Dialect.OPENAI)
        return _v1(msgspec.json.encode({**_openai_row(row), "id": name}))


class FleetApi:
    """The handler of the fleet's own list."""

    def __init__(self, parts: Parts) -> None:
        self._list = KeptList(parts.registry, _of_the_fleet, _write_fleet, parts.aliases)

    @operation(gives={200: FleetModels})
    async def models(self, request: Request) -> Response:
        """Every model of the fleet, and who has it."""
        (body,) = await self._list.bodies(caller_of(request.scope))
        return Response(body, media_type=JSON)


class AliasView(Struct, frozen=True):
    """One alias. `resolved` are the models behind it, the preferred one first.

    `hidden_by`: the names of agents that have a model of its name, which is served instead.
    """

    name: str
    models: tuple[str, ...]
    wait_seconds: float | None
    resolved: list[str]
    hidden_by: list[str]


class AliasesView(Struct, frozen=True):
    """`GET /api/aliases`."""

    aliases: list[AliasView]


class AliasesApi:
    """The handlers of aliases."""

    def __init__(self, parts: Parts) -> None:
        self._aliases = parts.aliases
        self._store = parts.store

    @operation(gives={200: AliasesView})
    async def list(self, request: Request) -> Response:
        """Every alias, in order of their names; of a key for some models, those that it may use."""
        key = caller_of(request.scope).key
        views = [
            self._view(alias)
            for alias in self._aliases
            if key is None or any(key.may_use(name) for name in self._aliases.models(alias))
        ]
        return reply(AliasesView(views))

    @operation(takes=Alias, gives={200: AliasView}, errors=(409,))
    async def put(self, request: Request) -> Response:
        """Make an alias, or replace the one of its name."""
        alias = await decode(Alias, request)
        self._aliases.put(alias)
        by = caller_of(request.scope).name
        tell(request.scope, alias.name, models=alias.models)
        log.info("alias set", extra={"alias": alias.name, "models": alias.models, "by": by})
        await self._store.commit()
        return reply(self._view(alias))

    @operation(gives={204: None}, errors=(400, 404))
    async def remove(self, request: Request) -> Response:
        """Delete an alias; its models stay."""
        alias = self._aliases.remove(request.path_params["name"])
        by = caller_of(request.scope).name
        tell(request.scope, alias.name)
        log.info("alias deleted", extra={"alias": alias.name, "by": by})
        await self._store.commit()
        return Response(status_code=204)

    def _view(self, alias: Alias) -> AliasView:
        models, hidden_by = self._aliases.models(alias), self._aliases.hidden_by(alias)
        return AliasView(alias.name, alias.models, alias.wait_seconds, models, hidden_by)


# ── rows ──────────────────────────────────────────────────────────────────────────────────────


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


def _listed_alias(model: ListedModel, alias: Alias) -> ListedModel:
    """The row of a model under the name of an alias; `alias_of` says what it stands for."""
    name = ModelName.parse(alias.name).short
    tags = msgspec.json.decode(model.tags)
    tags |= {"name": name, "model": name, "alias_of": alias.models}
    openai = {**msgspec.json.decode(model.openai), "id": name}
    return ListedModel(model.modified_at, msgspec.json.encode(tags), msgspec.json.encode(openai))


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
    """The newest row of the preferred content; `None` where no agent has the model."""
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
    return Response(body + b"\n", media_type="application/json")


def _lowest(agents: Iterable[AgentState]) -> str | None:
    return lowest(agent.registration.ollama_version for agent in agents)


def _merge(rows: list[LoadedRow]) -> tuple[datetime, bytes]:
    """One row of `/api/ps` for a model that several agents have in memory, and its expiry.

    Sizes add up (the command line shows their ratio), the context is the smallest: a prompt
    of that size fits everywhere.
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


# ── versions ──────────────────────────────────────────────────────────────────────────────────


def is_known(version: str) -> bool:
    """Whether something follows from a version: not from none, a word, or a development build's."""
    return any(version_key(version)[0])


def version_key(version: str) -> tuple[list[int], str]:
    """The key that sorts versions; a release candidate counts as its release."""
    numbers = version.strip().lstrip("v").partition("-")[0].split(".")
    return [int(number) if number.isdecimal() else 0 for number in numbers], version


def lowest(versions: Iterable[str]) -> str | None:
    """The lowest of the known versions."""
    known = [version for version in versions if is_known(version)]
    return min(known, key=version_key, default=None)


def is_older(version: str, than: str) -> bool:
    """Whether a known version is older than another."""
    return is_known(version) and version_key(version)[0] < version_key(than)[0]
