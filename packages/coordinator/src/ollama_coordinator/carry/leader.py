"""What a leader knows of the attempts that fronts carry out, and takes over from the one before.

A new leader grants nothing until all fronts that it knows have said what they carry out, a second
at most. What they say becomes leases and entries of its journal, as if it had granted them.
"""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager, suppress

import msgspec
from msgspec import structs
from starlette.types import Receive, Scope, Send

from ollama_coordinator.access import NOBODY, UnknownKey
from ollama_coordinator.aio import OwnedTasks
from ollama_coordinator.api.http.body_timeout import until_disconnect
from ollama_coordinator.api.http.errors import ClientLeft, send_whole
from ollama_coordinator.api.inference.relay import Failure
from ollama_coordinator.api.inference.request import read_body
from ollama_coordinator.db import DatabaseError
from ollama_coordinator.dispatch import Dispatch, HandedOver, Held
from ollama_coordinator.journal import tokens_of
from ollama_coordinator.parts import Parts
from ollama_coordinator.scheduler import Lease, LeaseId
from ollama_coordinator.upstream import RequestCancelled, TakenBack

from .messages import (
    CONTENT_TYPE,
    AttemptEnd,
    Carrying,
    Grant,
    Hello,
    Report,
    Told,
    abort,
    framed,
    is_understood,
)

log = logging.getLogger(__name__)

ABORT_SECONDS = 3.0
"""For a front to report the end of an attempt that it was told to end."""

HELLO_SECONDS = 1.0
"""How long a new leader waits for what fronts say."""

GONE_SECONDS = 1.0
"""For a front whose connection was lost to speak again; later, what it carried out has ended."""

WRITTEN_SECONDS = 2.0
"""Within so long, a leader that gave way has in the database what ended for it."""

HELLO_BYTES = 256 * 1024 * 1024

ADOPTED = -(1 << 62)
"""Added to the number of an attempt, it is the id of its lease: below those granted here."""

Tell = Callable[[Told], Awaitable[None]]

_reports = msgspec.msgpack.Decoder(list[Report])
_hello = msgspec.msgpack.Decoder(Hello)
_grant = msgspec.msgpack.Decoder(Grant)


class FarAttempt:
    """An attempt that a front carries out; `tell` sends that front a message."""

    def __init__(self, number: int, held: Held, tell: Tell) -> None:
        self.number = number
        self.held = held
        self.tell = tell
        self.future: asyncio.Future[AttemptEnd] = asyncio.get_running_loop().create_future()
        self._telling: set[asyncio.Task[None]] = set()
        self._late: asyncio.TimerHandle | None = None

    async def ended(self) -> AttemptEnd:
        """Wait for its end; meanwhile what interrupts the attempt is told to the front.

        Raises:
            ClientLeft: the front is gone, or does not end it.
            HandedOver: the next leader goes on with it.
        """
        self.held.interrupt.divert(self._end)
        try:
            return await self.future
        finally:
            if self._late is not None:
                self._late.cancel()
            await asyncio.gather(*self._telling, return_exceptions=True)

    def fail(self, error: Exception) -> None:
        """It has no other end."""
        if not self.future.done():
            self.future.set_exception(error)

    def _end(self, error: Exception) -> None:
        if self.future.done():
            return
        loop = asyncio.get_running_loop()
        self._telling.add(loop.create_task(self._told(error)))
        self._late = loop.call_later(ABORT_SECONDS, self._give_up, error)

    async def _told(self, error: Exception) -> None:
        await self.tell(abort(self.number, error))

    def _give_up(self, error: Exception) -> None:
        if not (isinstance(error, TakenBack) and self.held.began_at is not None):
            self.fail(ClientLeft())


class Carried:
    """The attempts that fronts carry out for this leader."""

    def __init__(self, dispatch: Dispatch, epoch: Callable[[], int]) -> None:
        self._dispatch = dispatch
        self._epoch = epoch
        self._numbers = itertools.count(1)
        self._under_way: dict[int, FarAttempt] = {}

    def number(self) -> int:
        """The id of an attempt: no other leader gives it to another one."""
        return self._epoch() << 32 | next(self._numbers)

    def begin(self, number: int, held: Held, tell: Tell) -> FarAttempt:
        """An attempt is under way."""
        far = self._under_way[number] = FarAttempt(number, held, tell)
        return far

    def find(self, number: int) -> FarAttempt | None:
        """The attempt under way with this number."""
        return self._under_way.get(number)

    def forget(self, far: FarAttempt) -> None:
        """It is over."""
        del self._under_way[far.number]

    def take(self, body: bytes) -> None:
        """Take what a front reports.

        Raises:
            msgspec.DecodeError: these are no reports.
        """
        now = self._dispatch.clock.now()
        for report in _reports.decode(body):
            far = self._under_way.get(report.id)
            if far is None or far.future.done():
                continue
            held = far.held
            if report.has_begun and held.began_at is None:
                self._dispatch.began(held)
            held.progress_at, held.records = now, report.records
            if report.ended is not None:
                far.future.set_result(report.ended)

    def hand_over(self) -> list[Held]:
        """Leave all of them to the next leader, which hears of them from the fronts."""
        under_way = list(self._under_way.values())
        for far in under_way:
            far.fail(HandedOver("another coordinator goes on with it"))
        return [far.held for far in under_way]


