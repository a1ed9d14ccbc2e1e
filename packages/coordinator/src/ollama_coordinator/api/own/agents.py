"""`/api/agents`: registration, the list, and what an operator does to one agent."""

from collections.abc import Callable
from typing import Annotated, Any
from uuid import uuid4

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType, structs
from starlette.requests import Request
from starlette.responses import Response

from ollama_coordinator.agent_store import AgentStore
from ollama_coordinator.aio import Slices
from ollama_coordinator.api.http.errors import JSON, decode, log_event, reply
from ollama_coordinator.api.http.openapi import operation
from ollama_coordinator.clock import Clock
from ollama_coordinator.dispatch import Dispatch
from ollama_coordinator.monitor import Monitor
from ollama_coordinator.registry import AgentSettings, AgentState, Registry
from ollama_coordinator_common.protocol import (
    AgentOperation,
    AgentView,
    RegisterReply,
    RegisterRequest,
)
from ollama_coordinator_common.types import AgentId

FIRST_LOOK_SECONDS = 1.0
"""How long a registration waits for the first list of models: the next request finds them."""

_register = msgspec.json.Decoder(RegisterRequest)


class SettingsPatch(Struct, frozen=True):
    """`PATCH /api/agents/{id}`: the settings to change; the others stay."""

    display_name: str | UnsetType | None = UNSET
    labels: list[str] | UnsetType = UNSET
    notes: str | UnsetType = UNSET
    draining: bool | UnsetType = UNSET
    preference: Annotated[float, Meta(gt=0)] | UnsetType = UNSET


_patch = msgspec.json.Decoder(SettingsPatch)


class AgentsApi:
    """The handlers of `/api/agents`."""

    def __init__(
        self,
        registry: Registry,
        dispatch: Dispatch,
        monitor: Monitor,
        keeper: AgentStore,
        clock: Clock,
        *,
        operations: Callable[[AgentId], list[AgentOperation]] = lambda agent_id: [],
    ) -> None:
        self._registry = registry
        self._dispatch = dispatch
        self._monitor = monitor
        self._keeper = keeper
        self._clock = clock
        self._operations = operations

    @operation(
        "Register a machine, or renew its registration",
        takes=RegisterRequest,
        gives={200: RegisterReply, 201: RegisterReply},
        errors=(409, 503),
    )
    async def register(self, request: Request) -> Response:
        """`POST /api/agents`: 201 `registered`, or 200 `updated` for a machine already known."""
        wanted = await decode(_register, request)
        now = self._clock.now()
        new_id = AgentId(str(uuid4()))
        done = self._registry.register(wanted, new_id, self._clock.utc(now), now)
        agent = done.agent
        await self._keeper.keep_now(agent)
        log_event("agent registered" if done.created else "agent updated", agent, url=agent.url)
        if agent.inventory.sampled_at is None or not agent.brings_inventory:
            await self._monitor.look_at(agent, seconds=FIRST_LOOK_SECONDS)
        status = "registered" if done.created else "updated"
        return reply(RegisterReply(agent.id, status), 201 if done.created else 200)

    @operation("Every agent, by name", gives={200: list[AgentView]})
    async def list(self, request: Request) -> Response:
        """`GET /api/agents`: every agent, living or not, by name."""
        slices, rows = Slices(), []
        for agent in sorted(self._registry, key=lambda agent: (agent.name, agent.id)):
            await slices.pause()
            rows.append(msgspec.json.encode(self._view(agent)))
        return Response(b"[" + b",".join(rows) + b"]", media_type=JSON)

    @operation("One agent", gives={200: AgentView}, errors=(404,))
    async def show(self, request: Request) -> Response:
        """`GET /api/agents/{id}`: with what it has to do with models."""
        agent = self._registry.get(request.path_params["agent_id"])
        return reply(structs.replace(self._view(agent), operations=self._operations(agent.id)))

    @operation(
        "Change what an operator sets of an agent",
        takes=SettingsPatch,
        gives={200: AgentView},
        errors=(404, 503),
    )
    async def change(self, request: Request) -> Response:
        """`PATCH /api/agents/{id}`: name, labels, notes, drain or resume; kept across restarts."""
        agent = self._registry.get(request.path_params["agent_id"])
        patch = await decode(_patch, request)
        changes: dict[str, Any] = {
            name: value for name, value in structs.asdict(patch).items() if value is not UNSET
        }
        settings: AgentSettings = structs.replace(agent.settings, **changes)
        self._registry.update_settings(agent.id, settings)
        await self._keeper.keep_now(agent)
        log_event("agent settings changed", agent, **changes)
        self._dispatch.plan()
        return reply(self._view(agent))

    @operation("Forget an agent", gives={204: None}, errors=(404, 503))
    async def remove(self, request: Request) -> Response:
        """`DELETE /api/agents/{id}`: forget it; its streams end as they would have."""
        agent = self._registry.remove(AgentId(request.path_params["agent_id"]))
        await self._keeper.forget(agent.id)
        log_event("agent removed", agent)
        self._dispatch.plan()
        return Response(status_code=204)

    def _view(self, agent: AgentState) -> AgentView:
        return self._registry.view(
            agent,
            self._clock.now(),
            last_seen=self._clock.utc(agent.heard_at),
            in_flight=self._dispatch.in_flight(agent.id),
        )
