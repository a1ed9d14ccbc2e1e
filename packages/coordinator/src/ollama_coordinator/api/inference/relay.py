"""A request's attempts, and the way back of one: an agent's answer to the client, by records.

Nothing reaches the client before the first whole record (or the whole answer, where it is not
streamed); until then the attempt can be repeated elsewhere. Afterwards the answer can at best be
continued, see `continuation`.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import aiohttp
from msgspec import Struct, structs
from starlette.types import Send

from ollama_coordinator.aio import Interrupt
from ollama_coordinator.api.http.dialects import (
    INFERENCE_ROUTES,
    NO_JSON,
    Ending,
    InferenceRoute,
    error_record,
    is_comment,
    read_ending,
    swallowed_error,
    wrong_start,
)
from ollama_coordinator.api.http.errors import send_whole
from ollama_coordinator.api.http.headers import (
    MODEL_HEADER,
    RUNNER_HEADER,
    UNBUFFERED,
    served_by,
    to_client,
)
from ollama_coordinator.api.http.json_edit import Body
from ollama_coordinator.dispatch import Held
from ollama_coordinator.scheduler import (
    ModelNotFound,
    Outcome,
    Request,
    RequestId,
    Result,
    SchedulerError,
)
from ollama_coordinator.upstream import (
    SMALL_ANSWER_BYTES,
    AgentLost,
    ConnectionLost,
    Cut,
    Gone,
    LostTwice,
    ModelStuck,
    NotConnected,
    RequestCancelled,
    SendAgain,
    TakenBack,
    UpstreamError,
    Upstreams,
    chunks,
    whole,
)
from ollama_coordinator_common.error import OllamaCoordinatorError
from ollama_coordinator_common.names import ModelName
from ollama_coordinator_common.types import AgentId

from .context_fit import Fitted
from .continuation import (
    GENERATE,
    CannotContinue,
    Continuing,
    Kept,
    Onward,
    Written,
    raw_body,
)
from .retry_rule import DIED, judge, says_nothing_of_the_machine

log = logging.getLogger(__name__)

WHOLE_BYTES = 16 * 1024 * 1024
"""An answer that is not streamed is held back up to this size, so that a cut one is retried."""

ERRORS = range(400, 600)
"""A status beyond HTTP's own is no answer that a client could be given."""

CARRIER = "carrier"
"""The key of a request's `Carrier` in its ASGI scope."""

ROUTES = {route.path: route for route in INFERENCE_ROUTES}

ERROR = b'{"error":'
"""How an error in mid-stream begins."""

STREAMED = ("application/x-ndjson", "text/event-stream")


class Failure(Struct, frozen=True):
    """Why an attempt failed, and the agent's answer.

    `status` is 0 where the agent gave no answer that the client could be given. `was_sent`: the
    request reached the agent. `written`: what the client has of the answer, if another agent may
    continue it; else it has seen nothing of this attempt.
    """

    agent_id: AgentId
    outcome: Outcome
    status: int = 0
    headers: list[tuple[bytes, bytes]] = []
    body: bytes = b""
    was_sent: bool = True
    written: Written | None = None


class Course:
    """One request between its attempts: what failed so far, and what of its answer has to go on.

    `small` are agents that are asked once all others have failed. `is_over`: nobody is left to try.
    """

    def __init__(self, request: Request, small: Iterable[AgentId]) -> None:
        self.request = request
        self.small = frozenset(small)
        self.failures: list[Failure] = []
        self.onward: Onward | None = None
        self.is_over = False

    def refused(
        self, error: SchedulerError, missing: Callable[[Request], OllamaCoordinatorError]
    ) -> None:
        """No agent takes it now; the error is raised if none was tried."""
        if not self.failures:
            raise missing(self.request) if isinstance(error, ModelNotFound) else error
        slow = _taken_back_from(self.failures) & self.request.excluded
        # If nobody else serves it now, a slow agent is better than none, or one whose context is
        # too small.
        again, self.small = slow or self.small, frozenset() if not slow else self.small
        self.is_over = isinstance(error, ModelNotFound) or not again
        self.request = self.request.fit_for(again)

    def failed(self, held: Held, failure: Failure) -> None:
        """An attempt failed: its agent is asked no more."""
        known = [one.agent_id for one in self.failures]
        self.failures.append(failure)
        self.request = structs.replace(self.request, admitted=True)
        if failure.outcome.result is Result.TAKEN_BACK:
            self.request = self.request.taken_from(held.agent.id)
        elif failure.was_sent or held.agent.id in known:
            # Else it waits for the agent to come back, as those behind it do.
            self.request = self.request.without([held.agent.id])


