"""The front's side: it carries out attempts, reports on them, and tells a new leader of them."""

import asyncio
import logging
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress

from aiohttp import ClientResponse
from msgspec import Struct
from starlette.types import Message, Send

from ollama_coordinator.aio import Interrupt, OwnedTasks
from ollama_coordinator.api.http.dialects import error_record
from ollama_coordinator.api.http.json_edit import Body
from ollama_coordinator.api.inference.relay import ROUTES, Failure, Tracked, attempted
from ollama_coordinator.clock import Clock
from ollama_coordinator.dispatch import CANCELLED, Held
from ollama_coordinator.link import relay_key_here
from ollama_coordinator.scheduler import Result
from ollama_coordinator.upstream import (
    RequestCancelled,
    TakenBack,
    UpstreamError,
    Upstreams,
    chunks,
)
from ollama_coordinator_common.error import OllamaCoordinatorError

from .messages import (
    ABORTS,
    WIRE,
    Abort,
    AnswerPiece,
    AnswerStart,
    AttemptEnd,
    Carrying,
    Grant,
    Hello,
    Order,
    Report,
    Told,
    encoded,
    messages,
)

log = logging.getLogger(__name__)

BODY = "http.response.body"

PROGRESS_SECONDS = 0.5
"""Between two reports on an attempt that makes progress."""

REPORT_TRIES, AGAIN_SECONDS = 3, 0.2
"""How often progress is reported to a leader that takes no reports, and the time between.

An end is reported as long as nobody else leads, and at most for `UNHEARD_SECONDS`.
"""

SETTLE_SECONDS = 10.0
"""For the last reports, before this coordinator ends."""

HEARD_SECONDS = 8.0
"""A leader that was told of an end has it in the database within half of it, or was lost with it
and the next one says so within the other half.
"""

RETRIED = (
    *(Result.UNREACHABLE, Result.CUT, Result.BUSY, Result.MODEL_FAILED, Result.MODEL_MISSING),
    Result.TAKEN_BACK,
)
"""Another agent is asked, if the client has seen nothing."""

UNHEARD_SECONDS = 600.0
"""So long the next leader may take that has to hear of an end."""

FINISH_SECONDS = 3.0
"""For the leader to end a request whose client has its answer."""


class CarriedAttempt:
    """One attempt under way; see `Held`."""

    def __init__(self, now: float) -> None:
        self.interrupt = Interrupt()
        self.outcome = CANCELLED
        self.progress_at = now
        self.began_at: float | None = None
        self.records = 0
        self.status = 0
        self.restarts = False


class KnownAttempt(Struct, eq=False):
    """What leaders have to know of an attempt; `leader` is the one that is told of it.

    `held`: it runs for a leader that was here. `ended`: how it ended, at `ended_at`, once it has;
    `heard_at`: when the last leader was told.
    """

    leader: str
    tracked: Tracked
    grant: bytes
    granted_at: float
    reported_at: float
    held: Held | None = None
    ended: AttemptEnd | None = None
    ended_at: float = 0.0
    heard_at: float | None = None


