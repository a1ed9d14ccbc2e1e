"""Watches the local Ollama and keeps what the coordinator is to know about it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import psutil
from msgspec import Struct

from ollama_coordinator_common.types import RunnerSettings

from .keeper import Keeper
from .manifests import model_blobs
from .ollama import NOTHING_LOADED, Inventory, Ollama, OllamaError, Presence
from .pacing import forever
from .server_settings import model_folders, runner_settings

log = logging.getLogger(__name__)

TAGS_DUTY = 20
"""`/api/tags` reads every manifest there: it is asked for at most one twentieth of the time."""


class Facts(Struct, frozen=True):
    """What is known of the local Ollama; `None` is not known (yet)."""

    presence: Presence = Presence.ABSENT
    version: str | None = None
    tags: Inventory | None = None
    ps: Inventory | None = None
    blobs: dict[str, str] = {}
    runner: RunnerSettings | None = None

    @property
    def is_running(self) -> bool:
        """Whether requests can be answered."""
        return self.presence is Presence.ANSWERING

    def news(self) -> tuple[object, ...]:
        """What the coordinator is told at once when it changes."""
        return (
            self.presence is Presence.ANSWERING,
            self.version,
            self.tags and self.tags.models,
            self.ps and self.ps.models,
            self.blobs,
            self.runner,
        )


class WatchPace(Struct, frozen=True, kw_only=True):
    """How often Ollama is looked at, and how long it may be silent or take to end, in seconds.

    `output`: how often the size of its output is.
    """

    look: float = 1.0
    tags: float = 2.0
    silence: float = 10.0
    stop: float = 10.0
    output: float = 10.0


class Watch:
    """Looks at Ollama about once a second; `changed` is set when there is news."""

    def __init__(
        self,
        ollama: Ollama,
        keeper: Keeper,
        *,
        environ: Mapping[str, str],
        port: int,
        changed: asyncio.Event,
        keep_server: bool = False,
        pace: WatchPace,
    ) -> None:
        self.facts = Facts()
        self.looked = asyncio.Event()
        self.url = ollama.url
        self._ollama = ollama
        self._keeper = keeper
        self._environ = environ
        self._port = port
        self._changed = changed
        self._keep_server = keep_server
        self._pace = pace
        self._answered_at: float | None = None
        self._answering = asyncio.Event()
        self._folders: tuple[list[Path], bool] = ([], False)
        self._blobs_are_old = True

    async def run(self) -> None:
        """Watch until cancelled; then end the server, if it is ours."""
        self._keeper.reclaim()
        try:
            async with asyncio.TaskGroup() as tasks:
                for step in self._steps():
                    tasks.create_task(forever(step))
        finally:
            if not self._keep_server:
                await self._keeper.stop(self._pace.stop)

    def _steps(self) -> list[Callable[[], Awaitable[float]]]:
        return [self._watch_presence, self._watch_memory, self._watch_disk, self._watch_output]

    async def _watch_output(self) -> float:
        await asyncio.to_thread(self._keeper.trim_log)
        return self._pace.output

    async def _watch_presence(self) -> float:
        loop = asyncio.get_running_loop()
        presence, version = await self._look(loop.time())
        is_new = not self._answering.is_set() or version != self.facts.version
        if presence is Presence.ANSWERING and is_new:
            await self._know_server(version)
        self._keeper.observe(presence, loop.time())
        self._note(presence, version)
        self.looked.set()
        return self._pace.look

    async def _look(self, now: float) -> tuple[Presence, str | None]:
        """What is on the port; a short silence of a server that answered is no news."""
        try:
            version = await self._ollama.version()
        except OllamaError as exc:
            is_brief = (
                exc.presence is Presence.SILENT
                and self._answered_at is not None
                and now - self._answered_at < self._pace.silence
            )
            return (self.facts.presence if is_brief else exc.presence), self.facts.version
        self._answered_at = now
        return Presence.ANSWERING, version

    def _note(self, presence: Presence, version: str | None) -> None:
        if presence is not self.facts.presence or not self.looked.is_set():
            known = version if presence is Presence.ANSWERING else None
            log.info(f"Ollama: {presence.value}", extra={"url": self.url, "version": known})
        if presence is Presence.ANSWERING:
            self._answering.set()
            self._update(presence=presence, version=version)
            return
        self._answering.clear()
        if presence is Presence.ABSENT:
            self._answered_at = None
            self._update(presence=presence, ps=NOTHING_LOADED)
        else:
            self._update(presence=presence)

    async def _watch_memory(self) -> float:
        await self._answering.wait()
        try:
            self._update(ps=await self._ollama.ps())
        except OllamaError as exc:
            log.debug("models in memory not known", extra={"reason": str(exc)})
        return self._pace.look

    async def _watch_disk(self) -> float:
        await self._answering.wait()
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            tags = await self._ollama.tags()
        except OllamaError as exc:
            log.debug("models on disk not known", extra={"reason": str(exc)})
            return self._pace.tags
        took = loop.time() - started
        await self._note_tags(tags)
        return max(self._pace.tags, TAGS_DUTY * took)

    async def _note_tags(self, tags: Inventory) -> None:
        blobs = self.facts.blobs
        if self._blobs_are_old or self.facts.tags is None or tags.models != self.facts.tags.models:
            folders, is_certain = self._folders
            pairs = [(name, digest) for name, digest, _ in tags.models]
            blobs = await asyncio.to_thread(model_blobs, pairs, folders, is_certain=is_certain)
            self._blobs_are_old = False
        self._update(tags=tags, blobs=blobs)

    async def _know_server(self, version: str | None) -> None:
        """Learn how the server that has just appeared was configured."""
        environ = self._keeper.environ_of_child
        if environ is None:
            environ = await asyncio.to_thread(environment_of_listener, self._port)
        self._folders = (model_folders(environ or self._environ), environ is not None)
        runner = None if environ is None else runner_settings(environ, version)
        self._blobs_are_old = True
        self._update(runner=runner)

    def _update(self, **facts: Any) -> None:
        before, self.facts = self.facts, msgspec.structs.replace(self.facts, **facts)
        if self.facts.news() != before.news():
            self._changed.set()


def environment_of_listener(port: int) -> dict[str, str] | None:
    """The environment of the process that listens on a port, if this user may read it."""
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status != psutil.CONN_LISTEN or not connection.laddr:
                continue
            if connection.laddr.port == port and connection.pid:
                return psutil.Process(connection.pid).environ()
    except (psutil.Error, OSError):
        return None
    return None