def _taken_back_from(failures: Sequence[Failure]) -> frozenset[AgentId]:
    """The agents that were slow, and did not fail."""
    result = {one.agent_id: one.outcome.result for one in failures}
    return frozenset(agent for agent, last in result.items() if last is Result.TAKEN_BACK)


class Way(Struct, frozen=True):
    """What the way back of an attempt has to know, wherever it runs.

    `model`: what served, where an alias was asked for. `note`: the runner that serves it, where its
    context is larger than what was asked for. `listed_as`: the model's name on the agent, in its
    letter case. `keeps`: the answer is kept, so that another agent may continue it.
    """

    agent_id: AgentId
    agent: str
    request_id: RequestId
    name: str
    model: str = ""
    note: str = ""
    listed_as: str | None = None
    of_cloud: bool = False
    keeps: bool = False


class Sent(Struct, frozen=True):
    """One attempt as it goes out: to which URL, on which route, and what its way back has to know.

    `body`: `None` where it is as the client sent it. `onward`: it continues an answer. `relay_key`:
    of the agent's relay, for whoever carries the attempt out elsewhere.
    """

    url: str
    route: str
    headers: list[tuple[str, str]]
    way: Way
    body: bytes | None = None
    onward: Onward | None = None
    relay_key: str = ""


class Carrier(Protocol):
    """Whoever has the client's connection, where that is another process: the bytes pass there.

    `shakes_hands`: it does with relays.
    """

    shakes_hands: bool

    async def carry(
        self, sent: Sent, held: Held, others: list[str] | None, again_after: float
    ) -> Failure | None:
        """Carry out an attempt; as `attempted`.

        It may go out once more where a kept connection was idle for `again_after` seconds.

        Raises:
            RequestCancelled: an operator ended it before the client had anything.
            ClientLeft: whoever carries it out is gone.
        """


class Call(Struct, frozen=True):
    """One request on its way: its route, the request, and the way back to the client.

    `unloads`: it only asks to drop the model from memory. `fitted` is how it fits the agents.
    `carrier` is there where the client is connected to another process. `continues`: a stream may
    go on elsewhere.
    """

    route: InferenceRoute
    request: Request
    headers: list[tuple[str, str]]
    body: Body
    send: Send
    unloads: bool = False
    fitted: Fitted | None = None
    carrier: Carrier | None = None
    continues: bool = False


class Tracked(Protocol):
    """What the way back notes of an attempt under way; see `Held`."""

    interrupt: Interrupt
    outcome: Outcome
    progress_at: float
    began_at: float | None
    records: int
    status: int
    restarts: bool


async def attempted(
    upstreams: Upstreams,
    sent: Sent,
    body: Body,
    tracked: Tracked,
    send: Send,
    began: Callable[[], None],
    now: Callable[[], float],
    others: Callable[[], list[str] | None],
    again: SendAgain,
) -> Failure | None:
    """Try one agent; `None` when the client has its answer, also one that broke off for good.

    `began` is called with the first byte, and notes that in `tracked`. `now`: monotonic seconds.
    `others`: the capabilities that other holders of the model list; `None` where none lists any.
    `again`: whether it may go out once more on another connection.

    Raises:
        RequestCancelled: an operator ended it before the client had anything.
    """
    route, onward, url = ROUTES[sent.route], sent.onward, sent.url
    if onward is not None:
        send = Continuing(route, onward, body, send)
        route, url = ROUTES[GENERATE], sent.url.removesuffix(sent.route) + GENERATE
    relay = Relay(route, sent.way, tracked, send, began, now, others)
    try:
        async with tracked.interrupt:
            if onward is not None:
                body = await raw_body(upstreams, sent.url, sent.headers, body, onward)
            opened = upstreams.open("POST", url, headers=sent.headers, body=body, again=again)
            async with opened as response:
                return await relay.run(response)
    except UpstreamError as exc:
        return await relay.broken(exc)
    except CannotContinue as exc:
        tracked.outcome = exc.outcome
        return Failure(sent.way.agent_id, exc.outcome)


