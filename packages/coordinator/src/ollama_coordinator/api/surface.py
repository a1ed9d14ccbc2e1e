"""The rest of Ollama's surface, beside inference and the lists: its handlers and their routes."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.routing import BaseRoute, Route

from ollama_coordinator.agent_queries import AgentQueries
from ollama_coordinator.clock import Clock
from ollama_coordinator.db import Store, database_path
from ollama_coordinator.dispatch import Dispatch
from ollama_coordinator.monitor import Monitor
from ollama_coordinator.operations import (
    Blobs,
    Deferred,
    Operations,
    Patience,
    Placement,
    Remote,
    TargetChooser,
    Uploads,
)
from ollama_coordinator.registry import Registry
from ollama_coordinator.upstream import Upstreams
from ollama_coordinator_common.settings import CoordinatorConfig

from .inference.context_fit import Fitting
from .inference.unload import Unloading
from .models.account import AccountApi
from .models.blobs import BlobsApi
from .models.changes import ChangesApi
from .models.cloud import Clouds
from .models.show import ShowApi, Shows
from .models.transfer import TransferApi
from .own.operations import OperationsApi


class Surface:
    """What makes the fleet pass for one Ollama where the request path alone does not."""

    def __init__(
        self,
        config: CoordinatorConfig,
        registry: Registry,
        dispatch: Dispatch,
        monitor: Monitor,
        upstreams: Upstreams,
        store: Store,
        clock: Clock,
    ) -> None:
        self.asking = AgentQueries(registry, monitor, upstreams, clock)
        shows = Shows(self.asking, registry)
        self.fitting = Fitting(registry, shows, clock, larger_context=config.larger_context)
        self.unloading = Unloading(self.asking, registry, dispatch)
        self.clouds = Clouds(self.asking, registry, clock)
        self.show = ShowApi(shows, self.clouds)
        self._account = AccountApi(self.asking, self.clouds)
        self._uploads = Uploads(
            spool_folder(config.database_url), _bytes(config.max_spool_gibibytes)
        )
        self._patience = Patience(config.pull_patience)
        remote = Remote(upstreams, self._uploads)
        self.operations = Operations(
            registry,
            dispatch,
            monitor,
            remote,
            self._uploads,
            Deferred(store),
            clock,
            self._patience,
        )
        targets = TargetChooser(registry, self.asking, Placement.parse(config.pull_placement))
        blobs = Blobs(self.asking, targets)
        self._transfer = TransferApi(self.operations, targets, self._uploads, blobs)
        self._changes = ChangesApi(self.operations, targets, self.asking, registry, store)
        self._blobs = BlobsApi(self._uploads, blobs, targets)
        self._own = OperationsApi(self.operations, targets, self._changes, registry)
        self._targets = targets

    def apply(self, config: CoordinatorConfig) -> None:
        """Work with other settings from now on."""
        self.fitting.larger_context = config.larger_context
        self._patience.return_seconds = config.pull_patience
        self._targets.default = Placement.parse(config.pull_placement)
        self._uploads.limit_bytes = _bytes(config.max_spool_gibibytes)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Open what has to be open while serving.

        Raises:
            DatabaseError: what agents owe cannot be read.
        """
        async with self._uploads, self.operations:
            yield

    def routes(self) -> list[BaseRoute]:
        """The routes of all this."""
        account = self._account
        return [
            Route("/api/show", self.show.show, methods=["POST"]),
            Route("/api/status", account.status, methods=["GET"]),
            Route("/api/me", account.me, methods=["POST"]),
            Route("/api/signout", account.signout, methods=["POST"]),
            Route("/api/user/keys/{key}", account.signout, methods=["DELETE"]),
            Route("/api/experimental/web_search", account.web, methods=["POST"]),
            Route("/api/experimental/web_fetch", account.web, methods=["POST"]),
            Route(
                "/api/experimental/model-recommendations", account.recommendations, methods=["GET"]
            ),
            Route("/api/pull", self._transfer.pull, methods=["POST"]),
            Route("/api/push", self._transfer.push, methods=["POST"]),
            Route("/api/create", self._transfer.create, methods=["POST"]),
            Route("/api/copy", self._changes.copy, methods=["POST"]),
            Route("/api/delete", self._changes.delete, methods=["DELETE"]),
            Route("/api/blobs/{digest}", self._blobs.head, methods=["HEAD"]),
            Route("/api/blobs/{digest}", self._blobs.post, methods=["POST"]),
            *self._own_routes(),
        ]

    def _own_routes(self) -> list[BaseRoute]:
        own = self._own
        return [
            Route("/api/operations", own.overview, methods=["GET"]),
            Route("/api/operations", own.start, methods=["POST"]),
            Route("/api/operations/{operation_id}", own.show, methods=["GET"]),
            Route("/api/operations/{operation_id}", own.cancel, methods=["DELETE"]),
            Route("/api/operations/{operation_id}/progress", own.follow, methods=["GET"]),
        ]


def spool_folder(database_url: str) -> Path | None:
    """Where uploaded files wait: beside the database; `None` for a database in memory."""
    path = database_path(database_url)
    return None if path is None else path.with_name(f"{path.name}.blobs")


def _bytes(gibibytes: float) -> int:
    return int(gibibytes * 1024**3)
