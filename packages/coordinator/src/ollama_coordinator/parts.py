"""The parts of one coordinator, as one value; `app.py` puts it together."""

import asyncio
from collections.abc import Awaitable, Callable

from msgspec import Struct
from starlette.types import Receive, Scope, Send

from .access import Access, KnownMachines, limits_of_names
from .agent_logs import AgentLogs
from .agent_queries import AgentQueries, CloudAccess, ModelInfo
from .agent_store import AgentStore
from .aliases import Aliases
from .attention import Attention
from .clock import Clock
from .cluster import Cluster
from .db import Store
from .dispatch import Dispatch
from .feed import Feed, Snapshots
from .http1 import ConnectionLimits
from .identity import Identity
from .journal import Observation
from .link import Links
from .memory import BodyRoom
from .monitor import Monitor
from .operations import (
    Blobs,
    Operations,
    Placement,
    Rebalance,
    TargetChooser,
    Transfers,
    Uploads,
)
from .registry import Registry
from .scheduler import Scheduler
from .settings import Settings
from .tls import Tls
from .traces import Traces
from .upstream import Upstreams

PassOn = Callable[[Scope, bytes | bytearray, Receive, Send, float], Awaitable[None]]

GIBIBYTE = 1024**3


class Parts(Struct, kw_only=True, eq=False):
    """The parts of a coordinator, each made once; a handler takes those that it uses.

    `connections`: those of the server, as long as one of ours serves.
    `pass_on`: to the coordinator that leads, where this one does not any more: an ASGI scope, the
    whole body, how to receive and to send, and the seconds since the body is here.
    `reading`: large bodies are read one at a time, see `json_edit`.
    `room`: the memory of request bodies, and of the answers that are kept.
    `stopping`: `GET /readyz` answers 503, so that load balancers send no further requests.
    """

    settings: Settings
    identity: Identity
    tls: Tls
    access: Access
    machines: KnownMachines
    clock: Clock
    cluster: Cluster
    registry: Registry
    aliases: Aliases
    scheduler: Scheduler
    dispatch: Dispatch
    upstreams: Upstreams
    links: Links
    store: Store
    observation: Observation
    traces: Traces
    agent_store: AgentStore
    agent_logs: AgentLogs
    attention: Attention
    monitor: Monitor
    queries: AgentQueries
    model_info: ModelInfo
    cloud: CloudAccess
    uploads: Uploads
    targets: TargetChooser
    blobs: Blobs
    operations: Operations
    transfers: Transfers
    rebalance: Rebalance
    snapshots: Snapshots
    feed: Feed
    reading: asyncio.Lock
    room: BodyRoom
    connections: ConnectionLimits | None = None
    pass_on: PassOn | None = None
    stopping: bool = False

    def apply_settings(self) -> None:
        """Work with the settings in force from now on; no request is lost by it."""
        config = self.settings.config
        self.registry.agent_timeout = config.agent_timeout
        self.scheduler.max_queue = config.max_queue
        self.monitor.waker.seconds = config.wake_patience
        self.monitor.interval = config.health_check_interval
        self.observation.limits.rows = config.history_rows
        self.observation.limits.days = config.history_days
        self.observation.sampler.usage = config.usage
        self.access.usage.of_names = limits_of_names(config.limits)
        self.targets.default = Placement.parse(config.pull_placement)
        self.rebalance.is_on = config.rebalance == "auto"
        self.rebalance.budget_bytes = int(config.model_disk_gibibytes * GIBIBYTE)
        self.operations.worker.return_seconds = config.pull_patience
        self.uploads.limit_bytes = int(config.max_spool_gibibytes * GIBIBYTE)
        self.dispatch.plan()

    def begin_stopping(self) -> None:
        """Report not ready, and end the event streams of the dashboard."""
        self.stopping = True
        self.feed.close()

    def stop_serving(self, reason: str) -> None:
        """End every request and operation with an error to its client."""
        self.begin_stopping()
        self.dispatch.close(reason)
        self.operations.close(reason)
