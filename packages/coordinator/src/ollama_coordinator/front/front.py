"""A coordinator towards its clients where several share a database: it serves, or passes on.

The one that leads serves. The others pass each request on to it over its ordinary port, with a
header that only coordinators of this database know, and the client's address in it. While nobody
leads, requests wait.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    nullcontext,
    suppress,
)

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from yarl import URL

from ollama_coordinator.aio import Interrupt, beside, first_of
from ollama_coordinator.api.http.body_timeout import BodyTimeout, until_disconnect
from ollama_coordinator.api.http.cors import Cors
from ollama_coordinator.api.http.dialects import INFERENCE_ROUTES, dialect_of, error_record
from ollama_coordinator.api.http.errors import ClientLeft, HttpError, send_error
from ollama_coordinator.api.http.headers import HOP_BY_HOP, as_text, first
from ollama_coordinator.api.http.json_edit import Body
from ollama_coordinator.api.http.routing import NO_HTTP1
from ollama_coordinator.api.inference.relay import STREAMED
from ollama_coordinator.api.inference.request import WAITED, read_body
from ollama_coordinator.carry import (
    CARRIES,
    CONTENT_TYPE,
    FOLLOWS,
    FRONT,
    HELLO,
    REPORTS,
    WIRE,
    FrontAttempts,
    Grant,
    Hello,
    Takeover,
    carries,
    encoded,
    follows,
)
from ollama_coordinator.clock import Clock
from ollama_coordinator.cluster import Cluster, Coordinator
from ollama_coordinator.dispatch import Held
from ollama_coordinator.http1 import EXCHANGE
from ollama_coordinator.memory import BodyRoom, memory_share
from ollama_coordinator.settings import Settings
from ollama_coordinator.upstream import (
    SMALL_ANSWER_BYTES,
    VIA_HEADER,
    NotConnected,
    Unreachable,
    UpstreamError,
    Upstreams,
    chunks,
    passed,
    whole,
)
from ollama_coordinator_common.error import OllamaCoordinatorError

from .coordinator_queries import ANSWER_SECONDS, CoordinatorQueries
from .link import NOBODY_LEADS, is_link, pass_link_on, target

log = logging.getLogger(__name__)

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")

HERE = ""
"""In place of the URL of a leader that is this coordinator."""

PATIENCE_SECONDS = 10.0
"""How long a request waits for a leader: three times as long as it takes to find another one."""

AGAIN_SECONDS = 0.1
"""Until a leader that took no connection is asked again."""

REPORT_SECONDS = 3.0
"""For a leader to take reports, or a hello."""

HEALTH = ("/healthz", "/readyz")
"""Asked often, by those who have another coordinator to go to."""

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
        self._takeover: Takeover | None = None
        self.stopping = False
        self._cluster = cluster
        self._upstreams = upstreams
        self._clock = clock
        self._leads = asyncio.Event()
        self._followed = asyncio.Event()
        self._knows = 0
        self._known = asyncio.Event()
        self._inferring: set[object] = set()
        self._counted: set[object] = set()
        self._under_way: dict[Interrupt, Coordinator] = {}
        self._settings = settings
        room = BodyRoom(memory_share() // settings.config.workers, clock)
        self._passing = BodyTimeout(self._pass, settings, room, clock)
        self._cors = Cors(self._passing, settings.config.origins)
        self._attempts = FrontAttempts(upstreams, clock, self._report)
        self.queries = CoordinatorQueries(cluster, upstreams, clock)
        self._ask = self.queries.ask

    def lead(self, own: ASGIApp, takeover: Takeover) -> None:
        """Serve by `own` from now on, which takes over what is carried out here."""
        self.own, self._takeover = own, takeover
        hello = self._attempts.hello(self._cluster.id, 0, HERE, self._cluster.epoch())
        takeover.take(hello, self._attempts.tell)
        self._attempts.heard(hello)
        self._leads.set()

    def pause(self, own: ASGIApp | None) -> None:
        """Serve nothing while another coordinator may lead, and by `own` when none may."""
        self.own = own
        if own is None:
            self._leads.clear()
        else:
            self._leads.set()

    def follow(self, left: Iterable[tuple[int, Held, Grant]] = ()) -> None:
        """Pass requests on from now on, and speak for attempts that still run here."""
        self.own = self._takeover = None
        self._leads.clear()
        self._attempts.keep(left)
        self._followed.set()
        self._followed = asyncio.Event()

    async def run(self) -> None:
        """Tell each new leader what is carried out here, and pass on to it what the one before it
        had not begun.

        Not what is with one that gave way, which hands over by itself.
        """
        async with beside(self._attempts.run(), self._greet()):
            await self._watch()

    async def settle(self) -> None:
        """Have every end of what was carried out here reported."""
        await self._attempts.settle()

    async def _watch(self) -> None:
        while True:
            await self._cluster.changed()
            leader = self._cluster.leader
            for interrupt, asked in list(self._under_way.items()):
                is_replaced = leader is not None and asked.id != leader.id
                if is_replaced and not self._cluster.gave_way(asked):
                    interrupt.fire(LeaderReplaced("another coordinator leads now"))

    # ── a new leader ──────────────────────────────────────────────────────────────────────────

    async def _greet(self) -> None:
        while True:
            leader = self._cluster.leader
            if leader is None or leader.id == self._cluster.id or self.own is not None:
                await first_of(self._cluster.changed(), self._followed.wait())
            else:
                await first_of(self._cluster.changed(), self._say_hello(leader))

    async def _say_hello(self, leader: Coordinator) -> None:
        """Tell a leader what is carried out here, until it is over, and the next one leads."""
        while True:
            try:
                is_heard = await self._heard_hello(leader)
            except UpstreamError as exc:
                is_heard = False
                log.debug("no hello", extra={"url": leader.url, "reason": str(exc)})
            if is_heard and not self._attempts.carries_of_others(leader.epoch):
                await self._cluster.changed()
            await asyncio.sleep(AGAIN_SECONDS)

    async def takes_over(self) -> bool:
        """Whether the coordinator that leads now hears hellos: its version may be older."""
        leader = self._cluster.leader
        while leader is not None and leader.id != self._cluster.id:
            nothing = encoded(Hello(WIRE, "", 0, []))
            asked = self._ask("POST", leader.url, HELLO, nothing)
            with suppress(UpstreamError, TimeoutError):
                async with self._clock.timeout(REPORT_SECONDS), asked as answer:
                    headers = [(name.lower(), value) for name, value in answer.raw_headers]
                    if first(headers, FOLLOWS) is None:
                        return answer.status == 200
            await asyncio.sleep(AGAIN_SECONDS)
            leader = self._cluster.leader
        return False

    async def _heard_hello(self, leader: Coordinator) -> bool:
        """Whether the leader was told, or does not want to be; it was listened to until the end.

        Raises:
            UpstreamError: it was not told, or is lost.
        """
        self._counted = self._inferring.copy()
        waiting = max(len(self._counted) - len(self._attempts), 0)
        hello = self._attempts.hello(self._cluster.id, waiting, leader.url, leader.epoch)
        told = self._ask("POST", leader.url, HELLO, encoded(hello))
        async with AsyncExitStack() as stack:
            try:
                async with self._clock.timeout(REPORT_SECONDS):
                    answer = await stack.enter_async_context(told)
            except TimeoutError as exc:
                raise Unreachable(f"no answer within {REPORT_SECONDS:g} s") from exc
            headers = [(name.lower(), value) for name, value in answer.raw_headers]
            if first(headers, FOLLOWS) is not None:
                return False
            self._knows = leader.epoch
            self._known.set()
            self._known = asyncio.Event()
            if (
                answer.status != 200
            ):  # it is of another version: requests are passed on all the same
                reason = (await whole(answer, SMALL_ANSWER_BYTES)).decode("utf-8", "replace")
                extra = {"url": leader.url, "version": leader.version, "reason": reason}
                log.warning("the leader takes nothing over", extra=extra)
                await self._cluster.changed()
            self._attempts.heard(hello)
            await self._attempts.listen(chunks(answer))
        return True

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
            async with _answering(scope, send):
                if self.stopping and scope["path"] == "/readyz":
                    raise HttpError(503, "this coordinator is stopping")
                if first(scope["headers"], FRONT) is not None:
                    await follows(send, may_lead=self._cluster.may_lead)
                elif is_link(scope):
                    leader = await self._leader(
                        asyncio.get_running_loop().time() + PATIENCE_SECONDS
                    )
                    if self.own is not None:
                        raise HttpError(503, NOBODY_LEADS)  # it comes again at once
                    certificate = self._cluster.certificate_at(leader.url)
                    where = leader.url, target(scope), self._credentials(scope).encode()
                    await pass_link_on(scope, *where, certificate, self._clock)
                else:
                    await self._pass_on(scope, receive, send)
        finally:
            passed.reset(token)

    # ── one request ───────────────────────────────────────────────────────────────────────────

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on; once more where the leader has not begun with it.

        Raises:
            HttpError: there is no leader.
        """
        loop = asyncio.get_running_loop()
        since = loop.time()
        if scope["path"] in HEALTH:
            try:
                async with self._clock.timeout(ANSWER_SECONDS):
                    await self._pass_body_on(scope, await receive(), receive, send, since, 0)
            except TimeoutError as exc:
                raise HttpError(503, NOBODY_LEADS) from exc
            return
        if scope["path"] not in _INFERENCE or scope["method"] != "POST":
            part = await receive()
            await self._pass_body_on(scope, part, receive, send, since, PATIENCE_SECONDS)
            return
        limit = self._settings.config.max_body_bytes
        whole_body = await read_body(receive, limit, dict(scope["headers"]))
        await self._pass_whole_on(scope, whole_body, receive, send, since)

    async def take_back(
        self, scope: Scope, body: Body, receive: Receive, send: Send, waited_seconds: float
    ) -> None:
        """Pass on what a leader that was here has not begun; it has waited for so long."""
        # Whether its web page may use us is decided, and the headers for it come as before.
        headers = [pair for pair in scope["headers"] if pair[0] != b"origin"]
        since = asyncio.get_running_loop().time() - waited_seconds
        async with _answering(scope, send):
            await self._pass_whole_on({**scope, "headers": headers}, body, receive, send, since)

    async def _pass_whole_on(
        self, scope: Scope, body: Body, receive: Receive, send: Send, since: float
    ) -> None:
        message: Message = {"type": "http.request", "body": body, "more_body": False}
        marker = object()
        self._inferring.add(marker)
        try:
            await self._pass_body_on(scope, message, receive, send, since, PATIENCE_SECONDS, marker)
        finally:
            self._inferring.discard(marker)
            self._counted.discard(marker)

    async def _pass_body_on(
        self,
        scope: Scope,
        body: Message,
        receive: Receive,
        send: Send,
        since: float,
        patience: float,
        marker: object = None,
    ) -> None:
        if body["type"] == "http.disconnect":
            raise ClientLeft
        loop = asyncio.get_running_loop()
        until = loop.time() + patience
        while True:
            leader = await self._leader(until, is_told=marker is not None)
            if self.own is not None:
                scope[WAITED] = loop.time() - since
                await self.own(scope, _replayed(body, receive), send)
                return
            carrying = ""
            if marker is not None:
                is_early = marker in self._counted
                self._counted.discard(marker)
                carrying = carries(loop.time() - since, is_early=is_early)
            try:
                if await self._passed_on(leader, scope, body, receive, send, carrying):
                    return
            except NotConnected as exc:
                extra = {"url": leader.url, "reason": str(exc)}
                log.debug("the leader takes no connection", extra=extra)
            if loop.time() > until or body.get("more_body"):
                raise HttpError(503, NOBODY_LEADS)
            await asyncio.sleep(AGAIN_SECONDS)

    async def _leader(self, until: float, *, is_told: bool = False) -> Coordinator:
        """Who leads; it may be this coordinator itself, then `own` is there.

        `is_told`: it has heard what is carried out here.

        Raises:
            HttpError: nobody does until then, in seconds of the event loop.
        """
        try:
            async with asyncio.timeout_at(until):
                while True:
                    leader = self._cluster.leader
                    is_other = leader is not None and leader.id != self._cluster.id
                    is_known = leader is not None and self._knows == leader.epoch
                    if leader is not None and (
                        self.own or (is_other and (is_known or not is_told))
                    ):
                        return leader
                    await first_of(self._leads.wait(), self._cluster.changed(), self._known.wait())
        except TimeoutError as exc:
            raise HttpError(503, NOBODY_LEADS) from exc

    async def _passed_on(
        self,
        leader: Coordinator,
        scope: Scope,
        body: Message,
        receive: Receive,
        send: Send,
        carrying: str,
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
            URL(leader.url + target(scope), encoded=True),
            headers=self._headers(scope, carrying, has_more=has_more),
            body=body.get("body", b""),
            stream=_parts(body, receive) if has_more else None,
            certificate=self._cluster.certificate_at(leader.url),
        )
        try:
            async with (
                _while_connected(scope, receive, is_whole=not has_more),
                self._while_leading(leader) as asking,
                AsyncExitStack() as stack,
            ):
                answer = await stack.enter_async_context(opened)
                headers = [(name.lower(), value) for name, value in answer.raw_headers]
                if first(headers, FOLLOWS) is not None:
                    return False
                if (b"content-type", CONTENT_TYPE) in headers:
                    whole_body = body["body"]
                    client = self._cors.adding(scope, send)
                    del self._under_way[asking]  # an attempt goes on without its leader
                    reading = self._while_leading(leader)
                    return await self._attempts.answer(
                        leader.url, answer, stack, reading, whole_body, client
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

    def _headers(self, scope: Scope, carrying: str, *, has_more: bool) -> list[tuple[str, str]]:
        """Those of a request as it is passed on; the length is another's to say of a whole body."""
        sent = [("X-Ollama-Coordinator-Front", self._credentials(scope))]
        sent += [
            (name.decode("latin-1"), as_text(value))
            for name, value in scope["headers"]
            if name not in NOT_PASSED and (name != b"content-length" or has_more)
        ]
        if carrying:
            sent.append((CARRIES.decode(), carrying))
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
        if leader == HERE:
            if self._takeover is None:
                raise Unreachable("does not lead any more")
            self._takeover.carried.take(reports)
            return
        posted = self._ask("POST", leader, REPORTS, reports)
        try:
            async with self._clock.timeout(REPORT_SECONDS), posted as answer:
                if answer.status != 204:
                    raise Unreachable(f"answers {answer.status}")
        except TimeoutError as exc:
            raise Unreachable(f"no answer within {REPORT_SECONDS:g} s") from exc

    def _credentials(self, scope: Scope) -> str:
        address, port = scope["client"] or ("", 0)
        return f"{self._cluster.secret} {address} {port}"


@asynccontextmanager
async def _answering(scope: Scope, send: Send) -> AsyncIterator[None]:
    """Answer with the error that ends the block."""
    try:
        yield
    except ClientLeft:
        return
    except OllamaCoordinatorError as error:
        await send_error(send, dialect_of(scope["path"]), error)


async def _lifespan(receive: Receive, send: Send) -> None:
    """Tell the server that there is nothing to start and to end here."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


def _is_repeatable(scope: Scope) -> bool:
    """Whether a request changes nothing, or is one for inference: its agent stops with the leader
    that was lost, as it does when a client leaves.
    """
    return scope["method"] in SAFE_METHODS or scope["path"] in _INFERENCE


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