class Relay:
    """The way back of one attempt, see `attempted`: from the upstream's answer to the client."""

    def __init__(
        self,
        route: InferenceRoute,
        way: Way,
        tracked: Tracked,
        send: Send,
        began: Callable[[], None],
        now: Callable[[], float],
        others: Callable[[], list[str] | None],
    ) -> None:
        self._route = route
        self._way = way
        self._held = tracked
        self._send = send
        self._began = began
        self._now = now
        self._others = others
        self._started = False
        self._records = Records(route.dialect.separator)
        self._kept = Kept(route) if way.keeps else None
        self._death = b""

    async def run(self, response: aiohttp.ClientResponse) -> Failure | None:
        """Relay the answer.

        Raises:
            UpstreamError: it broke off.
        """
        self._held.status = response.status
        head = to_client(response.raw_headers)
        head += served_by(self._way.agent, self._way.request_id)
        if self._way.model:
            head.append((MODEL_HEADER, self._way.model.encode()))
        if response.status in ERRORS:
            body = await whole(response, SMALL_ANSWER_BYTES)
            return await self._refused(response.status, head, body)
        if response.status != 200:
            return self._useless(f"answered {response.status} in place of an answer")
        if self._way.note:
            head.append((RUNNER_HEADER, self._way.note.encode()))
        if response.content_type in STREAMED and not self._route.one_piece:
            head.append(UNBUFFERED)
            return await self._stream(response, head)
        return await self._whole(response, head)

    async def _refused(
        self, status: int, headers: list[tuple[bytes, bytes]], body: bytes
    ) -> Failure | None:
        """An error: one of the request's own making passes, any other is tried elsewhere."""
        held = self._held
        outcome = judge(status, body, of_cloud=self._way.of_cloud, lists=self._others_list)
        if outcome is not None and not self._is_of_the_case(outcome):
            held.outcome = outcome
            return Failure(self._way.agent_id, outcome, status, headers, body)
        held.status, held.outcome = status, Outcome(Result.REJECTED)
        await send_whole(self._send, status, headers, body)
        return None

    def _useless(self, reason: str) -> Failure:
        """What came is no answer that the client could be given."""
        self._held.outcome = outcome = Outcome(Result.MODEL_FAILED, reason)
        return Failure(self._way.agent_id, outcome)

    def _nothing(self, status: int, headers: list[tuple[bytes, bytes]]) -> Failure:
        """A transcription or image without a byte: an error that Ollama swallowed, or silence."""
        self._held.outcome = outcome = Outcome(Result.REJECTED, "answered with nothing")
        return Failure(self._way.agent_id, outcome, status, headers)

    async def _refused_late(self, wrong: str) -> Failure | None:
        """The answer began well, and is none: `NO_JSON`, or an object with an error."""
        if wrong == NO_JSON:
            return self._useless(wrong)
        headers = [(b"content-type", b"application/json; charset=utf-8")]
        headers += served_by(self._way.agent, self._way.request_id)
        return await self._refused(500, headers, wrong.encode())

    def _is_of_the_case(self, outcome: Outcome) -> bool:
        """Whether the agent has the model, and the route finds it in another letter case only."""
        minds = self._route.minds_case and outcome.result is Result.MODEL_MISSING
        listed = self._way.listed_as
        return minds and listed is not None and ModelName.parse(self._way.name).short != listed

    def _others_list(self, capability: str) -> bool | None:
        """Whether another holder's listing has a capability; `None` where no listing has any."""
        others = self._others()
        return None if others is None else capability in others

    async def _whole(
        self, response: aiohttp.ClientResponse, head: list[tuple[bytes, bytes]]
    ) -> Failure | None:
        """An answer in one piece, held back until it is complete or too large to hold."""
        parts: list[bytes] = []
        size = 0
        held, now, send = self._held, self._now, self._send
        async for chunk in chunks(response):
            held.progress_at = now()
            if held.began_at is None:
                self._began()
            parts.append(chunk)
            size += len(chunk)
            if size > WHOLE_BYTES:
                await self._start(response.status, head)
                body = b"".join(parts)
                await send({"type": "http.response.body", "body": body, "more_body": True})
                parts.clear()
        body = b"".join(parts)
        if not self._started:
            wrong = wrong_start(self._route, body, streamed=False)
            if wrong == NO_JSON and self._route.one_piece:
                if not body:
                    return self._nothing(response.status, head)
            elif wrong is not None:
                return await self._refused_late(wrong)
        self._settle(read_ending(self._route, body, 0))
        if self._started:
            await self._finish(body)
        else:
            await send_whole(send, response.status, head, body)
        return None

    async def _stream(
        self, response: aiohttp.ClientResponse, head: list[tuple[bytes, bytes]]
    ) -> Failure | None:
        """Whole records as they come. The first one decides whether the answer has begun."""
        records, route, first = self._records, self._route, b""
        held, now, send = self._held, self._now, self._send
        async for chunk in chunks(response):
            held.progress_at = now()
            if held.began_at is None:
                self._began()
            whole = records.feed(chunk)
            if not whole:
                continue
            if not self._started:
                whole = first = first + whole
                if (wrong := wrong_start(route, first, streamed=True)) is not None:
                    return await self._refused_late(wrong)
                is_open = len(first) <= HELD_BACK_BYTES
                if is_open and (is_comment(route, first) or swallowed_error(route, first)):
                    continue  # an error, if nothing follows
                # Not retried after this line: the client has seen tokens from this agent.
                await self._start(response.status, head)
            held.records = records.count
            whole = self._keep(whole)
            await send({"type": "http.response.body", "body": whole, "more_body": True})
        if not self._started:
            if first or not records.rest.strip():
                return self._useless("ended its answer before it began")
            if (wrong := wrong_start(route, records.rest, streamed=True)) is not None:
                return await self._refused_late(wrong)
            await self._start(response.status, head)
        return await self._end_stream()

    def _keep(self, whole: bytes) -> bytes:
        """Keep some records, less the last one if that says that the runner was lost."""
        if self._kept is None:
            return whole
        start = whole.rfind(ERROR)
        begins = start == 0 or (start > 0 and whole[start - 1 : start] == b"\n")
        if begins and DIED.search(whole[start:].decode(errors="replace")):
            self._death, whole = whole[start:], whole[:start]
        self._kept.add(whole)
        return whole

    async def _end_stream(self) -> Failure | None:
        route, records = self._route, self._records
        self._settle(read_ending(route, records.last, records.count))
        rest, told = self._death + records.rest, self._held.outcome.reason
        if swallowed_error(route, records.last):
            told = f"agent {self._way.agent} broke off the answer"
            rest += error_record(route, told)
            self._held.outcome = Outcome(Result.MODEL_FAILED, "broke off the answer")
        elif not self._death:
            await self._finish(rest)
            return None
        failure = self._to_continue(told)
        if failure is None:
            await self._finish(rest)
        return failure

    def _to_continue(self, told: str) -> Failure | None:
        """Why the answer broke off that the client has a part of, if it can go on elsewhere."""
        held = self._held
        if self._kept is None or held.began_at is None:
            return None
        written = self._kept.written(self._now() - held.began_at, told)
        if written is None:
            return None
        return Failure(self._way.agent_id, held.outcome, written=written)

    async def broken(self, error: UpstreamError) -> Failure | None:
        """The agent broke off: a `Failure` if the client has seen nothing, or the answer may go on
        elsewhere; else an error record.
        """
        if isinstance(error, RequestCancelled):
            await self._cancelled(error)
            return None
        held = self._held
        result = Result.CUT if self._started else Result.UNREACHABLE
        if isinstance(error, ModelStuck):
            result = Result.MODEL_FAILED
        elif isinstance(error, TakenBack):
            result = Result.TAKEN_BACK
        reason = f"agent {self._way.agent}: {error}"
        died = isinstance(error, ConnectionLost | Cut | Gone) and not held.restarts
        held.outcome = Outcome(result, str(error), died=died, asked=_asked(error))
        log.warning(
            "attempt taken back" if result is Result.TAKEN_BACK else "attempt failed",
            extra={"agent_id": self._way.agent_id, "agent": self._way.agent, "reason": str(error)},
        )
        if not self._started:
            # One that hung until its Ollama was restarted is as if it had never been sent there.
            was_sent = not (isinstance(error, NotConnected) or held.restarts)
            return Failure(self._way.agent_id, Outcome(result, reason), was_sent=was_sent)
        if isinstance(error, AgentLost):
            reason = str(error)
        if (failure := self._to_continue(reason)) is not None:
            return failure
        if self._records.count:
            await self._finish(error_record(self._route, reason))
        # An answer without records has no place for an error: it ends unfinished, and the server
        # then closes the connection, by which the client knows.
        return None

    async def _cancelled(self, error: RequestCancelled) -> None:
        """An operator ended the request: the client gets an error, the agent is not blamed."""
        self._held.outcome = Outcome(Result.CANCELLED, str(error))
        if not self._started:
            raise error
        if self._records.count:
            await self._finish(error_record(self._route, str(error)))

    # ── to the client ─────────────────────────────────────────────────────────────────────────

    def _settle(self, ending: Ending) -> None:
        if ending.error is not None:
            blameless = says_nothing_of_the_machine(ending.error)
            result = Result.ERRORED if blameless else Result.MODEL_FAILED
            died = DIED.search(ending.error) is not None
            self._held.outcome = Outcome(result, ending.error, died=died)
        else:
            self._held.outcome = Outcome(Result.SERVED, timings=ending.timings)

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        if self._started:
            return
        self._started = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _finish(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": False})


def _asked(error: UpstreamError) -> int:
    """How often a request went out, see `Outcome`."""
    if isinstance(error, LostTwice):
        return 2
    if isinstance(error, Gone):
        return 1
    return 0 if isinstance(error, NotConnected | AgentLost) else 1


EVENT_END = b"\n\n"
ANY_EVENT_END = (EVENT_END, b"\n\r\n", b"\r\r")
"""A server-sent event ends with an empty line; lines may end in LF, CRLF or CR."""

HELD_BACK_BYTES = 1024 * 1024
"""A record longer than this passes in pieces."""


class Records:
    """Counts records and remembers the last ones; `separator` ends each."""

    def __init__(self, separator: bytes) -> None:
        self._separator = separator
        self.rest = b""
        """The bytes after the last end of a record."""
        self.last = b""
        self.count = 0

    def feed(self, chunk: bytes) -> bytes:
        """The bytes that may go on now: those held back and `chunk`, up to the last end."""
        data = self.rest + chunk if self.rest else chunk
        if data.endswith(self._separator):
            self.rest = b""
        else:
            ends = self._ends_in(data)
            cut = max([0, *(data.rfind(end) + len(end) for end in ends if end in data)])
            if len(data) - cut > HELD_BACK_BYTES:
                cut = len(data)
            self.rest, data = data[cut:], data[:cut]
        if data:
            self.last = data
            self.count += sum(data.count(end) for end in self._ends_in(data)) or 1
        return data

    def _ends_in(self, data: bytes) -> tuple[bytes, ...]:
        """What may end a record in it."""
        is_any = b"\r" in data and self._separator == EVENT_END
        return ANY_EVENT_END if is_any else (self._separator,)
