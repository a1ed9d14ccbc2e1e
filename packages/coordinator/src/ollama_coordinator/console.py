"""What operators look at and steer with, put together: the dashboard, its stream, its API."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.routing import BaseRoute, Route

from .api.own.dashboard import DashboardApi, DetailsApi, EventsApi, Handler
from .api.own.history import HistoryApi
from .api.own.requests import RequestsApi
from .api.own.settings import SettingsApi
from .clock import Clock
from .db import Store
from .dispatch import Dispatch
from .feed import Feed, Rows, Snapshots
from .journal import Observation
from .operations import Operations
from .own_address import own_address
from .registry import Registry
from .settings import Settings


class Console:
    """The operators' side of a coordinator."""

    def __init__(
        self,
        registry: Registry,
        dispatch: Dispatch,
        observation: Observation,
        store: Store,
        clock: Clock,
        settings: Settings,
        *,
        plain_root: Handler,
        operations: Operations,
    ) -> None:
        rows = Rows(registry, observation, clock, dispatch)
        snapshots = Snapshots(
            rows,
            dispatch,
            observation,
            store,
            clock,
            policy=lambda: dispatch.scheduler.policy,
            address=lambda: own_address(settings.config.host),
            operations=operations,
        )
        self.feed = Feed(snapshots.take)
        self._dashboard = DashboardApi(plain_root)
        self._events = EventsApi(self.feed)
        self._details = DetailsApi(registry, observation, rows, clock)
        self._requests = RequestsApi(observation, dispatch, clock)
        self._history = HistoryApi(observation, registry)
        self._settings = SettingsApi(settings)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Feed those who look, as long as the block runs."""
        feeding = asyncio.create_task(self.feed.run())
        try:
            yield
        finally:
            self.feed.close()
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)

    def routes(self) -> list[BaseRoute]:
        """The operators' routes."""
        return [
            Route("/", self._dashboard.root, methods=["GET"]),
            Route("/dashboard", self._dashboard.page, methods=["GET"]),
            Route("/dashboard/events", self._events, methods=["GET"]),
            Route("/dashboard/{path:path}", self._dashboard.page, methods=["GET"]),
            Route("/api/requests", self._requests.list, methods=["GET"]),
            Route("/api/requests/{request_id}", self._requests.show, methods=["GET"]),
            Route("/api/requests/{request_id}", self._requests.cancel, methods=["DELETE"]),
            Route("/api/queue", self._requests.queue, methods=["GET"]),
            Route("/api/history", self._history.list, methods=["GET"]),
            Route("/api/history/choices", self._history.choices, methods=["GET"]),
            Route("/api/history/export", self._history.export, methods=["GET"]),
            Route("/api/statistics", self._history.statistics, methods=["GET"]),
            Route("/api/settings", self._settings.list, methods=["GET"]),
            Route("/api/settings", self._settings.change, methods=["PATCH"]),
            Route("/api/agents/{agent_id}/details", self._details.show, methods=["GET"]),
        ]
