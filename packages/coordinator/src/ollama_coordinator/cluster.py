"""The coordinators that share a database: who is there, and which of them leads.

Whoever has the database open leads; the server frees that lead when the leader's session ends. The
others look several times a second whether anybody leads. Each time that another one begins to lead
is an epoch, which counts upwards.
"""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from secrets import token_hex, token_urlsafe
from typing import Any

import msgspec
from msgspec import Struct

from .aio import beside
from .db import Database, DatabaseError, SharedDatabase, Store

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
"""Between two looks of a coordinator that does not lead."""

BEAT_SECONDS = 0.5
"""Between two notes of the leader in the database."""

QUIET_SECONDS = 1.5
"""A leader that has missed so much of them, and answers nobody, is frozen or cut off.

Its session would last until the server ends it; with this, and a look, and the time in which it may
answer, another one leads well within three seconds.
"""

LATE_SECONDS = 1.25
"""A leader that has not reached the database for so long asks the others whether they do.

It has to know before one of them may lead, which is after `QUIET_SECONDS` and the time in which
it may answer them.
"""

ASK_SECONDS = 0.1
"""Between two looks of the leader whether it is late, and two rounds of questions."""

ASKED_MS = 3_000
"""The leader asks those that were heard of so shortly before it last reached the database."""

SEES_SECONDS = 0.75
"""A coordinator that does not lead has reached the database if its last look was so recent."""

HEARD_MS = 1_000
"""A coordinator that was not heard of for so long looks no more: it is dead, frozen or cut off."""

SILENT_MS = 10_000
"""A coordinator that was not heard of for so long is listed no more."""

RETURN_SECONDS = 3.5
"""How long a leader that answers may take to open the database again, after its server restarted.

Another leader would end the answers that run through this one.
"""

PAUSE_SECONDS = 0.5
"""The last part of that, in which the leader hears that another one may lead, and pauses."""

DOCUMENT = "cluster"


class Coordinator(Struct, frozen=True):
    """One of the coordinators; times in milliseconds of the database's clock.

    `url`: where the others reach it. `certificate`: the SHA-256 of the one that it shows there, in
    hexadecimal digits; empty without TLS. `epoch`: 0 if it never led. `leads_since_ms`: not there
    after it gave way, and ends its answers.
    """

    id: str
    url: str
    certificate: str
    version: str
    started_ms: int
    seen_ms: int
    epoch: int
    leads_since_ms: int | None = None


class ClusterSecret(Struct, frozen=True):
    """The document by which coordinators know each other."""

    secret: str