class FrontAttempts:
    """The attempts that this front carries out; `post` sends a leader at a URL their reports."""

    def __init__(
        self,
        upstreams: Upstreams,
        clock: Clock,
        post: Callable[[str, bytes], Awaitable[None]],
    ) -> None:
        self._upstreams = upstreams
        self._clock = clock
        self._post = post
        self._under_way: dict[int, KnownAttempt] = {}
        self._over: dict[int, KnownAttempt] = {}
        self._said: dict[int, KnownAttempt] = {}
        self._waiting: dict[str, list[Report]] = {}
        self._sending: set[asyncio.Task[None]] = set()
        self._tasks = OwnedTasks()

    async def run(self) -> None:
        """Report how far attempts are."""
        async with self._tasks:
            while True:
                await asyncio.sleep(PROGRESS_SECONDS)
                self._see_ends()
                for number, kept in self._under_way.items():
                    if kept.tracked.progress_at > kept.reported_at:
                        kept.reported_at = kept.tracked.progress_at
                        self._report(number, kept)
                self._forget()

    def _see_ends(self) -> None:
        """Those that a leader left that was here have no task of ours."""
        for number, kept in list(self._under_way.items()):
            if kept.held is not None and kept.held.ended:
                self._end(number, _end_of(kept.held))

    async def settle(self) -> None:
        """Have every end reported before this coordinator ends."""
        self._see_ends()
        if self._sending:
            await asyncio.wait(self._sending, timeout=SETTLE_SECONDS)

    def _forget(self) -> None:
        now = self._clock.now()
        for number, kept in list(self._over.items()):
            heard_at = kept.heard_at
            since, seconds = (
                (kept.ended_at, UNHEARD_SECONDS) if heard_at is None else (heard_at, HEARD_SECONDS)
            )
            if now - since > seconds:
                del self._over[number]

    def __len__(self) -> int:
        return len(self._under_way)

    # ── for the next leader ───────────────────────────────────────────────────────────────────

    def keep(self, left: Iterable[tuple[int, Held, Grant]]) -> None:
        """Speak from now on for attempts of a leader that was here."""
        for number, held, grant in left:
            at = held.lease.granted_at
            self._under_way[number] = KnownAttempt("", held, encoded(grant), at, at, held)

    def hello(self, own_id: str, waiting: int, leader: str, epoch: int) -> Hello:
        """What the leader of an epoch has to know; reports go to it from now on.

        `waiting`: how many requests wait here that have no attempt.
        """
        now, carrying = self._clock.now(), []
        self._said = self._under_way.copy()
        for number, kept in (*self._under_way.items(), *self._over.items()):
            if number >> 32 >= epoch or not kept.grant:
                continue  # of this leader, or of one whose version hands nothing over
            kept.leader, began_at, tracked = leader, kept.tracked.began_at, kept.tracked
            first = None if began_at is None else began_at - kept.granted_at
            carrying.append(
                Carrying(
                    number, kept.grant, now - kept.granted_at, first, tracked.records,
                    kept.ended, max(kept.ended_at - kept.granted_at, 0.0),
                )
            )  # fmt: skip
        return Hello(WIRE, own_id, waiting, carrying)

    def heard(self, hello: Hello) -> None:
        """A leader has heard a hello, and the ends that were in it.

        What ended since then it may have been told before it knew of the attempt.
        """
        for one in hello.carrying:
            if one.ended is not None and one.id in self._over:
                self._over[one.id].heard_at = self._clock.now()
        for number, kept in self._said.items():
            if kept.ended is not None:
                self._report(number, kept)
        self._said = {}

    def carries_of_others(self, epoch: int) -> bool:
        """Whether attempts are under way that leaders before this epoch have granted."""
        under_way = self._under_way.items()
        return any(number >> 32 < epoch and kept.grant for number, kept in under_way)

    async def listen(self, sent: AsyncIterable[bytes]) -> None:
        """End what the leader that has heard a hello tells to end.

        Raises:
            Cut: these are no messages.
        """
        async for told in messages(sent):
            await self.tell(told)

    async def tell(self, told: Told) -> None:
        """What the leader tells of an attempt that it has taken over."""
        if isinstance(told, Abort):
            self._abort(told)

    # ── one request ───────────────────────────────────────────────────────────────────────────

    async def answer(
        self,
        leader: str,
        said: ClientResponse,
        opened: AsyncExitStack,
        reading: AbstractAsyncContextManager[object],
        body: Body,
        send: Send,
    ) -> bool:
        """Answer one request as a leader says; whether the client has an answer, or a part of one.

        `reading` surrounds the reading of what is `said`, and may end it. Where the leader is lost,
        an attempt under way goes on to its end. `opened` closes the leader's connection.
        """
        answering = _CarriedRequest(leader, body, send)
        try:
            async with OwnedTasks() as tasks:
                try:
                    async with reading, asyncio.timeout(None) as answering.limit:
                        async for told in messages(chunks(said)):
                            await self._obey(told, answering, tasks)
                except (OllamaCoordinatorError, TimeoutError) as exc:
                    if not answering.is_over:
                        log.warning("leader lost", extra={"url": leader, "reason": str(exc)})
                answering.is_told = False
                if answering.attempt is not None:
                    await asyncio.wait({answering.attempt})
        finally:
            if answering.is_over:
                self._tasks.start(self._finish(said, opened.pop_all()))
        if answering.broken and not answering.has_ended:  # nobody says where it could go on
            record = {"body": answering.broken, "more_body": False}
            await answering.pass_on({"type": BODY, **record})
        if answering.cancelled is not None and not answering.has_begun:
            raise answering.cancelled
        return answering.has_begun

    async def _finish(self, said: ClientResponse, opened: AsyncExitStack) -> None:
        """Hear the leader out on a request whose client has its answer, and may be gone.

        A connection that closed first would be a client that left before the end, to the leader
        that has not heard of it yet; and the next request would need another one.
        """
        async with opened:
            with suppress(UpstreamError, TimeoutError):
                async with asyncio.timeout(FINISH_SECONDS):
                    async for _ in chunks(said):
                        pass

    async def _obey(self, told: Told, answering: "_CarriedRequest", tasks: OwnedTasks) -> None:
        match told:
            case AnswerStart():
                message = {"status": told.status, "headers": told.headers}
                await answering.pass_on({"type": "http.response.start", **message})
            case AnswerPiece():
                message = {"body": told.body, "more_body": told.more}
                await answering.pass_on({"type": "http.response.body", **message})
            case Order():
                answering.attempt = tasks.start(self._carry_out(told, answering))
            case Abort():
                self._abort(told)

    def _abort(self, told: Abort) -> None:
        kept, kind = self._under_way.get(told.id), ABORTS.get(told.kind)
        # What has begun is not taken back: the leader did not know it yet.
        has_begun = kept is not None and kept.tracked.began_at is not None
        if kept is not None and kind and not (kind is TakenBack and has_begun):
            kept.tracked.interrupt.fire(kind(told.reason))

    async def _carry_out(self, order: Order, answering: "_CarriedRequest") -> None:
        now, sent, at = self._clock.now, order.sent, self._clock.now()
        attempt = CarriedAttempt(at)
        kept = self._under_way[order.id] = KnownAttempt(
            answering.leader, attempt, order.grant, at, at
        )

        def began() -> None:
            attempt.began_at = attempt.progress_at = kept.reported_at = now()
            self._report(order.id, kept)

        relay_key_here.set(sent.relay_key)
        body = answering.body if sent.body is None else sent.body
        # The client that leaves ends it with no error of its own.
        ended = AttemptEnd(CANCELLED, 0)
        try:
            failure = await attempted(
                self._upstreams, sent, body, attempt, answering.pass_on, began, now,
                lambda: order.others, lambda idle_seconds: idle_seconds >= order.again_after,
            )  # fmt: skip
            ended = AttemptEnd(attempt.outcome, attempt.status, failure)
            if failure is None:
                answering.over()
            elif failure.written is not None:
                answering.broken = error_record(ROUTES[sent.route], failure.written.reason)
        except RequestCancelled as exc:
            ended = AttemptEnd(attempt.outcome, attempt.status, cancelled=str(exc))
            answering.cancelled = exc
        finally:
            self._end(order.id, ended)

    # ── reports ───────────────────────────────────────────────────────────────────────────────

    def _end(self, number: int, ended: AttemptEnd) -> None:
        kept = self._under_way.pop(number)
        kept.ended, kept.ended_at = ended, self._clock.now()
        if not ended.goes_on:
            self._over[number] = kept
        self._report(number, kept)

    def _report(self, number: int, kept: KnownAttempt) -> None:
        """What is reported in one turn of the event loop goes together."""
        tracked = kept.tracked
        report = Report(number, tracked.began_at is not None, tracked.records, kept.ended)
        waiting = self._waiting.setdefault(kept.leader, [])
        waiting.append(report)
        if len(waiting) == 1:
            sending = self._tasks.start(self._send(kept.leader))
            self._sending.add(sending)
            sending.add_done_callback(self._sending.discard)

    async def _send(self, leader: str) -> None:
        await asyncio.sleep(0)
        sent = self._waiting.pop(leader)
        reports, tries = encoded(sent), 0
        while not await self._taken(leader, reports, is_last=tries == REPORT_TRIES - 1):
            tries += 1
            if tries >= REPORT_TRIES and not any(self._is_owed(leader, one) for one in sent):
                return
            await asyncio.sleep(AGAIN_SECONDS)
        for report in sent:
            if report.ended is not None and report.id in self._over:
                self._over[report.id].heard_at = self._clock.now()

    async def _taken(self, leader: str, reports: bytes, *, is_last: bool) -> bool:
        """Whether a leader takes reports; `is_last`: after this, the log says that it does not."""
        try:
            await self._post(leader, reports)
        except UpstreamError as exc:
            if is_last:
                extra = {"url": leader, "reason": str(exc)}
                log.warning("the leader takes no reports", extra=extra)
            return False
        return True

    def _is_owed(self, leader: str, report: Report) -> bool:
        """Whether a leader has still to hear of an end: no other one was told of the attempt."""
        kept = self._over.get(report.id)
        return kept is not None and kept.leader == leader and kept.heard_at is None