def settled(held: Held, ended: AttemptEnd) -> Failure | None:
    """The end of an attempt, noted as if it had run here.

    Raises:
        RequestCancelled: its client has still to be told so.
    """
    held.status, held.outcome, failure = ended.status, ended.outcome, ended.failure
    if held.restarts and failure is not None:
        held.outcome = structs.replace(held.outcome, died=False)
        failure = structs.replace(failure, was_sent=False)
    if ended.cancelled is not None:
        raise RequestCancelled(ended.cancelled)
    return failure


class Takeover:
    """What a new leader takes over, and leaves to the next one."""

    def __init__(self, parts: Parts) -> None:
        self.carried = Carried(parts.dispatch, parts.cluster.epoch)
        self._parts = parts
        self._dispatch = parts.dispatch
        self._journal = parts.observation.journal
        self._tasks = OwnedTasks()
        self._expected: set[str] = set()
        self._recorded: set[int] = set()
        self._early = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Take over during the block; at first nothing is granted."""
        self._expected = self._parts.cluster.fronts()
        async with self._tasks:
            if self._expected:
                self._dispatch.hold()
                self._tasks.start(self._release_late())
            yield

    def pause(self, *, is_paused: bool) -> None:
        """Grant nothing as long as another coordinator may lead; what runs goes on."""
        if is_paused:
            self._dispatch.hold()
        else:
            self._dispatch.release()

    async def _release_late(self) -> None:
        await asyncio.sleep(HELLO_SECONDS)
        if self._dispatch.is_held:
            silent = sorted(self._expected)
            log.warning("some coordinators said nothing; grants begin", extra={"silent": silent})
            self._dispatch.release()

    def hear_early(self) -> None:
        """A request came that a hello has counted."""
        self._early -= 1
        self._release()

    def _release(self) -> None:
        if self._dispatch.is_held and not self._expected and self._early <= 0:
            self._dispatch.release()

    # ── from fronts ───────────────────────────────────────────────────────────────────────────

    async def hear(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a hello: its answer tells the front what is to end, until all of it has ended."""
        body = await read_body(receive, HELLO_BYTES, {})
        try:
            hello = _hello.decode(body)
        except (msgspec.DecodeError, ValueError) as exc:
            await send_whole(send, 400, [], str(exc).encode())
            return
        if not is_understood(hello.wire):
            self._expected.discard(hello.id)
            self._release()
            await send_whole(send, 400, [], b"this coordinator's version is too far from yours")
            return
        sending = asyncio.Lock()

        async def tell(told: Told) -> None:
            async with sending:
                piece = {"type": "http.response.body", "body": framed(told), "more_body": True}
                await send(piece)

        attempts = self.take(hello, tell)
        headers = [(b"content-type", CONTENT_TYPE)]
        try:
            async with until_disconnect(scope, receive):
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                # What is sent once flushes the head, as a body of which nothing is there does not.
                await send({"type": "http.response.body", "body": b"", "more_body": True})
                if attempts:
                    await asyncio.wait([far.future for far in attempts])
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientLeft:
            self._tasks.start(self._gone(attempts, tell))

    def take(self, hello: Hello, tell: Tell) -> list[FarAttempt]:
        """Take over what a front carries out; `tell` sends it messages."""
        attempts = self._adopt(hello, tell)
        self._expected.discard(hello.id)
        self._early += hello.waiting
        self._release()
        return attempts

    async def _gone(self, attempts: list[FarAttempt], tell: Tell) -> None:
        """The front's connection was lost; it may speak again."""
        await asyncio.sleep(GONE_SECONDS)
        for far in attempts:
            if far.tell is tell:
                far.fail(ClientLeft("the coordinator that carried it out is gone"))

    def _adopt(self, hello: Hello, tell: Tell) -> list[FarAttempt]:
        """Count what a front carries out, in the order of the grants."""
        attempts: list[FarAttempt] = []
        over: list[tuple[Carrying, Grant]] = []
        for one in sorted(hello.carrying, key=lambda one: one.id):
            far = self.carried.find(one.id)
            try:
                grant = _grant.decode(one.grant)
            except (msgspec.DecodeError, ValueError) as exc:
                log.warning("an attempt cannot be taken over", extra={"reason": str(exc)})
                continue
            if one.ended is not None:
                if far is None:
                    if one.id not in self._recorded:
                        over.append((one, grant))
                elif not far.future.done():
                    far.future.set_result(one.ended)
            elif far is None:
                attempts += self._begin(one, grant, tell)
            else:
                far.tell = tell
                attempts.append(far)
        if attempts or over:
            extra = {"front": hello.id, "attempts": len(attempts), "ended": len(over)}
            log.info("attempts taken over", extra=extra)
        self._recorded.update(one.id for one in hello.carrying)
        if over:
            self._tasks.start(self._record(over))
        return attempts

    def _begin(self, one: Carrying, grant: Grant, tell: Tell) -> list[FarAttempt]:
        """Follow an attempt as if it had been granted here."""
        stack = ExitStack()
        lease = self._lease(one, grant, one.seconds)
        agent = self._parts.registry.find(grant.agent_id)
        if agent is None:
            log.warning("the agent of an attempt is not known", extra={"agent_id": grant.agent_id})
            return []
        held = stack.enter_context(self._dispatch.adopted(lease, agent))
        if one.first_byte_seconds is not None:
            self._dispatch.began(held)
            held.began_at = lease.granted_at + one.first_byte_seconds
        held.records = one.records
        far = self.carried.begin(one.id, held, tell)
        stack.callback(self.carried.forget, far)
        self._tasks.start(self._follow(far, grant, stack))
        return [far]

    async def _follow(self, far: FarAttempt, grant: Grant, stack: ExitStack) -> None:
        with stack:
            await self._journaled(far.held, grant, far.ended)

    async def _record(self, over: list[tuple[Carrying, Grant]]) -> None:
        """Have in the history, once, what ended when nobody led.

        The leader before may have heard of it, and have written it.
        """
        history = self._parts.observation.history
        known: set[str] | None = None
        while known is None:
            await asyncio.sleep(WRITTEN_SECONDS)
            with suppress(DatabaseError):  # of which the store tells
                known = await history.written([grant.request.id for _, grant in over])
        for one, grant in over:
            agent = self._parts.registry.find(grant.agent_id)
            if agent is None or grant.request.id in known:
                continue
            lease = self._lease(one, grant, one.ended_seconds)
            held = Held(lease, agent, lease.granted_at)
            if one.first_byte_seconds is not None:
                held.began_at = lease.granted_at + one.first_byte_seconds
            held.records = one.records

            async def end(ended: AttemptEnd | None = one.ended) -> AttemptEnd:
                if ended is None:
                    raise ClientLeft
                return ended

            await self._journaled(held, grant, end)

    def _lease(self, one: Carrying, grant: Grant, seconds: float) -> Lease:
        granted_at = self._dispatch.clock.now() - seconds
        arrived_at = granted_at - grant.waited_seconds
        request = structs.replace(grant.request, arrived_at=arrived_at, deadline=None)
        return Lease(
            id=LeaseId(ADOPTED + one.id),
            request=request,
            agent_id=grant.agent_id,
            granted_at=granted_at,
        )

    async def _journaled(
        self, held: Held, grant: Grant, ended: Callable[[], Awaitable[AttemptEnd]]
    ) -> None:
        request = held.lease.request
        access, key = self._parts.access, None
        with suppress(UnknownKey):
            key = access.keys.find(request.key) if request.key else None
        caller = structs.replace(NOBODY, name=request.client, key=key)
        try:
            with (
                self._journal.follow(request, grant.path) as entry,
                access.usage.admitted(
                    caller, request.prompt_tokens, request.output_limit, before=True
                ) as account,
            ):
                self._journal.leased(entry, held)
                try:
                    over = await ended()
                    settled(held, over)
                finally:
                    held.ended = True
                    seconds = self._dispatch.clock.now() - held.lease.granted_at
                    entry.gpu_seconds += seconds
                    account.add(tokens_of(held), seconds)
                # The front passes it on again, where it has an entry of its own.
                entry.is_elsewhere = over.goes_on
        except (RequestCancelled, ClientLeft, HandedOver):
            return  # which the journal has

    # ── to the next leader ────────────────────────────────────────────────────────────────────

    def hand_over(self) -> list[tuple[int, Held, Grant]]:
        """Another coordinator leads: nothing more is granted or recorded here.

        What waits is passed on by whoever has its client. The attempts that run here are left: the
        next leader has to hear of them.
        """
        far = set(map(id, self.carried.hand_over()))
        self._dispatch.hand_over()
        self._journal.hand_over()
        own = []
        for entry in self._journal.live.values():
            held = entry.held
            if held is None or held.ended or id(held) in far or entry.is_divided:
                continue
            waited = held.lease.granted_at - held.lease.request.arrived_at
            grant = Grant(held.lease.request, entry.path, held.lease.agent_id, waited)
            own.append((self.carried.number(), held, grant))
        return own
