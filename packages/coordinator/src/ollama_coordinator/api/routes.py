"""Every route of the coordinator, in one list."""

from ollama_coordinator.batches import Batches
from ollama_coordinator.parts import Parts

from .http.dialects import INFERENCE_ROUTES
from .http.openapi import OpenApi
from .http.routing import Endpoint
from .inference.context_fit import ContextFit
from .inference.proxy import Proxy
from .inference.retry_rule import Poison
from .models.cloud import CloudApi
from .models.lists import FleetApi, ListsApi
from .models.show import ShowApi
from .models.transfer import TransferApi
from .own.agents import AgentsApi
from .own.dashboard import DashboardApi, EventsApi
from .own.health import HealthApi
from .own.history import HistoryApi
from .own.operations import OperationsApi
from .own.requests import RequestsApi
from .own.settings import SettingsApi


def endpoints(parts: Parts) -> list[Endpoint]:
    """Every method of every path with its handler; the most frequent first."""
    table = [*_of_ollama(parts), *_of_our_own(parts)]
    table.append(Endpoint("GET", "/api/openapi.json", OpenApi(table).show))
    return table


def _of_ollama(parts: Parts) -> list[Endpoint]:
    context_fit, lists, show = ContextFit(parts), ListsApi(parts), ShowApi(parts)
    transfer, cloud, poison = TransferApi(parts), CloudApi(parts), Poison()
    batches = Batches()
    proxies = [
        (one.path, Proxy(parts, one, context_fit, poison, batches)) for one in INFERENCE_ROUTES
    ]
    return [
        *(Endpoint("POST", path, proxy) for path, proxy in proxies),
        Endpoint("GET", "/api/version", lists.version),
        Endpoint("GET", "/api/tags", lists.tags),
        Endpoint("GET", "/api/ps", lists.ps),
        Endpoint("GET", "/v1/models", lists.v1_list),
        Endpoint("GET", "/v1/models/{model}", lists.v1_show),
        Endpoint("POST", "/api/show", show.show),
        Endpoint("POST", "/api/pull", transfer.pull),
        Endpoint("POST", "/api/push", transfer.push),
        Endpoint("POST", "/api/create", transfer.create),
        Endpoint("POST", "/api/copy", transfer.copy),
        Endpoint("DELETE", "/api/delete", transfer.delete),
        Endpoint("HEAD", "/api/blobs/{digest}", transfer.head_blob),
        Endpoint("POST", "/api/blobs/{digest}", transfer.post_blob),
        Endpoint("GET", "/api/status", cloud.status),
        Endpoint("POST", "/api/me", cloud.me),
        Endpoint("POST", "/api/signout", cloud.signout),
        Endpoint("DELETE", "/api/user/keys/{key}", cloud.signout),
        Endpoint("POST", "/api/experimental/web_search", cloud.web),
        Endpoint("POST", "/api/experimental/web_fetch", cloud.web),
        Endpoint("GET", "/api/experimental/model-recommendations", cloud.recommendations),
    ]


def _of_our_own(parts: Parts) -> list[Endpoint]:
    agents, health, requests = AgentsApi(parts), HealthApi(parts), RequestsApi(parts)
    fleet, operations, history = FleetApi(parts), OperationsApi(parts), HistoryApi(parts)
    settings, dashboard, events = SettingsApi(parts), DashboardApi(), EventsApi(parts)
    return [
        # agents
        Endpoint("POST", "/api/health", health.heartbeat),
        Endpoint("POST", "/api/agents", agents.register),
        Endpoint("GET", "/api/agents", agents.list),
        Endpoint("GET", "/api/agents/{agent_id}", agents.show),
        Endpoint("PATCH", "/api/agents/{agent_id}", agents.change),
        Endpoint("DELETE", "/api/agents/{agent_id}", agents.remove),
        Endpoint("GET", "/api/agents/{agent_id}/details", agents.details),
        Endpoint("GET", "/api/agents/{agent_id}/log", agents.log),
        Endpoint("POST", "/api/agents/{agent_id}/log", agents.take_log),
        # models and operations
        Endpoint("GET", "/api/models", fleet.models),
        Endpoint("GET", "/api/operations", operations.overview),
        Endpoint("POST", "/api/operations", operations.start),
        Endpoint("GET", "/api/operations/{operation_id}", operations.show),
        Endpoint("DELETE", "/api/operations/{operation_id}", operations.cancel),
        Endpoint("GET", "/api/operations/{operation_id}/progress", operations.follow),
        # requests, live and finished
        Endpoint("GET", "/api/requests", requests.list),
        Endpoint("GET", "/api/requests/{request_id}", requests.show),
        Endpoint("DELETE", "/api/requests/{request_id}", requests.cancel),
        Endpoint("GET", "/api/queue", requests.queue),
        Endpoint("POST", "/api/explain", requests.explain),
        Endpoint("GET", "/api/estimates", requests.estimates),
        Endpoint("GET", "/api/history", history.list),
        Endpoint("GET", "/api/history/choices", history.choices),
        Endpoint("GET", "/api/history/export", history.export),
        Endpoint("GET", "/api/statistics", history.statistics),
        # the coordinator itself
        Endpoint("GET", "/healthz", health.healthz),
        Endpoint("GET", "/readyz", health.readyz),
        Endpoint("GET", "/metrics", health.metrics),
        Endpoint("GET", "/api/attention", health.attention),
        Endpoint("GET", "/api/events", health.events),
        Endpoint("GET", "/api/settings", settings.list),
        Endpoint("PATCH", "/api/settings", settings.change),
        Endpoint("GET", "/", dashboard.root),
        Endpoint("GET", "/dashboard", dashboard.page),
        Endpoint("GET", "/dashboard/events", events),
        Endpoint("GET", "/dashboard/{path:path}", dashboard.page),
    ]
