"""The answer that follows an operation: Ollama's progress lines, or the last line alone."""

import msgspec
from starlette.types import Receive, Scope, Send

from ollama_coordinator.operations import Operation, Operations
from ollama_coordinator_common.error import OllamaCoordinatorError

from .body_timeout import until_disconnect
from .dialects import Dialect, error_body
from .errors import ClientLeft, send_error, send_whole
from .headers import UNBUFFERED

NDJSON = b"application/x-ndjson"


class ProgressResponse:
    """An ASGI application; when its client leaves, an operation that is not detached ends."""

    def __init__(self, operations: Operations, operation: Operation, *, stream: bool) -> None:
        self._operations = operations
        self._operation = operation
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        try:
            async with (
                until_disconnect(scope, receive),
                self._operations.followed(self._operation),
            ):
                await (self._send_lines(send) if self._stream else self._send_last(send))
        except ClientLeft:
            return

    def _headers(self, content_type: bytes) -> list[tuple[bytes, bytes]]:
        named = (b"x-ollama-coordinator-operation", self._operation.id.encode())
        return [(b"content-type", content_type), named, *([UNBUFFERED] if self._stream else [])]

    async def _send_lines(self, send: Send) -> None:
        """Line by line; a failure before the first line is still a status."""
        feed = self._operation.feed
        await feed.began()
        if not feed.last and self._operation.error is not None:
            await _send_error(send, self._operation.error)
            return
        await send({"type": "http.response.start", "status": 200, "headers": self._headers(NDJSON)})
        async for lines in feed.follow():
            await send({"type": "http.response.body", "body": lines, "more_body": True})
        error = self._operation.error
        last = b"" if error is None else error_line(error)
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _send_last(self, send: Send) -> None:
        await self._operation.feed.over()
        if self._operation.error is not None:
            await _send_error(send, self._operation.error)
            return
        last = self._operation.feed.last.rstrip() or msgspec.json.encode({"status": "success"})
        await send_whole(send, 200, self._headers(b"application/json"), last)


async def _send_error(send: Send, error: OllamaCoordinatorError) -> None:
    """As Ollama: it names no charset on these routes, but where it could not read the body."""
    kind = None if str(error).startswith("json: ") else "application/json"
    await send_error(send, Dialect.NATIVE, error, kind=kind)


def error_line(error: OllamaCoordinatorError) -> bytes:
    """The line that ends a progress stream that failed."""
    return error_body(Dialect.NATIVE, 500, str(error)) + b"\n"
