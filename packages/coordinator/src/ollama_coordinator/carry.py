"""Attempts that a front carries out: the leader decides, the bytes pass between agent and client.

A front passes a request for inference on with `CARRIES`. The leader's answer is then a stream of
messages: an attempt to carry out, its end from outside, or an answer of the leader's own in pieces.
The front reports, in requests of its own, first bytes, progress and ends. So an answer outlives its
leader, and no token passes it.
"""

import asyncio
import itertools
import logging
import struct
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager

import msgspec
from msgspec import Struct, structs
from starlette.types import Message, Send

from ollama_coordinator_common.error import OllamaCoordinatorError

from .aio import Interrupt, OwnedTasks
from .api.http.dialects import error_record
from .api.http.errors import ClientLeft
from .api.http.json_edit import Body
from .api.inference.relay import ROUTES, Failure, Sent, attempted
from .clock import Clock
from .dispatch import CANCELLED, Dispatch, Held
from .scheduler import Outcome
from .upstream import (
    AgentLost,
    Cut,
    ModelStuck,
    RequestCancelled,
    TakenBack,
    UpstreamError,
    Upstreams,
)

log = logging.getLogger(__name__)

CARRIES = b"x-ollama-coordinator-carries"
"""In a request of a front: it carries out attempts."""

CONTENT_TYPE = b"application/vnd.ollama-coordinator.attempts"

ABORT_SECONDS = 3.0
"""For a front to report the end of an attempt that it was told to end."""

PROGRESS_SECONDS = 0.5
"""Between two reports on an attempt that makes progress."""

REPORT_TRIES, AGAIN_SECONDS = 3, 0.2
"""How often reports are sent to a leader that takes none, and the time between."""

LARGEST_BYTES = 256 * 1024 * 1024
"""Of one message; a body may be in it."""

BODY = "http.response.body"

_LENGTH = struct.Struct(">I")


class AnswerStart(Struct, frozen=True, tag="start", array_like=True):
    """Status and headers of the leader's own answer."""

    status: int
    headers: list[tuple[bytes, bytes]]


class AnswerPiece(Struct, frozen=True, tag="piece", array_like=True):
    """A piece of its body; the last one, unless there are `more`."""

    body: bytes
    more: bool


class Order(Struct, frozen=True, tag="attempt", array_like=True):
    """Carry out this attempt. `others`: what other holders of the model list as capabilities.

    It may go out once more where a kept connection was idle for `again_after` seconds.
    """

    id: int
    sent: Sent
    others: list[str] | None
    again_after: float


class Abort(Struct, frozen=True, tag="abort", array_like=True):
    """End an attempt with an error of this kind."""

    id: int
    kind: str
    reason: str


class AttemptEnd(Struct, frozen=True, array_like=True):
    """How an attempt ended. `cancelled`: the error that its client still has to be told."""

    outcome: Outcome
    status: int
    failure: Failure | None = None
    cancelled: str | None = None


class Report(Struct, frozen=True, array_like=True):
    """What a front tells of an attempt: its first byte, how far it is, its end."""

    id: int
    has_begun: bool
    records: int
    ended: AttemptEnd | None = None


ABORTS: dict[str, type[UpstreamError]] = {
    kind.__name__: kind for kind in (AgentLost, ModelStuck, RequestCancelled, TakenBack)
}

Told = AnswerStart | AnswerPiece | Order | Abort
_told = msgspec.msgpack.Decoder(Told)
_reports = msgspec.msgpack.Decoder(list[Report])


async def messages(chunks: AsyncIterable[bytes]) -> AsyncIterator[Told]:
    """What a leader tells, of the bytes of its answer.

    Raises:
        Cut: these are no messages.
    """
    rest = bytearray()
    async for chunk in chunks:
        rest += chunk
        while len(rest) >= _LENGTH.size:
            [length] = _LENGTH.unpack_from(rest)
            end = _LENGTH.size + length
            if length > LARGEST_BYTES:
                raise Cut("sent a message that is too long")
            if len(rest) < end:
                break
            try:
                yield _told.decode(memoryview(rest)[_LENGTH.size : end])
            except (msgspec.DecodeError, ValueError) as exc:
                raise Cut(f"sent what is no message: {exc}") from exc
            del rest[:end]


