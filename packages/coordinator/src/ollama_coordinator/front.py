"""A coordinator towards its clients where several share a database: it serves, or passes on.

The one that leads serves. The others pass each request on to it over its ordinary port, with a
header that only coordinators of this database know, and the client's address in it. While nobody
leads, requests wait.
"""

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from hashlib import sha256
from secrets import compare_digest
from typing import cast
from urllib.parse import urlsplit

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from yarl import URL

from ollama_coordinator_common.error import OllamaCoordinatorError
from ollama_coordinator_common.pump import Pipe

from .aio import Interrupt, beside, first_of
from .api.http.body_timeout import BodyRoom, BodyTimeout, memory_share, until_disconnect
from .api.http.cors import Cors
from .api.http.dialects import INFERENCE_ROUTES, dialect_of, error_record
from .api.http.errors import ClientLeft, HttpError, send_error, send_whole
from .api.http.headers import HOP_BY_HOP, as_text, first
from .api.http.routing import NO_HTTP1
from .api.inference.relay import CARRIER, STREAMED
from .api.inference.request import read_body
from .carry import CARRIES, CONTENT_TYPE, Carried, FrontAttempts, FrontCarrier
from .clock import Clock
from .cluster import Cluster, Coordinator
from .http1 import CLIENT_CONNECTION, EXCHANGE, ClientConnection, Exchange
from .settings import Settings
from .upstream import (
    VIA_HEADER,
    NotConnected,
    Unreachable,
    UpstreamError,
    Upstreams,
    chunks,
    passed,
)

log = logging.getLogger(__name__)

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")

FRONT = b"x-ollama-coordinator-front"
"""In a request that a coordinator passes on: the secret, and its client's address and port."""

FOLLOWS = b"x-ollama-coordinator-follows"
"""In the answer of a coordinator that was taken for the leader, and is not."""

PATIENCE_SECONDS = 10.0
"""How long a request waits for a leader: three times as long as it takes to find another one."""

AGAIN_SECONDS = 0.1
"""Until a leader that took no connection is asked again."""

ANSWER_SECONDS = 0.5
"""For a leader to say that it leads; one that is frozen does not."""

REPORTS = "/api/coordinators/reports"
"""Where a leader takes the reports of fronts; it is no route of the API."""

REPORT_SECONDS, REPORT_BYTES = 3.0, 64 * 1024 * 1024

HEALTH = ("/healthz", "/readyz")
"""Asked often, by those who have another coordinator to go to."""

NOBODY_LEADS = "none of the coordinators leads now; please try again"

LOST = "the coordinator that leads was lost while it served the request; please try again"

NOT_PASSED = HOP_BY_HOP | {FRONT, CARRIES, VIA_HEADER.lower().encode(), b"expect"}
NOT_PASSED_BACK = HOP_BY_HOP | {b"date", b"server"}

_INFERENCE = {route.path: route for route in INFERENCE_ROUTES}


class LeaderReplaced(OllamaCoordinatorError):
    """Another coordinator leads in the place of the one that was asked."""


