"""The composition root: the one place where the parts meet."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from ollama_coordinator_common.config import CoordinatorConfig, database_path
from ollama_coordinator_common.error import OllamaCoordinatorError

from .api import Handlers, routes
from .api.agent import AgentsApi
from .api.dialects import SURFACES
from .api.health import HealthApi
from .api.models import ModelsApi
from .api.proxy import Proxy
from .api.wire import error_reply
from .clock import Clock
from .db import DatabaseError, Store
from .dispatch import Dispatch
from .keeper import Keeper
from .monitor import Monitor
from .registry import Registry
from .scheduler import create_scheduler
from .upstream import Upstreams


class Coordinator:
    """Everything one coordinator consists of, put together but not yet running."""

    def __init__(self, config: CoordinatorConfig) -> None:
        self.config = config
        self.failure: DatabaseError | None = None
        self.clock = Clock()
        self.registry = Registry(config.agent_timeout)
        self.scheduler = create_scheduler(config.policy, self.registry, max_queue=config.max_queue)
        self.dispatch = Dispatch(self.scheduler, self.registry, self.clock)
        self.upstreams = Upstreams()
        self.store = Store(database_path(config.database_url))
        self.keeper = Keeper(self.registry, self.store, self.clock)
        self.monitor = Monitor(
            self.registry,
            self.dispatch,
            self.upstreams,
            self.keeper,
            self.clock,
            interval=config.health_check_interval,
        )
        self.health = HealthApi(self.registry, self.dispatch, self.keeper, self.store, self.clock)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Open everything, serve, close everything in the opposite order.

        Raises:
            DatabaseError: the database cannot be opened.
        """
        async with AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(self.store)
                await self.keeper.restore()
            except DatabaseError as exc:
                # An ASGI server reports a failed start as text; who started us wants the error.
                self.failure = exc
                raise
            await stack.enter_async_context(self.upstreams)
            watching = asyncio.create_task(self.monitor.run())
            stack.push_async_callback(_stop, watching)
            try:
                yield
            finally:
                self.stop_serving("the coordinator is shutting down")

    def stop_serving(self, reason: str) -> None:
        """End what still runs with an error to its client."""
        self.health.stopping = True
        self.dispatch.close(reason)

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
                body_limit=self.config.max_body_bytes,
            )
            for surface in SURFACES
        ]
        return Handlers(
            agents=AgentsApi(self.registry, self.dispatch, self.monitor, self.keeper, self.clock),
            health=self.health,
            models=ModelsApi(self.registry, self.monitor, self.clock),
            proxies=proxies,
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

    app = Starlette(
        routes=routes(coordinator.handlers()),
        lifespan=lifespan,
        exception_handlers={
            OllamaCoordinatorError: _tell_error,
            HTTPException: _tell_http_error,
        },
    )
    app.state.coordinator = coordinator
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
