"""One request and its response as ASGI has them: a scope, `receive` and `send`."""

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from urllib.parse import unquote

from starlette.types import Message, Scope

from .request import PLENTY_BYTES, IncomingRequest
from .response import CONTINUE, BodyEnd, ClientWriter, Refusal, ResponseFraming, status_line

EXCHANGE = "exchange"
"""The key of a request's `Exchange` in its ASGI scope's state; Hypercorn's own server has none."""


LARGE_BYTES = 256 * 1024
"""A larger piece of an answer is sent in slices of so many bytes."""


class Exchange:
    """One request that the application serves.

    `read_on` is called when there is room again for more of the body. `ended`: the response is
    whole, as far as this side is concerned. `handed_over`: HTTP is over on this connection.
    """

    __slots__ = (
        *("_body_delivered", "_framing", "_read_on", "_start", "_writer"),
        *("ended", "handed_over", "request"),
    )

    def __init__(
        self, request: IncomingRequest, writer: ClientWriter, read_on: Callable[[], None]
    ) -> None:
        self.request = request
        self.ended = False
        self.handed_over = False
        self._writer = writer
        self._read_on = read_on
        self._body_delivered = False
        self._start: Message | None = None
        self._framing: ResponseFraming | None = None

    @property
    def looks_whole(self) -> bool:
        """Whether a broken-off response looks whole: its body was to end with the connection."""
        framing = self._framing
        return not self.ended and framing is not None and framing.end is BodyEnd.BY_CLOSE

    @property
    def keeps_connection(self) -> bool:
        """Whether another request may follow."""
        closes = self._framing is None or self._framing.closes
        return self.ended and not closes

    def scope(self, connection: Scope) -> Scope:
        """The request's ASGI scope; `connection` has what all of the connection's share."""
        request = self.request
        path, query = _path_and_query(request.target)
        return {
            **connection,
            "http_version": request.version,
            "method": request.method,
            "path": unquote(path.decode("ascii")),
            "raw_path": path,
            "query_string": query,
            "headers": request.headers,
            "state": {**connection["state"], EXCHANGE: self},
            "extensions": {},
        }

    # ── the request ───────────────────────────────────────────────────────────────────────────

    def on_disconnect(self, callback: Callable[[], None] | None) -> None:
        """Call this when the client leaves, in place of a `receive` that waits; `None`: do not."""
        self.request.on_early_end = callback
        if callback is not None and self.request.ended_early:
            callback()

    async def receive(self) -> Message:
        """The next piece of the body; after the last one, the client's disconnect."""
        request = self.request
        while not self.ended:
            has_piece = request.complete or (request.waiting_bytes and not request.ended_early)
            if has_piece and not self._body_delivered:
                return self._piece()
            if request.ended_early:
                break
            self._answer_expect()
            request.changed.clear()
            await request.changed.wait()
        return {"type": "http.disconnect"}

    def _piece(self) -> Message:
        was_full = self.request.waiting_bytes >= PLENTY_BYTES
        body = self.request.take()
        self._body_delivered = self.request.complete
        if was_full:
            self._read_on()
        return {"type": "http.request", "body": body, "more_body": not self._body_delivered}

    def _answer_expect(self) -> None:
        """Ask for the body of a client that waits to be asked (RFC 9110 section 10.1.1)."""
        if self.request.expects_continue and not self._body_delivered and self._framing is None:
            self.request.expects_continue = False
            self._writer.write(CONTINUE)

    # ── the response ──────────────────────────────────────────────────────────────────────────

    async def send(self, message: Message) -> None:
        """Send a part of the response; while the client does not read, all but the last one wait.

        Raises:
            RuntimeError: this message is not due.
            ValueError: it breaks HTTP's rules.
        """
        begun = self._start is not None or self._framing is not None
        if message["type"] == "http.response.body" and begun:
            more, data = message.get("more_body", False), message.get("body", b"")
            if len(data) > LARGE_BYTES:
                data = await self._write_beginning(data, last=not more)
            if not self.ended:
                self._write_body(data, last=not more)
            if more and self._writer.paused:
                await self._writer.resumed()
        elif message["type"] == "http.response.start" and not begun:
            self._start = message
            if self.request.refusal is not None:
                self._refuse(self.request.refusal)  # whatever the application makes of its body
                return
            # The head goes out with the first piece of body, if that follows at once.
            asyncio.get_running_loop().call_soon(self._write_head)
        else:
            raise RuntimeError(f"'{message['type']}' is not due in this answer")

    def _refuse(self, refusal: Refusal) -> None:
        self._writer.write(refusal.response(self._writer.common.lines()))
        self.ended = True

    async def _write_beginning(self, data: bytes, *, last: bool) -> bytes:
        """Send all but the end of a large piece, slice by slice; returns that end.

        Each copy of tens of megabytes would hold up the others.
        """
        if self._framing is None and not self.ended:
            self._writer.write(self._frame(len(data) if last else None).head)
        at = 0
        while len(data) - at > LARGE_BYTES and not self.ended:
            self._write_body(data[at : at + LARGE_BYTES], last=False)
            at += LARGE_BYTES
            if self._writer.paused:
                await self._writer.resumed()
        return data[at:]

    def _write_body(self, data: bytes, *, last: bool) -> None:
        framing, head = self._framing, b""
        if framing is None:
            framing = self._frame(len(data) if last else None)
            head = framing.head
        piece = framing.piece(data, last=last)
        self.ended = last
        if head or piece:
            self._writer.write(head + piece if head else piece)

    def _frame(self, whole_bytes: int | None) -> ResponseFraming:
        if self._start is None:
            raise RuntimeError("there is no answer")
        request = self.request
        closes = self._writer.last_response or not request.can_be_followed()
        self._framing = ResponseFraming(
            self._start["status"],
            self._start.get("headers", ()),
            method=request.method,
            version=request.version,
            whole_bytes=whole_bytes,
            closes=closes,
            common=self._writer.common.lines(),
        )
        return self._framing

    def _write_head(self) -> None:
        if self._framing is None and self._start is not None:
            with contextlib.suppress(ValueError):  # raised again by the next call of `send`
                self._writer.write(self._frame(None).head)

    def hand_over(self, headers: Iterable[tuple[bytes, bytes]]) -> asyncio.Transport:
        """Answer 101, and leave the connection to a protocol of the caller's.

        It is closed when the application returns.
        """
        lines = b"".join(b"%b: %b\r\n" % pair for pair in headers)
        self._writer.write(b"%b%b\r\n" % (status_line(101), lines))
        self.ended = self.handed_over = True
        return self._writer.transport

    def finish(self) -> None:
        """The application has returned: respond where it did not; end a pending `receive`."""
        request = self.request
        if self._framing is None and not self.ended:
            refusal = request.refusal
            if refusal is None and not request.ended_early:
                refusal = Refusal(500, "the log has the reason")
            if refusal is not None:
                self._refuse(refusal)
        self._start = None
        request.end_early()
        request.discard()


def _path_and_query(target: bytes) -> tuple[bytes, bytes]:
    """The parts of a request's target; its absolute form (RFC 9112 section 3.2.2) has a host."""
    path, _, query = target.partition(b"?")
    if not path.startswith(b"/") and b"://" in path:
        path = b"/" + path.partition(b"://")[2].partition(b"/")[2]
    return path, query
