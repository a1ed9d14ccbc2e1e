"""The HTTP surface: every route in one list."""

from collections.abc import Sequence

from msgspec import Struct
from starlette.routing import BaseRoute, Route

from .http.openapi import OpenApi
from .http.routing import gathered
from .inference.proxy import Proxy
from .models.lists import ModelsApi
from .own.agent_log import AgentLogApi
from .own.agents import AgentsApi
from .own.explain import ExplainApi
from .own.health import HealthApi


class Handlers(Struct, frozen=True):
    """The handlers that the routes lead to."""

    agents: AgentsApi
    agent_log: AgentLogApi
    explain: ExplainApi
    health: HealthApi
    models: ModelsApi
    proxies: Sequence[Proxy]
    surface: Sequence[BaseRoute]
    console: Sequence[BaseRoute]


def routes(to: Handlers) -> list[BaseRoute]:
    """Every route of the coordinator, one a path."""
    return gathered(listed(to))


def listed(to: Handlers) -> list[BaseRoute]:
    """Every route, one a method."""
    table: list[BaseRoute] = [
        *(Route(proxy.path, proxy, methods=["POST"]) for proxy in to.proxies),
        *to.console,
        Route("/api/version", to.models.version, methods=["GET"]),
        Route("/api/tags", to.models.tags, methods=["GET"]),
        Route("/api/ps", to.models.ps, methods=["GET"]),
        Route("/api/models", to.models.fleet, methods=["GET"]),
        Route("/v1/models", to.models.v1_list, methods=["GET"]),
        Route("/v1/models/{model}", to.models.v1_show, methods=["GET"]),
        Route("/api/agents", to.agents.register, methods=["POST"]),
        Route("/api/agents", to.agents.list, methods=["GET"]),
        Route("/api/agents/{agent_id}", to.agents.show, methods=["GET"]),
        Route("/api/agents/{agent_id}", to.agents.change, methods=["PATCH"]),
        Route("/api/agents/{agent_id}", to.agents.remove, methods=["DELETE"]),
        Route("/api/agents/{agent_id}/log", to.agent_log.show, methods=["GET"]),
        Route("/api/agents/{agent_id}/log", to.agent_log.take, methods=["POST"]),
        Route("/api/explain", to.explain.explain, methods=["POST"]),
        Route("/api/estimates", to.explain.estimates, methods=["GET"]),
        Route("/api/health", to.health.heartbeat, methods=["POST"]),
        Route("/healthz", to.health.healthz, methods=["GET"]),
        Route("/readyz", to.health.readyz, methods=["GET"]),
        *to.surface,
    ]
    table.append(Route("/api/openapi.json", OpenApi(table).show, methods=["GET"]))
    return table
