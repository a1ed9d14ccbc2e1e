"""The way back of one attempt: from an agent's answer to the client, record by record.

Nothing reaches the client before the first whole record (or the whole answer, where it is not
streamed); until then the attempt can be repeated elsewhere, afterwards never.
"""

import logging

import aiohttp
from msgspec import Struct
from starlette.types import Send

from ollama_coordinator.api.http.dialects import (
    Ending,
    InferenceRoute,
    error_record,
    read_ending,
    swallowed_error,
)
from ollama_coordinator.api.http.errors import send_whole
from ollama_coordinator.api.http.headers import RUNNER_HEADER, served_by, to_client
from ollama_coordinator.dispatch import Dispatch, Held
from ollama_coordinator.scheduler import Outcome, Request, Result
from ollama_coordinator.upstream import AgentLost, RequestCancelled, UpstreamError, chunks

from .retry_rule import cannot_run, retryable

log = logging.getLogger(__name__)

WHOLE_BYTES = 16 * 1024 * 1024
"""An answer that is not streamed is held back up to this size, so that a cut one is retried."""

STREAMED = ("application/x-ndjson", "text/event-stream")


class Failure(Struct, frozen=True):
    """Why an attempt failed before the client saw a byte, and the agent's answer, if any."""

    outcome: Outcome
    status: int = 0
    headers: list[tuple[bytes, bytes]] = []
    body: bytes = b""


class Call(Struct, frozen=True):
    """One request on its way: its route, the request, and the way back to the client.

    `unloads`: it only asks to drop the model from memory. `note`: how it was changed, if it was.
    """

    route: InferenceRoute
    request: Request
    headers: list[tuple[str, str]]
    body: bytes
    send: Send
    unloads: bool = False
    note: str = ""


class Relay:
    """The way back of one attempt: from the upstream's answer to the client."""

    def __init__(self, call: Call, held: Held, dispatch: Dispatch) -> None:
        self._call = call
        self._held = held
        self._dispatch = dispatch
        self._started = False
        self._records = Records(call.route.dialect.separator)

    async def run(self, response: aiohttp.ClientResponse) -> Failure | None:
        """Relay the answer.

        Raises:
            UpstreamError: it broke off.
        """
        self._held.status = response.status
        headers = to_client(response.raw_headers)
        if response.status >= 400:
            return await self._refused(response, headers)
        head = [*headers, *served_by(self._held.agent.name, self._call.request.id)]
        if self._call.note:
            head.append((RUNNER_HEADER, self._call.note.encode()))
        if response.content_type in STREAMED:
            return await self._stream(response, head)
        return await self._whole(response, head)

    async def _refused(
        self, response: aiohttp.ClientResponse, headers: list[tuple[bytes, bytes]]
    ) -> Failure | None:
        body = b"".join([chunk async for chunk in chunks(response)])
        outcome = retryable(response.status, body)
        if outcome is not None:
            self._held.outcome = outcome
            return Failure(outcome, response.status, headers, body)
        self._held.outcome = Outcome(Result.SERVED)
        await send_whole(self._call.send, response.status, headers, body)
        return None

    async def _whole(
        self, response: aiohttp.ClientResponse, head: list[tuple[bytes, bytes]]
    ) -> Failure | None:
        """An answer in one piece, held back until it is complete or too large to hold."""
        parts: list[bytes] = []
        size = 0
        async for chunk in chunks(response):
            self._progress()
            parts.append(chunk)
            size += len(chunk)
            if size > WHOLE_BYTES:
                await self._start(response.status, head)
                await self._forward(b"".join(parts))
                parts.clear()
        body = b"".join(parts)
        self._settle(read_ending(self._call.route, body, 0))
        if self._started:
            await self._finish(body)
        else:
            await send_whole(self._call.send, response.status, head, body)
        return None

    async def _stream(
        self, response: aiohttp.ClientResponse, head: list[tuple[bytes, bytes]]
    ) -> Failure | None:
        """Whole records as they come. The first one decides whether the answer has begun."""
        records = self._records
        async for chunk in chunks(response):
            self._progress()
            whole = records.feed(chunk)
            if not whole:
                continue
            if not self._started:
                failure = self._stillborn(whole)
                if failure is not None:
                    return failure
                # Not retried after this line: the client has seen tokens from this agent.
                await self._start(response.status, head)
            self._held.records = records.count
            await self._forward(whole)
        if not self._started:
            await self._start(response.status, head)
        await self._end_stream()
        return None

    async def _end_stream(self) -> None:
        route, records = self._call.route, self._records
        self._settle(read_ending(route, records.last, records.count))
        rest = records.rest
        if swallowed_error(route, records.last):
            rest += error_record(route, f"agent {self._held.agent.name} broke off the answer")
        await self._finish(rest)

    def _stillborn(self, first: bytes) -> Failure | None:
        """An error in place of the first record, from an agent that cannot run the model."""
        error = read_ending(self._call.route, first, 1).error
        if error is None or not cannot_run(error):
            return None
        outcome = Outcome(Result.MODEL_FAILED, error)
        self._held.outcome = outcome
        return Failure(outcome, 500, [(b"content-type", b"application/json")], first)

    async def broken(self, error: UpstreamError) -> Failure | None:
        """The agent broke off: a `Failure` if the client has seen nothing, else an error record."""
        if isinstance(error, RequestCancelled):
            await self._cancelled(error)
            return None
        held = self._held
        result = Result.CUT if self._started else Result.UNREACHABLE
        reason = f"agent {held.agent.name}: {error}"
        held.outcome = Outcome(result, str(error))
        log.warning(
            "attempt failed",
            extra={"agent_id": held.agent.id, "agent": held.agent.name, "reason": str(error)},
        )
        if not self._started:
            return Failure(Outcome(result, reason))
        if isinstance(error, AgentLost):
            reason = str(error)
        if self._records.count:
            await self._finish(error_record(self._call.route, reason))
        # An answer without records has no place for an error: it ends unfinished, and the server
        # then closes the connection, by which the client knows.
        return None

    async def _cancelled(self, error: RequestCancelled) -> None:
        """An operator ended the request: the client gets an error, the agent is not blamed."""
        self._held.outcome = Outcome(Result.CANCELLED, str(error))
        if not self._started:
            raise error
        if self._records.count:
            await self._finish(error_record(self._call.route, str(error)))

    # ── to the client ─────────────────────────────────────────────────────────────────────────

    def _progress(self) -> None:
        if self._held.began_at is None:
            self._dispatch.began(self._held)
        else:
            self._held.progress_at = self._dispatch.clock.now()

    def _settle(self, ending: Ending) -> None:
        if ending.error is not None:
            result = Result.MODEL_FAILED if cannot_run(ending.error) else Result.ERRORED
            self._held.outcome = Outcome(result, ending.error)
        else:
            self._held.outcome = Outcome(Result.SERVED, timings=ending.timings)

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        if self._started:
            return
        self._started = True
        await self._call.send({"type": "http.response.start", "status": status, "headers": headers})

    async def _forward(self, data: bytes) -> None:
        await self._call.send({"type": "http.response.body", "body": data, "more_body": True})

    async def _finish(self, data: bytes) -> None:
        await self._call.send({"type": "http.response.body", "body": data, "more_body": False})


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
            end = data.rfind(self._separator)
            cut = end + len(self._separator) if end >= 0 else 0
            if len(data) - cut > HELD_BACK_BYTES:
                cut = len(data)
            self.rest, data = data[cut:], data[:cut]
        if data:
            self.last = data
            self.count += data.count(self._separator) or 1
        return data