class Cluster:
    """This coordinator among those of its database; alone where the database cannot be shared.

    `leader`: the last one that began to lead, as far as is known here. `secret`: what coordinators
    show each other; empty until the first one has led.
    """

    def __init__(
        self,
        database: SharedDatabase | None,
        url_at: Callable[[str], str] = str,
        certificate: Callable[[], str] = str,
    ) -> None:
        """`url_at` gives this coordinator's URL at its address towards the database."""
        self.is_shared = database is not None
        self.id = token_hex(8)
        self.secret = ""
        self.coordinators: list[Coordinator] = []
        self._database = database
        self._url_at = url_at
        self._certificate = certificate
        self._url = ""
        self._is_beside = False
        self._has_given_way = False
        self._before: Coordinator | None = None
        self._changed = asyncio.Event()
        self._noted_at = self._looked_at = self._led_at = -math.inf
        self._begins = True

    @property
    def may_lead(self) -> bool:
        """Whether a coordinator that does not lead may soon do so: it reaches the database.

        Not as long as the last leader has time to return.
        """
        if self._begins:
            return True
        now = asyncio.get_running_loop().time()
        is_free = self._looked_at > self._led_at
        is_patient = is_free and now - self._led_at < RETURN_SECONDS - PAUSE_SECONDS
        return now - self._looked_at < SEES_SECONDS and not is_patient

    @property
    def leader(self) -> Coordinator | None:
        """Who leads, or led last; `None` before anybody did."""
        leader = max(self.coordinators, key=lambda one: one.epoch, default=None)
        return leader if leader is not None and leader.epoch else None

    def certificate_at(self, url: str) -> bytes | None:
        """The SHA-256 of the certificate that a coordinator shows at its URL; `None` without."""
        shown = next((one.certificate for one in self.coordinators if one.url == url), "")
        return bytes.fromhex(shown) if shown else None

    def changed(self) -> Coroutine[Any, Any, object]:
        """Wait until another coordinator leads than at the call, however late it is awaited."""
        return self._changed.wait()

    def _take(self, rows: list[dict[str, Any]]) -> None:
        before = self.leader
        self.coordinators = [msgspec.convert(row, Coordinator) for row in rows]
        after = self.leader
        if after is not None and (before is None or before.epoch != after.epoch):
            self._changed.set()
            self._changed = asyncio.Event()

    # ── leading ───────────────────────────────────────────────────────────────────────────────

    @asynccontextmanager
    async def leading(self, store: Store) -> AsyncIterator[None]:
        """Lead during the block, with the database that this one has just opened.

        Raises:
            DatabaseError: the database failed.
        """
        if self._database is None:
            yield
            return
        self._has_given_way = False
        self._noted_at = asyncio.get_running_loop().time()
        await store.run(self._begin)
        self._take(await store.run(_coordinators))
        log.info("coordinator leads", extra={"url": self._url, "epoch": self.epoch()})
        async with beside(self._beat(store)):
            yield

    async def keep_lead(
        self, may_lead: Callable[[str], Awaitable[bool]], pause: Callable[[bool], None]
    ) -> None:
        """Pause as long as another coordinator may lead, because this one is cut off.

        `may_lead` tells whether the one at a URL may. While nobody reaches the database, nobody
        does, and the leader leads on.
        """
        is_paused = False
        while self._database is not None and self._database.of_machines:
            await asyncio.sleep(ASK_SECONDS)
            asked = [may_lead(url) for url in self._others()] if self._is_late() else []
            is_cut_off = any(await asyncio.gather(*asked)) and self._is_late()
            if is_cut_off is not is_paused:
                is_paused = is_cut_off
                pause(is_paused)

    def _is_late(self) -> bool:
        return asyncio.get_running_loop().time() - self._noted_at > LATE_SECONDS

    def _others(self) -> list[str]:
        """The URLs of those that lived when this one last reached the database."""
        now_ms = max((one.seen_ms for one in self.coordinators if one.id == self.id), default=0)
        return [
            one.url
            for one in self.coordinators
            if one.id != self.id and now_ms - one.seen_ms < ASKED_MS
        ]

    async def give_way(self, store: Store) -> None:
        """Let another coordinator lead, while this one ends its answers.

        Raises:
            DatabaseError: the database failed.
        """
        self._has_given_way = True
        await store.run(lambda db: db.execute(_GIVE_WAY, [self.id]))
        await store.yield_lead()

    def gave_way(self, leader: Coordinator) -> bool:
        """Whether one that led has let another one lead by itself."""
        return any(one.id == leader.id and one.leads_since_ms is None for one in self.coordinators)

    def fronts(self) -> set[str]:
        """The others that live as this one begins to lead, by their ids: they will say hello.

        The leader before this one only if it gave way by itself.
        """
        now_ms = max((one.seen_ms for one in self.coordinators if one.id == self.id), default=0)
        before, found = self._before, set[str]()
        for one in self.coordinators:
            was_lost = before is not None and one.id == before.id and not self.gave_way(before)
            if one.id != self.id and not was_lost and now_ms - one.seen_ms < HEARD_MS:
                found.add(one.id)
        return found

    def epoch(self) -> int:
        """The last epoch in which this coordinator led; 0 if it never did."""
        return next((one.epoch for one in self.coordinators if one.id == self.id), 0)

    def _begin(self, db: Database) -> None:
        self.secret = _secret(db)
        if not self.secret:
            self.secret = token_urlsafe(32)
            body = msgspec.json.encode(ClusterSecret(self.secret)).decode()
            db.execute("INSERT INTO documents (name, body) VALUES (?, ?)", [DOCUMENT, body])
        self._note(db)
        rows = [msgspec.convert(row, Coordinator) for row in _coordinators(db)]
        before = max(rows, key=lambda one: one.epoch, default=None)
        self._before = before if before is not None and before.epoch else None
        db.execute(_LEAD, [self.id])

    async def _beat(self, store: Store) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS if self._has_given_way else BEAT_SECONDS)
            if store.problem is not None or store.lost.is_set():
                continue  # the store says so, and tries again by itself

            def beat(db: Database) -> list[dict[str, Any]]:
                now_ms = self._note(db)
                db.execute(_FORGET, [now_ms - SILENT_MS])
                return _coordinators(db)

            at = asyncio.get_running_loop().time()
            try:
                self._take(await store.run(beat))
                self._noted_at = at
            except DatabaseError as exc:
                log.debug("not noted in the database", extra={"reason": str(exc)})

    def _note(self, db: Database) -> int:
        """Note that this coordinator is here; when, by the clock of all."""
        if not isinstance(db, SharedDatabase):
            raise TypeError("this database is one coordinator's alone")
        self._url, now_ms = self._url_at(db.address_here()), db.now_ms()
        facts = [self.id, self._url, self._certificate(), version("ollama-coordinator")]
        db.execute(_NOTE, [*facts, now_ms, now_ms])
        return now_ms

    # ── following ─────────────────────────────────────────────────────────────────────────────

    async def follow(self, answers: Callable[[str], Awaitable[bool]]) -> None:
        """Follow the coordinator that leads, until none does.

        `answers` tells whether the coordinator at a URL still leads. While the database cannot be
        reached, nobody begins to lead.
        """
        if self._database is None:
            return
        loop, thread = asyncio.get_running_loop(), ThreadPoolExecutor(1, "cluster")
        errors: tuple[type[Exception], ...] = (*self._database.errors, ValueError)
        problem, self._begins = "", False
        try:
            while True:
                try:
                    is_led, rows = await loop.run_in_executor(thread, self._look, self._database)
                    self._take(rows)
                    self._looked_at, problem = loop.time(), ""
                    if is_led and self._is_silent() and not await self._answers(answers):
                        end = partial(self._database.end_silent_leader, QUIET_SECONDS)
                        self._begins = True
                        self._begins = await loop.run_in_executor(thread, end)
                        if self._begins:
                            log.warning("the leader is silent; its session is ended")
                            return
                except errors as exc:
                    is_led, self._begins, self._looked_at = True, False, -math.inf
                    if not problem:
                        problem = self._database.advice(exc)
                        log.warning("cannot see who leads", extra={"problem": problem})
                if is_led:
                    self._led_at = loop.time()
                elif not await self._may_return(loop.time() - self._led_at, answers):
                    return
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            self._begins = True
            await loop.run_in_executor(thread, self._database.close)
            thread.shutdown()
            self._is_beside = False

    def _is_silent(self) -> bool:
        """Whether the leader has not written its beat for longer than it should be silent."""
        now_ms = max((one.seen_ms for one in self.coordinators if one.id == self.id), default=0)
        leader = self.leader
        return leader is not None and now_ms - leader.seen_ms > QUIET_SECONDS * 1000

    async def _answers(self, answers: Callable[[str], Awaitable[bool]]) -> bool:
        return self.leader is not None and await answers(self.leader.url)

    async def _may_return(
        self, free_seconds: float, answers: Callable[[str], Awaitable[bool]]
    ) -> bool:
        """Whether the last leader may lead again, as after a restart of the database's server."""
        leader = self.leader
        return leader is not None and free_seconds < RETURN_SECONDS and await answers(leader.url)

    def _look(self, db: SharedDatabase) -> tuple[bool, list[dict[str, Any]]]:
        """Note this coordinator, and find the others; whether anybody leads."""
        if not self._is_beside:
            db.open_beside()
            self._is_beside = True
        with db.atomic():
            self._note(db)
            self.secret = _secret(db) or self.secret
            return db.is_led(), _coordinators(db)


def _secret(db: Database) -> str:
    rows = db.query("SELECT body FROM documents WHERE name = ?", [DOCUMENT])
    return msgspec.json.decode(rows[0]["body"], type=ClusterSecret).secret if rows else ""


def _coordinators(db: Database) -> list[dict[str, Any]]:
    return db.query("SELECT * FROM coordinators ORDER BY url, id")


_NOTE = """
    INSERT INTO coordinators (id, url, certificate, version, started_ms, seen_ms, epoch)
    VALUES (?, ?, ?, ?, ?, ?, 0)
    ON CONFLICT (id) DO UPDATE SET
        url = excluded.url, certificate = excluded.certificate, seen_ms = excluded.seen_ms
"""
_LEAD = """
    UPDATE coordinators
    SET epoch = (SELECT MAX(epoch) FROM coordinators) + 1, leads_since_ms = seen_ms WHERE id = ?
"""
_GIVE_WAY = "UPDATE coordinators SET leads_since_ms = NULL WHERE id = ?"
_FORGET = """
    DELETE FROM coordinators WHERE epoch < (SELECT MAX(epoch) FROM coordinators)
    AND seen_ms < ?
"""
