"""The composition root: the one place where the parts meet."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from ollama_coordinator_common.error import OllamaCoordinatorError
from ollama_coordinator_common.settings import CoordinatorConfig

from .agent_logs import AgentLogs
from .agent_store import AgentStore
from .api import Handlers, routes
from .api.http.body_timeout import Patience
from .api.http.cors import Cors
from .api.http.dialects import INFERENCE_ROUTES
from .api.http.errors import error_reply, status_of
from .api.http.routing import NearMiss
from .api.inference.proxy import Proxy
from .api.models.lists import ModelsApi
from .api.own.agent_log import AgentLogApi
from .api.own.agents import AgentsApi
from .api.own.explain import ExplainApi
from .api.own.health import HealthApi
from .api.surface import Surface
from .clock import Clock
from .console import Console
from .db import Store, database_path
from .dispatch import Dispatch
from .http1 import Door
from .journal import Limits, Observation, SavedSparklines
from .monitor import Monitor
from .registry import Registry
from .saved_state import SavedState
from .scheduler import Learned, create_scheduler
from .settings import Settings
from .upstream import Upstreams

SPARKLINES_SECONDS = 60.0
"""How often they are kept while serving: they are no more than the last minutes."""


class Coordinator:
    """Everything one coordinator consists of, put together but not yet running."""

    def __init__(self, config: CoordinatorConfig) -> None:
        self.store = Store(database_path(config.database_url))
        self.settings = Settings(config, self.store, apply=self.apply)
        config = self.config
        self.clock = Clock()
        self.registry = Registry(config.agent_timeout)
        self.scheduler = create_scheduler(config.policy, self.registry, max_queue=config.max_queue)
        self.dispatch = Dispatch(self.scheduler, self.registry, self.clock)
        self.upstreams = Upstreams()
        self.observation = Observation(
            self.registry,
            self.dispatch,
            self.store,
            self.clock,
            Limits(config.history_rows, config.history_days),
            status_of=status_of,
        )
        self.keeper = AgentStore(self.registry, self.store, self.clock)
        self.monitor = Monitor(
            self.registry,
            self.dispatch,
            self.upstreams,
            self.keeper,
            self.clock,
            interval=config.health_check_interval,
        )
        self.surface = Surface(
            config,
            self.registry,
            self.dispatch,
            self.monitor,
            self.upstreams,
            self.store,
            self.clock,
        )
        self._face_clients()

    @property
    def config(self) -> CoordinatorConfig:
        """The settings in force."""
        return self.settings.config

    def _face_clients(self) -> None:
        """The handlers of our own routes: they ask the parts, and no part asks them."""
        logs = AgentLogs()
        self.agent_log = AgentLogApi(self.registry, logs, self.clock)
        self.health = HealthApi(
            self.registry, self.dispatch, self.keeper, self.store, self.clock, logs
        )
        self.agents = AgentsApi(
            self.registry,
            self.dispatch,
            self.monitor,
            self.keeper,
            self.clock,
            operations=lambda agent_id: self.surface.operations.of_agent(agent_id),
        )
        self.models = ModelsApi(
            self.registry, self.monitor, self.clock, self.surface.show.of_the_cloud
        )
        self.console = Console(
            self.registry,
            self.dispatch,
            self.observation,
            self.store,
            self.clock,
            self.settings,
            plain_root=self.models.root,
            operations=self.surface.operations,
        )

    def apply(self, config: CoordinatorConfig) -> None:
        """Work with other settings from now on; no request is lost by it."""
        self.registry.agent_timeout = config.agent_timeout
        self.monitor.interval = config.health_check_interval
        self.observation.limits.rows = config.history_rows
        self.observation.limits.days = config.history_days
        self.surface.apply(config)
        self.scheduler.max_queue = config.max_queue
        self.dispatch.plan()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Open everything, serve, close everything in the opposite order.

        Raises:
            DatabaseError: the database cannot be opened.
        """
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.store)
            await self.keeper.restore()
            for document in self._documents():
                await stack.enter_async_context(document.running())
            await stack.enter_async_context(self.observation.running())
            await stack.enter_async_context(self.console.running())
            await stack.enter_async_context(self.upstreams)
            await stack.enter_async_context(self.surface.running())
            watching = asyncio.create_task(self.monitor.run())
            stack.push_async_callback(_stop, watching)
            try:
                yield
            finally:
                self.stop_serving("the coordinator is shutting down")

    def _documents(self) -> list[SavedState[Any]]:
        """What is kept over a restart, in documents."""
        scheduler, sparklines = self.scheduler, self.observation.sampler.sparklines
        return [
            SavedState(
                "learned",
                Learned,
                self.store,
                give=scheduler.export_state,
                take=scheduler.import_state,
            ),
            SavedState(
                "sparklines",
                SavedSparklines,
                self.store,
                give=sparklines.export,
                take=lambda kept: sparklines.restore(
                    kept,
                    self.clock.utc(self.clock.now()).timestamp(),
                    {agent.id for agent in self.registry},
                ),
                every=SPARKLINES_SECONDS,
            ),
        ]

    def door(self, most: int | None = None) -> Door:
        """Where clients come in, `most` at once."""
        return Door(most=most, stall_seconds=lambda: self.config.stall_timeout)

    def begin_stopping(self) -> None:
        """Say so to who asks whether we are ready, and send those who only watch away."""
        self.health.stopping = True
        self.console.feed.close()

    def stop_serving(self, reason: str) -> None:
        """End what still runs with an error to its client."""
        self.begin_stopping()
        self.dispatch.close(reason)
        self.surface.operations.close(reason)

    def handlers(self) -> Handlers:
        """The handlers of all routes."""
        proxies = [
            Proxy(
                surface,
                self.registry,
                self.dispatch,
                self.monitor,
                self.upstreams,
                self.clock,
                self.observation.journal,
                fitting=self.surface.fitting,
                unloading=self.surface.unloading,
                clouds=self.surface.clouds,
                body_limit=lambda: self.config.max_body_bytes,
            )
            for surface in INFERENCE_ROUTES
        ]
        return Handlers(
            agents=self.agents,
            agent_log=self.agent_log,
            explain=ExplainApi(self.scheduler, INFERENCE_ROUTES[0], self.clock),
            health=self.health,
            models=self.models,
            proxies=proxies,
            surface=self.surface.routes(),
            console=self.console.routes(),
        )


async def _stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def create_app(config: CoordinatorConfig) -> Starlette:
    """The ASGI application of one coordinator; `app.state.coordinator` is what it consists of."""
    coordinator = Coordinator(config)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with coordinator.running():
            yield

    listed = routes(coordinator.handlers())
    app = Starlette(
        routes=listed,
        middleware=[
            Middleware(Cors, config.origins),
            Middleware(
                Patience,
                body_seconds=lambda: coordinator.config.body_timeout,
                stall_seconds=lambda: coordinator.config.stall_timeout,
            ),
        ],
        lifespan=lifespan,
        exception_handlers={
            OllamaCoordinatorError: _tell_error,
            HTTPException: _tell_http_error,
        },
    )
    app.state.coordinator = coordinator
    app.router.redirect_slashes = False
    app.router.default = NearMiss(listed)
    return app


async def _tell_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, OllamaCoordinatorError):
        raise error
    return error_reply(error)


async def _tell_http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and methods, in the words of Ollama's router."""
    if not isinstance(error, HTTPException):
        raise error
    words = {404: "404 page not found", 405: "405 method not allowed"}
    text = words.get(error.status_code, error.detail)
    return PlainTextResponse(text, error.status_code, headers=error.headers)