# ── at the leader ─────────────────────────────────────────────────────────────────────────────


class Carried:
    """The attempts that fronts carry out for this leader."""

    def __init__(self, dispatch: Dispatch, epoch: Callable[[], int]) -> None:
        self._dispatch = dispatch
        self._epoch = epoch
        self._numbers = itertools.count(1)
        self._under_way: dict[int, tuple[Held, asyncio.Future[AttemptEnd]]] = {}

    def begin(self, held: Held) -> tuple[int, asyncio.Future[AttemptEnd]]:
        """An attempt begins; its id, and how it will have ended."""
        number = self._epoch() << 32 | next(self._numbers)
        future: asyncio.Future[AttemptEnd] = asyncio.get_running_loop().create_future()
        self._under_way[number] = held, future
        return number, future

    def forget(self, number: int) -> None:
        """It is over."""
        del self._under_way[number]

    def take(self, body: bytes) -> None:
        """Take what a front reports.

        Raises:
            msgspec.DecodeError: these are no reports.
        """
        now = self._dispatch.clock.now()
        for report in _reports.decode(body):
            held, future = self._under_way.get(report.id, (None, None))
            if held is None or future is None or future.done():
                continue
            if report.has_begun and held.began_at is None:
                self._dispatch.began(held)
            held.progress_at, held.records = now, report.records
            if report.ended is not None:
                future.set_result(report.ended)


class FrontCarrier:
    """One request that a front has passed on, with the way back to it; a `Carrier`."""

    def __init__(self, carried: Carried, send: Send) -> None:
        self._carried = carried
        self._send = send
        self._is_open = False
        self._is_answered = False
        self._ordering = asyncio.Lock()

    async def send(self, message: Message) -> None:
        """What the leader itself answers.

        An answer that the client has already is only for those who see it on its way here.
        """
        if self._is_answered:
            return
        if message["type"] == "http.response.start":
            await self._tell(AnswerStart(message["status"], list(message.get("headers", ()))))
        else:
            more = message.get("more_body", False)
            await self._tell(AnswerPiece(bytes(message.get("body", b"")), more))

    async def carry(
        self, sent: Sent, held: Held, others: list[str] | None, again_after: float
    ) -> Failure | None:
        """Have the front carry out an attempt."""
        number, future = self._carried.begin(held)
        loop = asyncio.get_running_loop()
        late: asyncio.TimerHandle | None = None

        def give_up(error: Exception) -> None:
            has_begun = isinstance(error, TakenBack) and held.began_at is not None
            if not future.done() and not has_begun:
                future.set_exception(ClientLeft())

        def abort(error: Exception) -> None:
            nonlocal late
            aborting.add(loop.create_task(self._tell(Abort(number, _kind_of(error), str(error)))))
            late = loop.call_later(ABORT_SECONDS, give_up, error)

        aborting: set[asyncio.Task[None]] = set()
        try:
            await self._tell(Order(number, sent, others, again_after))
            held.interrupt.divert(abort)
            ended = await future
        finally:
            self._carried.forget(number)
            if late is not None:
                late.cancel()
            await asyncio.gather(*aborting, return_exceptions=True)
        failure = _settled(held, ended)
        self._is_answered = failure is None
        return failure

    async def finish(self) -> None:
        """The request is over."""
        if self._is_open:
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _tell(self, told: Told) -> None:
        body = msgspec.msgpack.encode(told)
        async with self._ordering:
            if not self._is_open:
                self._is_open = True
                headers = [(b"content-type", CONTENT_TYPE)]
                await self._send({"type": "http.response.start", "status": 200, "headers": headers})
            piece = _LENGTH.pack(len(body)) + body
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})


def _kind_of(error: Exception) -> str:
    name = type(error).__name__
    return name if name in ABORTS else AgentLost.__name__


def _settled(held: Held, ended: AttemptEnd) -> Failure | None:
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


# ── at a front ────────────────────────────────────────────────────────────────────────────────


