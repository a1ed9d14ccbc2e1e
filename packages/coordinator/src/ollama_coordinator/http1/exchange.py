"""One request and its answer, as ASGI has it: a scope, `receive` and `send`."""

import asyncio
import contextlib
from collections.abc import Callable
from urllib.parse import unquote

from starlette.types import Message, Scope

from .framing import CONTINUE, Ends, Framing, Refusal
from .incoming import PLENTY_BYTES, Incoming
from .line import Line


class Exchange:
    """One request that the application serves; `read_on` tells that there is room for its body."""

    __slots__ = ("_framing", "_line", "_read_on", "_start", "_told", "ended", "incoming")

    def __init__(self, incoming: Incoming, line: Line, read_on: Callable[[], None]) -> None:
        self.incoming = incoming
        self.ended = False
        self._line = line
        self._read_on = read_on
        self._told = False
        self._start: Message | None = None
        self._framing: Framing | None = None

    @property
    def looks_whole(self) -> bool:
        """Whether a client cannot see that its answer is not: it was to end with the connection."""
        framing = self._framing
        return not self.ended and framing is not None and framing.ends is Ends.BY_CLOSE

    @property
    def keeps_connection(self) -> bool:
        """Whether another request may follow."""
        closes = self._framing is None or self._framing.closes
        return self.ended and self.incoming.complete and not closes

    def scope(self, connection: Scope) -> Scope:
        """What the application learns of the request; `connection` is what all have in common."""
        incoming = self.incoming
        path, query = _target_parts(incoming.target)
        return {
            **connection,
            "http_version": incoming.version,
            "method": incoming.method,
            "path": unquote(path.decode("ascii")),
            "raw_path": path,
            "query_string": query,
            "headers": incoming.headers,
            "state": connection["state"].copy(),
            "extensions": {},
        }

    # ── the request ───────────────────────────────────────────────────────────────────────────

    async def receive(self) -> Message:
        """The next piece of the body; once it is told, the client's departure."""
        incoming = self.incoming
        while not self.ended:
            if not self._told and (incoming.complete or (incoming.held and not incoming.gone)):
                return self._piece()
            if incoming.gone:
                break
            self._encourage()
            incoming.news.clear()
            await incoming.news.wait()
        return {"type": "http.disconnect"}

    def _piece(self) -> Message:
        was_full = self.incoming.held >= PLENTY_BYTES
        body = self.incoming.take()
        self._told = self.incoming.complete
        if was_full:
            self._read_on()
        return {"type": "http.request", "body": body, "more_body": not self._told}

    def _encourage(self) -> None:
        """A client that asks first sends its body now that somebody wants it."""
        if self.incoming.expects_continue and not self._told and self._framing is None:
            self.incoming.expects_continue = False
            self._line.write(CONTINUE)

    # ── the answer ────────────────────────────────────────────────────────────────────────────

    async def send(self, message: Message) -> None:
        """A part of the answer; waits while the client does not read, but not for the last one.

        Raises:
            RuntimeError: this message is not due.
            ValueError: it breaks HTTP's rules.
        """
        begun = self._start is not None or self._framing is not None
        if message["type"] == "http.response.body" and begun:
            more = message.get("more_body", False)
            self._body(message.get("body", b""), last=not more)
            if more and self._line.choked:
                await self._line.flowing()
        elif message["type"] == "http.response.start" and not begun:
            self._start = message
            # Its first piece of body goes with it, unless that is not to hand already.
            asyncio.get_running_loop().call_soon(self._send_head)
        else:
            raise RuntimeError(f"'{message['type']}' is not due in this answer")

    def _body(self, data: bytes, *, last: bool) -> None:
        if self.ended:
            return
        framing, head = self._framing, b""
        if framing is None:
            framing = self._frame(len(data) if last else None)
            head = framing.head
        piece = framing.piece(data, last=last)
        self.ended = last
        if head or piece:
            self._line.write(head + piece if head else piece)

    def _frame(self, whole: int | None) -> Framing:
        if self._start is None:
            raise RuntimeError("there is no answer")
        incoming = self.incoming
        # A body that is not read to its end would be taken for the next request.
        closes = self._line.ending or not (incoming.keep_alive and incoming.complete)
        self._framing = Framing(
            self._start["status"],
            self._start.get("headers", ()),
            method=incoming.method,
            version=incoming.version,
            whole=whole,
            closes=closes,
            common=self._line.common_headers(),
        )
        return self._framing

    def _send_head(self) -> None:
        if self._framing is None and self._start is not None:
            with contextlib.suppress(ValueError):  # raised again to who sends the next message
                self._line.write(self._frame(None).head)

    def finish(self) -> None:
        """The application is done: answer in its place where it did not, wake who still waits."""
        incoming = self.incoming
        if self._framing is None:
            refusal = incoming.refusal
            if refusal is None and not incoming.gone:
                refusal = Refusal(500, "the log has the reason")
            if refusal is not None:
                self._line.write(refusal.answer(self._line.common_headers()))
        self._start = None
        incoming.leave()


def _target_parts(target: bytes) -> tuple[bytes, bytes]:
    """Path and query of a request's target, which may name a scheme and a host before them."""
    if not target.startswith(b"/") and b"://" in target:
        _, slash, rest = target.partition(b"://")[2].partition(b"/")
        target = b"/" + rest if slash else b"/"
    path, _, query = target.partition(b"?")
    return path, query
