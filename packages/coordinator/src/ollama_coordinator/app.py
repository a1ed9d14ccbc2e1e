"""The composition root: the one place where the parts meet."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from anyio import create_task_group
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp

from ollama_coordinator_common.error import OllamaCoordinatorError
from ollama_coordinator_common.settings import CoordinatorConfig

from .access import (
    Access,
    KeyRing,
    KeyUsage,
    KnownMachines,
    SecretFile,
    Sessions,
    limits_of_names,
    secret_path,
)
from .agent_logs import AgentLogs
from .agent_queries import AgentQueries, CloudAccess, ModelInfo
from .agent_store import AgentStore
from .aio import beside
from .aliases import Aliases
from .api.http.body_timeout import BodyTimeout
from .api.http.cors import Cors
from .api.http.dialects import INFERENCE_ROUTES
from .api.http.errors import error_reply, status_of
from .api.http.routing import AccessLog, CircleGuard, Gate, NearMiss, Shortcut, gathered
from .api.routes import endpoints
from .attention import Attention
from .carry import Fronted, Takeover
from .clock import Clock
from .cluster import Cluster
from .db import Store, database_of, files_beside
from .dispatch import Dispatch
from .feed import Feed, Snapshots
from .identity import Identity
from .journal import Limits, Observation, SavedSparklines
from .link import Links
from .memory import BodyRoom, memory_share
from .monitor import Monitor
from .operations import (
    MOVES,
    Blobs,
    Deferred,
    ModelSizes,
    Moves,
    Operations,
    Placement,
    Rebalance,
    Remote,
    TargetChooser,
    Transfers,
    Uploads,
)
from .parts import GIBIBYTE, Parts
from .registry import Registry
from .saved_state import SavedState
from .scheduler import Learned, create_scheduler
from .settings import Settings
from .tls import Tls
from .traces import Traces
from .upstream import Upstreams
from .wake import Waker

SPARKLINES_SECONDS = 60.0
"""How often they are saved while serving: they are no more than the last minutes."""


def assembled(config: CoordinatorConfig, cluster: Cluster, tls: Tls) -> Parts:
    """The parts of a coordinator, put together but not yet running."""
    clock = Clock()
    store = Store(database_of(config.database_url))
    settings = Settings(config, store)
    config = settings.config
    registry = Registry(config.agent_timeout)
    keys, machines = KeyRing(store), KnownMachines(registry, store)
    secret = SecretFile(secret_path(files_beside(config.database_url)))
    usage = KeyUsage(store)
    usage.of_names = limits_of_names(config.limits)
    access = Access(config, keys, Sessions(store, keys), secret, machines, usage)
    scheduler = create_scheduler(config.policy, registry, max_queue=config.max_queue)
    dispatch = Dispatch(scheduler, registry, clock)
    links = Links(clock)
    upstreams = Upstreams(clock, links, registry.api_keys, machines.relay_key_at)
    limits = Limits(config.history_rows, config.history_days)
    aliases = Aliases(registry, store)
    observation = Observation(dispatch, store, limits, status_of=status_of)
    observation.sampler.usage = config.usage
    agent_store = AgentStore(registry, store, clock)
    waker = Waker(dispatch, seconds=config.wake_patience, places=config.wake_to)
    interval = config.health_check_interval
    monitor = Monitor(dispatch, upstreams, agent_store, waker, interval=interval)
    queries = AgentQueries(registry, monitor, upstreams, clock)
    targets = TargetChooser(
        registry, queries, ModelSizes(upstreams, clock), Placement.parse(config.pull_placement)
    )
    uploads = Uploads(
        uploads_folder(config.database_url), int(config.max_spool_gibibytes * GIBIBYTE)
    )
    port = 0 if config.tls != "off" else config.port
    transfers = Transfers(dispatch, upstreams, machines, port=port)
    operations = Operations(
        dispatch,
        monitor,
        Remote(upstreams, uploads, clock),
        Deferred(store),
        transfers,
        return_seconds=config.pull_patience,
    )
    rebalance = Rebalance(
        dispatch,
        observation,
        operations,
        store,
        is_on=config.rebalance == "auto",
        budget_bytes=int(config.model_disk_gibibytes * GIBIBYTE),
    )
    attention = Attention(dispatch, observation, settings, access, aliases)
    snapshots = Snapshots(dispatch, observation, operations, attention, config, cluster, tls.pin)
    return Parts(
        settings=settings,
        identity=Identity(store),
        tls=tls,
        access=access,
        machines=machines,
        clock=clock,
        cluster=cluster,
        registry=registry,
        aliases=aliases,
        scheduler=scheduler,
        dispatch=dispatch,
        upstreams=upstreams,
        links=links,
        store=store,
        observation=observation,
        traces=Traces(config.otlp_endpoint),
        agent_store=agent_store,
        agent_logs=AgentLogs(),
        attention=attention,
        monitor=monitor,
        queries=queries,
        model_info=ModelInfo(queries, registry),
        cloud=CloudAccess(queries, registry, clock),
        uploads=uploads,
        targets=targets,
        blobs=Blobs(queries, targets, clock),
        operations=operations,
        transfers=transfers,
        rebalance=rebalance,
        snapshots=snapshots,
        feed=Feed(snapshots.take),
        reading=asyncio.Lock(),
        room=BodyRoom(memory_share() // config.workers, clock),
    )


def uploads_folder(database_url: str) -> Path | None:
    """Where uploaded files wait: beside the database; `None` for a database in memory."""
    path = files_beside(database_url)
    return None if path is None else path.with_name(f"{path.name}.blobs")


@asynccontextmanager
async def running(parts: Parts) -> AsyncIterator[None]:
    """Open everything, serve, close everything in the opposite order.

    Raises:
        DatabaseError: the database cannot be opened, or another coordinator leads.
    """
    async with create_task_group():
        pass  # AnyIO imports its backend now: for a tenth of a second nobody would be served
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(parts.store)
        await stack.enter_async_context(parts.cluster.leading(parts.store))
        stack.enter_context(parts.clock.watching())
        await parts.agent_store.restore()
        await parts.identity.restore()
        await parts.machines.restore()
        await parts.aliases.restore()
        config = parts.settings.config
        await parts.access.restore(config.key_file, config.join_token)
        for saved in _saved_state(parts):
            await stack.enter_async_context(saved.running())
        parts.dispatch.plan()  # the scheduler reads the restored agents before anybody asks it
        parts.registry.prove(row.agent_id for row in parts.scheduler.export_state().pairs)
        await stack.enter_async_context(parts.observation.running())
        await stack.enter_async_context(parts.traces.running())
        await stack.enter_async_context(beside(parts.feed.run(), parts.attention.run()))
        stack.callback(parts.feed.close)
        await stack.enter_async_context(parts.upstreams)
        await stack.enter_async_context(beside(parts.links.run()))
        await stack.enter_async_context(parts.uploads)
        await stack.enter_async_context(parts.operations)
        await stack.enter_async_context(beside(parts.monitor.run(), parts.rebalance.run()))
        try:
            yield
        finally:
            parts.stop_serving("the coordinator is shutting down")


def _saved_state(parts: Parts) -> list[SavedState[Any]]:
    """The state that is kept over a restart as documents in the database."""
    store, sampler = parts.store, parts.observation.sampler
    return [
        SavedState(MOVES, Moves, store, parts.rebalance, every=SPARKLINES_SECONDS),
        SavedState("learned", Learned, store, parts.scheduler),
        SavedState("sparklines", SavedSparklines, store, sampler, every=SPARKLINES_SECONDS),
    ]


def create_app(
    config: CoordinatorConfig, cluster: Cluster | None = None, tls: Tls | None = None
) -> Starlette:
    """The ASGI application of one coordinator; `app.state.parts` are its parts.

    It is alone, unless a `cluster` says otherwise.
    """
    parts = assembled(
        config, Cluster(None) if cluster is None else cluster, Tls(config) if tls is None else tls
    )

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with running(parts):
            yield

    routes = gathered(parts.access, endpoints(parts), parts.observation.note_change)
    app = _App(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={
            OllamaCoordinatorError: _reply_error,
            HTTPException: _reply_http_error,
        },
    )
    app.state.parts, app.state.origins = parts, config.origins
    app.state.takeover = Takeover(parts)
    app.router.redirect_slashes = False
    app.router.default = NearMiss(routes)
    return app


def takeover_of(app: Starlette) -> Takeover:
    """What an application takes over from another coordinator, and leaves to the next one."""
    takeover: Takeover = app.state.takeover
    return takeover


class _App(Starlette):
    """An inference request passes Starlette's part of the stack by: that costs each token a call.

    What its handler raises, which is a defect, the server logs and answers with 500.
    """

    def build_middleware_stack(self) -> ASGIApp:
        """Starlette's own stack for the other routes, and before it what every route has."""
        inference = [route.path for route in INFERENCE_ROUTES]
        app = Shortcut(super().build_middleware_stack(), self.router.routes, inference)
        parts: Parts = self.state.parts
        timed = BodyTimeout(app, parts.settings, parts.room, parts.clock)
        guarded: ASGIApp = CircleGuard(timed, parts.upstreams.instance_id)
        if parts.settings.config.access_log:
            guarded = AccessLog(guarded)
        served: ASGIApp = Cors(Gate(guarded, parts.access), self.state.origins)
        if not parts.cluster.is_shared:
            return served
        return Fronted(served, parts.cluster, takeover_of(self))


async def _reply_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, OllamaCoordinatorError):
        raise error
    return error_reply(error)


async def _reply_http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and methods, with the texts of Ollama's router."""
    if not isinstance(error, HTTPException):
        raise error
    texts = {404: "404 page not found", 405: "405 method not allowed"}
    text = texts.get(error.status_code, error.detail)
    return PlainTextResponse(text, error.status_code, headers=error.headers)
