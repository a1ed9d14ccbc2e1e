"""Every route of the coordinator, in one list."""

from ollama_coordinator.access import FREE, Right
from ollama_coordinator.batches import Batches
from ollama_coordinator.parts import Parts

from .http.dialects import INFERENCE_ROUTES
from .http.openapi import OpenApi
from .http.routing import Endpoint
from .inference.context_fit import ContextFit
from .inference.continuation import Continuations
from .inference.proxy import Proxy
from .inference.retry_rule import Poison
from .models.cloud import CloudApi
from .models.files import FilesApi
from .models.lists import AliasesApi, FleetApi, ListsApi
from .models.show import ShowApi
from .models.transfer import TransferApi
from .own.access import JoiningApi, KeysApi, SessionsApi
from .own.agents import AgentsApi
from .own.dashboard import DashboardApi, EventsApi
from .own.health import HealthApi
from .own.history import HistoryApi
from .own.joining import InstallApi
from .own.link import LinkApi
from .own.operations import OperationsApi
from .own.requests import RequestsApi
from .own.settings import SettingsApi

USE, MANAGE, OPERATE, JOIN, WATCH, ASK = Right
READ, FOLLOW = USE | WATCH, MANAGE | WATCH
"""Of routes that change nothing: for who uses models, or manages them, and for who looks on."""


def endpoints(parts: Parts) -> list[Endpoint]:
    """Every method of every path with its handler; the most frequent first."""
    table = _of_ollama(parts) + _of_fleet(parts) + _of_requests(parts) + _of_itself(parts)
    table.append(Endpoint("GET", "/api/openapi.json", USE | WATCH | JOIN, OpenApi(table).show))
    return table


def _of_ollama(parts: Parts) -> list[Endpoint]:
    context_fit, lists, show = ContextFit(parts), ListsApi(parts), ShowApi(parts)
    transfer, cloud = TransferApi(parts), CloudApi(parts)
    batches, poison = Batches(), Poison(parts.monitor.models.was_well)
    shared = (context_fit, poison, batches, Continuations(parts))
    proxies = [(one.path, Proxy(parts, one, *shared)) for one in INFERENCE_ROUTES]
    return [
        *(Endpoint("POST", path, USE, proxy) for path, proxy in proxies),
        Endpoint("GET", "/api/version", READ, lists.version),
        Endpoint("GET", "/api/tags", READ, lists.tags),
        Endpoint("GET", "/api/ps", READ, lists.ps),
        Endpoint("GET", "/v1/models", READ, lists.v1_list),
        Endpoint("GET", "/v1/models/{model}", READ, lists.v1_show),
        Endpoint("POST", "/api/show", READ, show.show),
        Endpoint("POST", "/api/pull", MANAGE, transfer.pull),
        Endpoint("POST", "/api/push", MANAGE, transfer.push),
        Endpoint("POST", "/api/create", MANAGE, transfer.create),
        Endpoint("POST", "/api/copy", MANAGE, transfer.copy),
        Endpoint("DELETE", "/api/delete", MANAGE, transfer.delete),
        Endpoint("HEAD", "/api/blobs/{digest}", MANAGE, transfer.head_blob),
        Endpoint("POST", "/api/blobs/{digest}", MANAGE, transfer.post_blob),
        Endpoint("GET", "/api/status", READ, cloud.status),
        Endpoint("POST", "/api/me", USE, cloud.me),
        Endpoint("POST", "/api/signout", OPERATE, cloud.signout),
        Endpoint("DELETE", "/api/user/keys/{key}", OPERATE, cloud.signout),
        Endpoint("POST", "/api/experimental/web_search", USE, cloud.web),
        Endpoint("POST", "/api/experimental/web_fetch", USE, cloud.web),
        Endpoint("GET", "/api/experimental/model-recommendations", READ, cloud.recommendations),
    ]


