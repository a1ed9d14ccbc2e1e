"""Watches the local Ollama and keeps the facts that the coordinator needs to know of it."""

import asyncio
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from ollama_coordinator_common.types import RunnerSettings

from .manifests import OnDisk, read_manifests
from .ollama import (
    NOTHING_LOADED,
    ModelList,
    Ollama,
    OllamaError,
    Presence,
    environment_of_listener,
    model_folders,
    runner_settings,
)
from .pacing import AgentPace, forever
from .process import left_behind, orphaned_runners
from .supervisor import Supervisor

log = logging.getLogger(__name__)

TAGS_DUTY = 20
"""Ollama and the agent read every manifest: that takes at most one twentieth of the time."""


class Facts(Struct, frozen=True):
    """What is known of the local Ollama; `None`: not known yet, or not at all.

    `trouble`: why it does not answer.
    """

    presence: Presence = Presence.ABSENT
    version: str | None = None
    tags: ModelList | None = None
    ps: ModelList | None = None
    disk: OnDisk = OnDisk()
    runner: RunnerSettings | None = None
    left_behind: str | None = None
    trouble: str | None = None

    @property
    def is_running(self) -> bool:
        """Whether requests can be answered."""
        return self.presence is Presence.ANSWERING

    def news(self) -> tuple[object, ...]:
        """The part whose change is reported at once."""
        return (
            self.presence is Presence.ANSWERING,
            self.version,
            self.tags and self.tags.models,
            self.ps and self.ps.models,
            self.disk,
            self.left_behind,
            self.runner,
            self.trouble,
        )


class StoreAccess(Struct, frozen=True):
    """What the agent may do in the folder where its Ollama keeps its models."""

    readable: bool = False
    writable: bool = False


class Watch:
    """Looks at Ollama about once a second; sets `changed` when there is news.

    `environ` is the agent's own: it says where models are while that of the server is unknown.
    """

    def __init__(
        self,
        ollama: Ollama,
        supervisor: Supervisor,
        environ: Mapping[str, str],
        changed: asyncio.Event,
        pace: AgentPace,
    ) -> None:
        self.facts = Facts()
        self.looked, self.listed = asyncio.Event(), asyncio.Event()  # presence, models on disk
        self.url = ollama.url
        self._ollama = ollama
        self._supervisor = supervisor
        self._environ = environ
        self._changed = changed
        self._pace = pace
        self._answered_at: float | None = None
        self._answering = asyncio.Event()
        self._orphans: frozenset[int] = frozenset()
        self._folders: tuple[list[Path], bool] = ([], False)
        self.store_access = StoreAccess()

    @property
    def folders(self) -> list[Path]:
        """Where the server may keep its models, likeliest first."""
        return self._folders[0]

    @property
    def owns_server(self) -> bool:
        """Whether the agent started the server."""
        return self._supervisor.child is not None

    async def run(self) -> None:
        """Watch until cancelled; then end the server that the supervisor started."""
        self._supervisor.reclaim()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(forever(self._watch_presence))
                tasks.create_task(forever(self._watch_memory))
                tasks.create_task(forever(self._watch_disk))
                tasks.create_task(forever(self._watch_output))
                tasks.create_task(forever(self._watch_runners))
        finally:
            await self._supervisor.stop()

    async def restart(self, reason: str) -> None:
        """Restart an Ollama that this agent started; another one is left alone."""
        await self._supervisor.restart(reason)

    async def _watch_output(self) -> float:
        await asyncio.to_thread(self._supervisor.trim_log)
        return self._pace.output

    async def _watch_runners(self) -> float:
        """Look for runners that a killed Ollama left; one that is ending is not there twice."""
        found = await asyncio.to_thread(orphaned_runners)
        stayed = {pid: held for pid, held in found.items() if pid in self._orphans}
        self._orphans = frozenset(found)
        text = left_behind(stayed) if stayed else None
        if text is not None and self.facts.left_behind is None:
            log.warning(text)
        self._update(left_behind=text)
        return self._pace.output

    async def _watch_presence(self) -> float:
        loop = asyncio.get_running_loop()
        presence, version, trouble = await self._look(loop.time())
        is_new = not self._answering.is_set() or version != self.facts.version
        if presence is Presence.ANSWERING and is_new:
            await self._know_server(version)
        self._supervisor.observe(presence, loop.time())
        self._note(presence, version)
        self._update(trouble=trouble and (self._supervisor.trouble or trouble))
        self.looked.set()
        return self._pace.look

    async def _look(self, now: float) -> tuple[Presence, str | None, str | None]:
        """What is on the port, its version, and why it does not answer.

        A short silence of a known server is ignored.
        """
        try:
            version = await self._ollama.version()
        except OllamaError as exc:
            is_brief = (
                exc.presence is Presence.SILENT
                and self._answered_at is not None
                and now - self._answered_at < self._pace.silence
            )
            presence = self.facts.presence if is_brief else exc.presence
            return presence, self.facts.version, None if is_brief else str(exc)
        self._answered_at = now
        return Presence.ANSWERING, version, None

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
        await self._note_tags(tags)
        took = loop.time() - started
        return max(self._pace.tags, TAGS_DUTY * took)

    async def _note_tags(self, tags: ModelList) -> None:
        folders, is_certain = self._folders
        pairs = [(name, digest) for name, digest, _ in tags.models]
        # Each time: a file may be lost or cut while the list stays as it is.
        disk = await asyncio.to_thread(read_manifests, pairs, folders, is_certain=is_certain)
        self.store_access = await asyncio.to_thread(
            _store_access, folders, is_certain=is_certain, has_read=bool(disk.contents) or not pairs
        )
        for name in sorted(disk.broken.keys() - self.facts.disk.broken.keys()):
            log.warning("a model is not offered", extra={"model": name, "why": disk.broken[name]})
        self._update(tags=tags, disk=disk)
        self.listed.set()

    async def _know_server(self, version: str | None) -> None:
        """Read the settings and the folders of a server that has just appeared."""
        environ = self._supervisor.environ_of_child
        if environ is None:
            environ = await asyncio.to_thread(environment_of_listener, self._ollama.port)
        self._folders = (model_folders(environ or self._environ), environ is not None)
        runner = None if environ is None else runner_settings(environ, version)
        self._update(runner=runner)

    def _update(self, **facts: Any) -> None:
        before, self.facts = self.facts, msgspec.structs.replace(self.facts, **facts)
        if self.facts.news() != before.news():
            self._changed.set()


def _store_access(folders: list[Path], *, is_certain: bool, has_read: bool) -> StoreAccess:
    """What may be done in the server's folder; it may be written to only if that is certain."""
    blobs = [folder / "blobs" for folder in folders]
    readable = has_read and any(os.access(one, os.R_OK | os.X_OK) for one in blobs)
    parts = [folders[0], *(folders[0] / one for one in ("blobs", "manifests"))] if folders else []
    there = [one for one in parts if one.exists()]
    may = bool(there) and all(os.access(one, os.W_OK | os.X_OK) for one in there)
    return StoreAccess(readable=readable, writable=is_certain and may)