class CarriedAttempt:
    """One attempt under way; see `Held`."""

    def __init__(self, leader: str, now: float) -> None:
        self.leader = leader
        self.interrupt = Interrupt()
        self.outcome = CANCELLED
        self.progress_at = now
        self.reported_at = now
        self.began_at: float | None = None
        self.records = 0
        self.status = 0
        self.restarts = False


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
        self._under_way: dict[int, CarriedAttempt] = {}
        self._waiting: dict[str, list[Report]] = {}
        self._tasks = OwnedTasks()

    async def run(self) -> None:
        """Report how far attempts are."""
        async with self._tasks:
            while True:
                await asyncio.sleep(PROGRESS_SECONDS)
                for number, attempt in self._under_way.items():
                    if attempt.progress_at > attempt.reported_at:
                        attempt.reported_at = attempt.progress_at
                        self._report(attempt, number)

    async def answer(
        self,
        leader: str,
        chunks: AsyncIterable[bytes],
        reading: AbstractAsyncContextManager[object],
        body: Body,
        send: Send,
    ) -> bool:
        """Answer one request as a leader says; whether the client has an answer, or a part of one.

        `reading` surrounds the reading of `chunks`, and may end it. Where the leader is lost, an
        attempt under way goes on to its end.
        """
        answering = _CarriedRequest(leader, body, send)
        async with OwnedTasks() as tasks:
            try:
                async with reading, asyncio.timeout(None) as answering.limit:
                    async for told in messages(chunks):
                        await self._obey(told, answering, tasks)
            except (OllamaCoordinatorError, TimeoutError) as exc:
                if answering.attempt is not None:
                    await asyncio.wait({answering.attempt})
                if not answering.is_over:
                    log.warning("leader lost", extra={"url": leader, "reason": str(exc)})
        if answering.broken and not answering.has_ended:  # nobody says where it could go on
            record = {"body": answering.broken, "more_body": False}
            await answering.pass_on({"type": BODY, **record})
        return answering.has_begun

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
                attempt, kind = self._under_way.get(told.id), ABORTS.get(told.kind)
                # What has begun is not taken back: the leader did not know it yet.
                has_begun = attempt is not None and attempt.began_at is not None
                if attempt is not None and kind and not (kind is TakenBack and has_begun):
                    attempt.interrupt.fire(kind(told.reason))

    async def _carry_out(self, order: Order, answering: "_CarriedRequest") -> None:
        now, sent = self._clock.now, order.sent
        attempt = CarriedAttempt(answering.leader, now())
        self._under_way[order.id] = attempt

        def began() -> None:
            attempt.began_at = attempt.progress_at = attempt.reported_at = now()
            self._report(attempt, order.id)

        body = answering.body if sent.body is None else sent.body
        ended: AttemptEnd | None = None
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
        finally:
            del self._under_way[order.id]
            if ended is not None:
                self._report(attempt, order.id, ended)

    # ── reports ───────────────────────────────────────────────────────────────────────────────

    def _report(
        self, attempt: CarriedAttempt, number: int, ended: AttemptEnd | None = None
    ) -> None:
        """What is reported in one turn of the event loop goes together."""
        report = Report(number, attempt.began_at is not None, attempt.records, ended)
        waiting = self._waiting.setdefault(attempt.leader, [])
        waiting.append(report)
        if len(waiting) == 1:
            self._tasks.start(self._send(attempt.leader))

    async def _send(self, leader: str) -> None:
        await asyncio.sleep(0)
        reports = msgspec.msgpack.encode(self._waiting.pop(leader))
        for left in reversed(range(REPORT_TRIES)):
            try:
                await self._post(leader, reports)
            except UpstreamError as exc:
                if not left:
                    extra = {"url": leader, "reason": str(exc)}
                    log.warning("the leader takes no reports", extra=extra)
                await asyncio.sleep(AGAIN_SECONDS)
            else:
                return


class _CarriedRequest:
    """One client's request while a leader says how it is answered.

    `has_begun`: the client has a part of an answer. `is_over`: it has all of it. `broken` is the
    error that ends an answer which broke off, until its end has passed (`has_ended`).
    """

    def __init__(self, leader: str, body: Body, send: Send) -> None:
        self.leader = leader
        self.body = body
        self.attempt: asyncio.Task[None] | None = None
        self.limit = asyncio.timeout(None)
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
        """The client has its answer; the leader has a while to end the request."""
        self.is_over = True
        self.limit.reschedule(asyncio.get_running_loop().time() + ABORT_SECONDS)