def _end_of(held: Held) -> AttemptEnd:
    """How an attempt ended whose client was connected to a leader that was here.

    One that failed before its client had anything is passed on again.
    """
    failed = held.began_at is None and held.outcome.result in RETRIED
    failure = Failure(held.agent.id, held.outcome) if failed else None
    return AttemptEnd(held.outcome, held.status, failure)


class _CarriedRequest:
    """One client's request while a leader says how it is answered.

    `is_told`: the leader still says. `has_begun`: the client has a part of an answer. `is_over`: it
    has all of it. `broken` is the error that ends an answer which broke off, until its end has
    passed (`has_ended`).
    """

    def __init__(self, leader: str, body: Body, send: Send) -> None:
        self.leader = leader
        self.body = body
        self.attempt: asyncio.Task[None] | None = None
        self.cancelled: RequestCancelled | None = None
        self.limit = asyncio.timeout(None)
        self.is_told = True
        self.has_begun = False
        self.has_ended = False
        self.is_over = False
        self.broken = b""
        self._send = send

    async def pass_on(self, message: Message) -> None:
        """Send the client a part of its answer."""
        self.has_begun = True
        self.has_ended = message["type"] == BODY and not message.get("more_body", False)
        await self._send(message)

    def over(self) -> None:
        """The client has its answer: what the leader still says is nothing to wait for."""
        self.is_over = True
        if self.is_told:
            self.limit.reschedule(asyncio.get_running_loop().time())