def _of_fleet(parts: Parts) -> list[Endpoint]:
    agents, health, fleet = AgentsApi(parts), HealthApi(parts), FleetApi(parts)
    operations, aliases, files = OperationsApi(parts), AliasesApi(parts), FilesApi(parts)
    install = InstallApi(parts)
    return [
        # agents
        Endpoint("POST", "/api/health", JOIN, health.heartbeat),
        Endpoint("POST", "/api/agents", JOIN | ASK, agents.register),
        Endpoint("GET", "/api/agents", WATCH | MANAGE | JOIN, agents.list),
        Endpoint("GET", "/api/agents/{agent_id}", WATCH, agents.show),
        Endpoint("PATCH", "/api/agents/{agent_id}", OPERATE, agents.change),
        Endpoint("DELETE", "/api/agents/{agent_id}", OPERATE, agents.remove),
        Endpoint("POST", "/api/agents/{agent_id}/restart", OPERATE, agents.restart),
        Endpoint("POST", "/api/agents/{agent_id}/wake", OPERATE, agents.wake),
        Endpoint("GET", "/api/agents/{agent_id}/details", WATCH, agents.details),
        Endpoint("GET", "/api/agents/{agent_id}/log", OPERATE, agents.log),
        Endpoint("POST", "/api/agents/{agent_id}/log", JOIN, agents.take_log),
        Endpoint("GET", "/api/agents/{agent_id}/link", JOIN, LinkApi(parts, health)),
        Endpoint("GET", "/join", FREE, install.join),
        Endpoint("GET", "/join/{file}", FREE, install.file),
        # models and operations
        Endpoint("GET", "/v2", USE, files.root),
        Endpoint("GET", "/v2/{namespace}/{model}/manifests/{tag}", FREE, files.manifest),
        Endpoint("GET", "/v2/{namespace}/{model}/blobs/{digest}", FREE, files.file),
        Endpoint("GET", "/api/models", READ, fleet.models),
        Endpoint("GET", "/api/aliases", READ | MANAGE, aliases.list),
        Endpoint("POST", "/api/aliases", MANAGE, aliases.put),
        Endpoint("DELETE", "/api/aliases/{name:path}", MANAGE, aliases.remove),
        Endpoint("GET", "/api/operations", FOLLOW, operations.overview),
        Endpoint("POST", "/api/operations", MANAGE, operations.start),
        Endpoint("GET", "/api/operations/{operation_id}", FOLLOW, operations.show),
        Endpoint("DELETE", "/api/operations/{operation_id}", MANAGE, operations.cancel),
        Endpoint("GET", "/api/operations/{operation_id}/progress", FOLLOW, operations.follow),
    ]


def _of_requests(parts: Parts) -> list[Endpoint]:
    """Live and finished."""
    requests, history = RequestsApi(parts), HistoryApi(parts)
    return [
        Endpoint("GET", "/api/requests", WATCH, requests.list),
        Endpoint("GET", "/api/requests/{request_id}", WATCH, requests.show),
        Endpoint("DELETE", "/api/requests/{request_id}", OPERATE, requests.cancel),
        Endpoint("GET", "/api/queue", WATCH, requests.queue),
        Endpoint("POST", "/api/explain", WATCH, requests.explain),
        Endpoint("GET", "/api/estimates", WATCH, requests.estimates),
        Endpoint("GET", "/api/history", WATCH, history.list),
        Endpoint("GET", "/api/history/choices", WATCH, history.choices),
        Endpoint("GET", "/api/history/export", WATCH, history.export),
        Endpoint("GET", "/api/statistics", WATCH, history.statistics),
        Endpoint("GET", "/api/advice", WATCH, history.advice),
        Endpoint("POST", "/api/advice", MANAGE, history.apply),
        Endpoint("GET", "/api/usage", READ, history.usage),
        Endpoint("GET", "/api/audit", OPERATE, history.audit),
        Endpoint("GET", "/api/audit/export", OPERATE, history.export_audit),
    ]


def _of_itself(parts: Parts) -> list[Endpoint]:
    settings, dashboard, events = SettingsApi(parts), DashboardApi(), EventsApi(parts)
    keys, sessions, joining = KeysApi(parts), SessionsApi(parts), JoiningApi(parts)
    health = HealthApi(parts)
    return [
        # who may come in
        Endpoint("GET", "/api/keys", OPERATE, keys.list),
        Endpoint("POST", "/api/keys", OPERATE, keys.create),
        Endpoint("GET", "/api/keys/{name}", OPERATE, keys.show),
        Endpoint("DELETE", "/api/keys/{name}", OPERATE, keys.revoke),
        Endpoint("GET", "/api/join-requests", WATCH, joining.list),
        Endpoint("POST", "/api/join-requests/{name}", OPERATE, joining.admit),
        Endpoint("DELETE", "/api/join-requests/{name}", OPERATE, joining.refuse),
        Endpoint("GET", "/api/session", READ | MANAGE | JOIN, sessions.show),
        Endpoint("POST", "/dashboard/session", FREE, sessions.begin),
        Endpoint("DELETE", "/dashboard/session", FREE, sessions.end),
        # the coordinator itself
        Endpoint("GET", "/healthz", FREE, health.healthz),
        Endpoint("GET", "/readyz", FREE, health.readyz),
        Endpoint("GET", "/metrics", WATCH, health.metrics),
        Endpoint("GET", "/api/attention", WATCH, health.attention),
        Endpoint("GET", "/api/events", WATCH, health.events),
        Endpoint("GET", "/api/log", OPERATE, health.log),
        Endpoint("GET", "/api/settings", OPERATE, settings.list),
        Endpoint("PATCH", "/api/settings", OPERATE, settings.change),
        Endpoint("GET", "/", FREE, dashboard.root),
        Endpoint("GET", "/dashboard", WATCH, dashboard.page),
        Endpoint("GET", "/dashboard/events", WATCH, events),
        Endpoint("GET", "/dashboard/{path:path}", WATCH, dashboard.page),
    ]