class Front:
    """The ASGI application of a coordinator that shares its database.

    `own` serves as long as this coordinator leads. `stopping`: it is not ready any more.
    """

    def __init__(
        self, cluster: Cluster, upstreams: Upstreams, settings: Settings, clock: Clock
    ) -> None:
        self.own: ASGIApp | None = None
        self.stopping = False
        self._cluster = cluster
        self._upstreams = upstreams
        self._clock = clock
        self._leads = asyncio.Event()
        self._under_way: dict[Interrupt, Coordinator] = {}
        self._settings = settings
        room = BodyRoom(memory_share() // settings.config.workers, clock)
        self._passing = BodyTimeout(self._pass, settings, room, clock)
        self._cors = Cors(self._passing, settings.config.origins)
        self._attempts = FrontAttempts(upstreams, clock, self._report)

    def lead(self, own: ASGIApp | None) -> None:
        """Serve by `own` from now on; with `None`, pass requests on."""
        self.own = own
        (self._leads.set if own is not None else self._leads.clear)()

    async def run(self) -> None:
        """Take what was passed on to a leader back when another one leads in its place.

        Not from one that gave way, which ends its answers.
        """
        async with beside(self._attempts.run()):
            await self._watch()

    async def _watch(self) -> None:
        while True:
            await self._cluster.changed()
            leader = self._cluster.leader
            for interrupt, asked in list(self._under_way.items()):
                is_replaced = leader is not None and asked.id != leader.id
                if is_replaced and not self._cluster.gave_way(asked):
                    interrupt.fire(LeaderReplaced("another coordinator leads now"))

    async def still_leads(self, url: str) -> bool:
        """Whether the coordinator at a URL answers, and leads."""
        secret = [("X-Ollama-Coordinator-Front", self._cluster.secret)]
        health = self._upstreams.open(
            "GET",
            f"{url}/healthz",
            headers=secret,
            certificate=self._cluster.certificate_at(url),
        )
        try:
            async with self._clock.timeout(ANSWER_SECONDS), health as answer:
                return answer.status == 200
        except (UpstreamError, TimeoutError):
            return False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if self.own is not None:
            await self.own(scope, receive, send)
        elif scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "http":
            await self._passing(scope, receive, send)
        else:
            raise RuntimeError(NO_HTTP1)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        token = passed.set(first(scope["headers"], VIA_HEADER.lower().encode()) or "")
        try:
            if self.stopping and scope["path"] == "/readyz":
                raise HttpError(503, "this coordinator is stopping")
            if first(scope["headers"], FRONT) is not None:
                await _follows(send)
            elif (first(scope["headers"], b"upgrade") or "").lower() == "websocket":
                await self._pass_link_on(scope)
            else:
                await self._pass_on(scope, receive, send)
        except ClientLeft:
            return
        except OllamaCoordinatorError as error:
            await send_error(send, dialect_of(scope["path"]), error)
        finally:
            passed.reset(token)

    # ── one request ───────────────────────────────────────────────────────────────────────────

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on; once more where the leader has not begun with it.

        Raises:
            HttpError: there is no leader.
        """
        if scope["path"] in _INFERENCE and scope["method"] == "POST":
            limit = self._settings.config.max_body_bytes
            whole = await read_body(receive, limit, dict(scope["headers"]))
            body: Message = {"type": "http.request", "body": whole, "more_body": False}
        else:
            body = await receive()
        if body["type"] == "http.disconnect":
            raise ClientLeft
        loop = asyncio.get_running_loop()
        until = loop.time() + (0 if scope["path"] in HEALTH else PATIENCE_SECONDS)
        while True:
            leader = await self._leader(until)
            if self.own is not None:
                await self.own(scope, _replayed(body, receive), send)
                return
            try:
                if await self._passed_on(leader, scope, body, receive, send):
                    return
            except NotConnected as exc:
                extra = {"url": leader.url, "reason": str(exc)}
                log.debug("the leader takes no connection", extra=extra)
            if loop.time() > until or body.get("more_body"):
                raise HttpError(503, NOBODY_LEADS)
            await asyncio.sleep(AGAIN_SECONDS)

    async def _leader(self, until: float) -> Coordinator:
        """Who leads; it may be this coordinator itself, then `own` is there.

        Raises:
            HttpError: nobody does until then, in seconds of the event loop.
        """
        try:
            async with asyncio.timeout_at(until):
                while True:
                    leader = self._cluster.leader
                    if leader is not None and (self.own or leader.id != self._cluster.id):
                        return leader
                    await first_of(self._leads.wait(), self._cluster.changed())
        except TimeoutError as exc:
            raise HttpError(503, NOBODY_LEADS) from exc

    async def _passed_on(
        self, leader: Coordinator, scope: Scope, body: Message, receive: Receive, send: Send
    ) -> bool:
        """Whether a leader has taken the request; it may have become no leader any more.

        Raises:
            NotConnected: it took no connection.
        """
        has_more = body.get("more_body", False)
        kept: list[tuple[bytes, bytes]] | None = None
        part = b""
        opened = self._upstreams.open(
            scope["method"],
            URL(leader.url + _target(scope), encoded=True),
            headers=self._headers(scope, has_more=has_more),
            body=body.get("body", b""),
            stream=_parts(body, receive) if has_more else None,
            certificate=self._cluster.certificate_at(leader.url),
        )
        try:
            async with (
                _while_connected(scope, receive, is_whole=not has_more),
                self._while_leading(leader) as asking,
                opened as answer,
            ):
                headers = [(name.lower(), value) for name, value in answer.raw_headers]
                if first(headers, FOLLOWS) is not None:
                    return False
                if (b"content-type", CONTENT_TYPE) in headers:
                    whole = body["body"]
                    client = self._cors.adding(scope, send)
                    del self._under_way[asking]  # an attempt goes on without its leader
                    reading = self._while_leading(leader)
                    return await self._attempts.answer(
                        leader.url, chunks(answer), reading, whole, client
                    )
                kept = [pair for pair in headers if pair[0] not in NOT_PASSED_BACK]
                await send(
                    {"type": "http.response.start", "status": answer.status, "headers": kept}
                )
                async for part in chunks(answer):
                    await send({"type": "http.response.body", "body": part, "more_body": True})
        except NotConnected:
            raise
        except (UpstreamError, LeaderReplaced) as exc:
            log.warning("leader lost", extra={"url": leader.url, "reason": str(exc)})
            if kept is None and not has_more and _is_repeatable(scope):
                return False
            if kept is None:
                raise HttpError(503, LOST) from exc
            await _break_off(scope, send, kept, part)
            return True
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return True

    def _headers(self, scope: Scope, *, has_more: bool) -> list[tuple[str, str]]:
        """Those of a request as it is passed on; the length is another's to say of a whole body."""
        sent = [("X-Ollama-Coordinator-Front", self._credentials(scope))]
        sent += [
            (name.decode("latin-1"), as_text(value))
            for name, value in scope["headers"]
            if name not in NOT_PASSED and (name != b"content-length" or has_more)
        ]
        if scope["path"] in _INFERENCE:
            sent.append((CARRIES.decode(), "1"))
        return sent

    @asynccontextmanager
    async def _while_leading(self, leader: Coordinator) -> AsyncIterator[Interrupt]:
        """A block that ends with `LeaderReplaced` when another coordinator leads in the place of
        one that did not give way: it is dead, frozen or cut off.
        """
        interrupt = Interrupt()
        self._under_way[interrupt] = leader
        try:
            async with interrupt:
                yield interrupt
        finally:
            self._under_way.pop(interrupt, None)

    async def _report(self, leader: str, reports: bytes) -> None:
        """Tell a leader of the attempts that it has ordered.

        Raises:
            UpstreamError: it did not take that.
        """
        secret = [("X-Ollama-Coordinator-Front", self._cluster.secret)]
        posted = self._upstreams.open(
            "POST",
            leader + REPORTS,
            headers=secret,
            body=reports,
            certificate=self._cluster.certificate_at(leader),
        )
        try:
            async with self._clock.timeout(REPORT_SECONDS), posted as answer:
                if answer.status != 204:
                    raise Unreachable(f"answers {answer.status}")
        except TimeoutError as exc:
            raise Unreachable(f"no answer within {REPORT_SECONDS:g} s") from exc

    def _credentials(self, scope: Scope) -> str:
        address, port = scope["client"] or ("", 0)
        return f"{self._cluster.secret} {address} {port}"

    # ── one connection of a link ──────────────────────────────────────────────────────────────

    async def _pass_link_on(self, scope: Scope) -> None:
        """Join the connection with one to the leader, until both have ended.

        Raises:
            HttpError: there is no leader, or it does not take the connection.
        """
        exchange: Exchange | None = scope["state"].get(EXCHANGE)
        client: ClientConnection | None = scope["state"].get(CLIENT_CONNECTION)
        if exchange is None or client is None:
            raise HttpError(501, NO_HTTP1)
        leader = await self._leader(asyncio.get_running_loop().time() + PATIENCE_SECONDS)
        if self.own is not None:
            raise HttpError(503, NOBODY_LEADS)  # it comes again at once
        where = urlsplit(leader.url)
        head = [f"GET {_target(scope)} HTTP/1.1".encode()]
        given = ((FRONT, self._credentials(scope).encode()), *scope["headers"])
        head += [b"%b: %b" % pair for pair in given if pair[0] != FRONT or pair is given[0]]
        far, near = Pipe(), Pipe()
        try:
            reader, writer = await asyncio.open_connection(
                where.hostname, where.port, ssl=_unverified() if where.scheme == "https" else None
            )
            _check(writer, self._cluster.certificate_at(leader.url))
        except OSError as exc:
            raise HttpError(503, NOBODY_LEADS) from exc
        try:
            writer.write(b"\r\n".join([*head, b"", b""]))
            status, answered = await _head_of_answer(reader)
            if status != 101:
                length = int(first(answered, b"content-length") or 0)
                text = (await reader.readexactly(min(length, 4096))).decode("utf-8", "replace")
                raise HttpError(status, _error_in(text))
            client.of_link = True
            _take_over(exchange.hand_over(answered), near)
            _take_over(cast(asyncio.Transport, writer.transport), far)
            reader.feed_eof()
            near.send(await reader.read())
            far.join(near)
            await near.ended.wait()
            await far.ended.wait()
        except (OSError, EOFError, asyncio.LimitOverrunError) as exc:
            raise HttpError(503, NOBODY_LEADS) from exc
        finally:
            near.reset()
            far.reset()
            writer.transport.abort()


async def _lifespan(receive: Receive, send: Send) -> None:
    """Tell the server that there is nothing to start and to end here."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def _follows(send: Send) -> None:
    """Tell another coordinator that this one does not lead."""
    await send({"type": "http.response.start", "status": 503, "headers": [(FOLLOWS, b"1")]})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _is_repeatable(scope: Scope) -> bool:
    """Whether a request changes nothing, or is one for inference: its agent stops with the leader
    that was lost, as it does when a client leaves.
    """
    return scope["method"] in SAFE_METHODS or scope["path"] in _INFERENCE


def _target(scope: Scope) -> str:
    query = scope["query_string"].decode("latin-1")
    path: str = scope["raw_path"].decode("latin-1")
    return f"{path}?{query}" if query else path


def _replayed(first_part: Message, receive: Receive) -> Receive:
    """The messages of a request of which one was taken already."""
    taken: list[Message] = [first_part]

    async def replayed() -> Message:
        return taken.pop() if taken else await receive()

    return replayed


async def _parts(first_part: Message, receive: Receive) -> AsyncIterator[bytes]:
    """A body as it comes.

    Raises:
        ClientLeft: it broke off.
    """
    part = first_part
    while True:
        if part["type"] == "http.disconnect":
            raise ClientLeft
        yield part.get("body", b"")
        if not part.get("more_body"):
            return
        part = await receive()


def _while_connected(
    scope: Scope, receive: Receive, *, is_whole: bool
) -> AbstractAsyncContextManager[None]:
    """A block that ends when the client leaves; Hypercorn's server tells it after the body only."""
    sees = is_whole or EXCHANGE in scope["state"]
    return until_disconnect(scope, receive) if sees else nullcontext()


async def _break_off(
    scope: Scope, send: Send, headers: list[tuple[bytes, bytes]], last: bytes
) -> None:
    """End an answer that has begun, of which `last` came last.

    A stream of whole records ends with one that is an error; everything else ends unfinished, and
    the server then closes the connection.
    """
    route = _INFERENCE.get(scope["path"])
    kind = (first(headers, b"content-type") or "").partition(";")[0]
    if route is not None and kind in STREAMED and last.endswith(route.dialect.separator):
        record = error_record(route, LOST)
        await send({"type": "http.response.body", "body": record, "more_body": False})


# ── one connection of a link ──────────────────────────────────────────────────────────────────


def _unverified() -> ssl.SSLContext:
    """No authority vouches for a coordinator's certificate, which the database names."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _check(writer: asyncio.StreamWriter, certificate: bytes | None) -> None:
    """Send nothing to whoever shows another certificate.

    Raises:
        OSError: it is another one.
    """
    connection = writer.get_extra_info("ssl_object")
    if connection is None:
        return
    shown = connection.getpeercert(binary_form=True) or b""
    if certificate is None or sha256(shown).digest() != certificate:
        writer.transport.abort()
        raise OSError("the leader shows another certificate than the database names")


def _take_over(transport: asyncio.Transport, pipe: Pipe) -> None:
    transport.set_protocol(pipe)
    pipe.connection_made(transport)


async def _head_of_answer(reader: asyncio.StreamReader) -> tuple[int, list[tuple[bytes, bytes]]]:
    """Status and headers of a coordinator's answer."""
    first_line, *lines = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")[:-2]
    pairs = (line.partition(b":") for line in lines)
    return int(first_line.split()[1]), [(name.lower(), value.strip()) for name, _, value in pairs]


def _error_in(text: str) -> str:
    try:
        return str(msgspec.json.decode(text, type=dict[str, str])["error"])
    except (msgspec.DecodeError, KeyError):
        return text


# ── at the leader ─────────────────────────────────────────────────────────────────────────────


class Fronted:
    """ASGI middleware of the leader: what another coordinator passes on comes from its client.

    Fronts carry out the attempts at what they pass on, and report on them.
    """

    def __init__(self, app: ASGIApp, cluster: Cluster, carried: Carried) -> None:
        self._app = app
        self._cluster = cluster
        self._carried = carried

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Serve one request; no coroutine of its own, which each step of an answer would pass."""
        given = first(scope["headers"], FRONT) if scope["type"] == "http" else None
        return (
            self._app(scope, receive, send)
            if given is None
            else self._fronted(scope, receive, send, given)
        )

    async def _fronted(self, scope: Scope, receive: Receive, send: Send, given: str) -> None:
        secret, _, client = given.partition(" ")
        address, _, port = client.partition(" ")
        headers = [pair for pair in scope["headers"] if pair[0] not in (FRONT, CARRIES)]
        carries = len(headers) < len(scope["headers"]) - 1
        scope, known = {**scope, "headers": headers}, self._cluster.secret
        if not known or not compare_digest(secret.encode(), known.encode()):
            await self._app(scope, receive, send)
        elif scope["path"] == REPORTS:
            await self._take_reports(receive, send)
        elif not port.isdigit():
            await self._app(scope, receive, send)
        else:
            scope["client"] = (address, int(port))
            if not carries:
                await self._app(scope, receive, send)
                return
            carrier = FrontCarrier(self._carried, send)
            scope[CARRIER] = carrier
            await self._app(scope, receive, carrier.send)
            await carrier.finish()

    async def _take_reports(self, receive: Receive, send: Send) -> None:
        body = await read_body(receive, REPORT_BYTES, {})
        try:
            self._carried.take(bytes(body))
        except (msgspec.DecodeError, ValueError) as exc:
            log.warning("a front reports what cannot be read", extra={"reason": str(exc)})
        await send_whole(send, 204, [], b"")
