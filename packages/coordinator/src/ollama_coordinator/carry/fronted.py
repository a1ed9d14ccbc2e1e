"""At the leader: what another coordinator passes on, as if its client were connected here."""

import asyncio
import logging
from collections.abc import Awaitable
from secrets import compare_digest

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ollama_coordinator.api.http.errors import send_whole
from ollama_coordinator.api.http.headers import first
from ollama_coordinator.api.inference.relay import CARRIER, Failure, Sent
from ollama_coordinator.api.inference.request import WAITED, read_body
from ollama_coordinator.cluster import Cluster
from ollama_coordinator.dispatch import HandedOver, Held

from .leader import Carried, Takeover, settled
from .messages import (
    CARRIES,
    CONTENT_TYPE,
    FOLLOWS,
    FRONT,
    HELLO,
    MAY_LEAD,
    REPORTS,
    AnswerPiece,
    AnswerStart,
    Grant,
    Order,
    Told,
    encoded,
    framed,
    is_understood,
    read_carries,
    shakes_hands,
)

log = logging.getLogger(__name__)

REPORT_BYTES = 64 * 1024 * 1024
"""Of one request of a front to its leader."""


async def follows(send: Send, *, may_lead: bool = False) -> None:
    """Tell another coordinator that this one does not lead; `may_lead`: soon it may."""
    headers = [(FOLLOWS, MAY_LEAD if may_lead else b"1")]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


class FrontCarrier:
    """One request that a front has passed on, with the way back to it; a `Carrier`."""

    def __init__(self, carried: Carried, send: Send, *, shakes_hands: bool) -> None:
        self.shakes_hands = shakes_hands
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
        """Have the front carry out an attempt.

        Raises:
            HandedOver: the next leader goes on with it.
        """
        far = self._carried.begin(self._carried.number(), held, self._tell)
        try:
            await self._tell(Order(far.number, sent, others, again_after, _granted(sent, held)))
            failure = settled(held, await far.ended())
        finally:
            self._carried.forget(far)
        self._is_answered = failure is None
        return failure

    async def finish(self) -> None:
        """The request is over."""
        if self._is_open:
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def hand_over(self) -> None:
        """The front has to pass the request on again, unless it carries an attempt out."""
        if self._is_open:
            await self.finish()
        else:
            await follows(self._send)

    async def _tell(self, told: Told) -> None:
        async with self._ordering:
            if not self._is_open:
                self._is_open = True
                headers = [(b"content-type", CONTENT_TYPE)]
                await self._send({"type": "http.response.start", "status": 200, "headers": headers})
            await self._send(
                {"type": "http.response.body", "body": framed(told), "more_body": True}
            )


def _granted(sent: Sent, held: Held) -> bytes:
    lease, route = held.lease, sent.route
    waited = lease.granted_at - lease.request.arrived_at
    return encoded(Grant(lease.request, route, lease.agent_id, waited))


class Fronted:
    """ASGI middleware of the leader: what another coordinator passes on comes from its client.

    Fronts carry out the attempts at what they pass on, and report on them.
    """

    def __init__(self, app: ASGIApp, cluster: Cluster, takeover: Takeover) -> None:
        self._app = app
        self._cluster = cluster
        self._takeover = takeover
        self._carried = takeover.carried
        self._strange: set[int] = set()

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
        carries = first(scope["headers"], CARRIES)
        scope, known = {**scope, "headers": headers}, self._cluster.secret
        if not known or not compare_digest(secret.encode(), known.encode()):
            await self._app(scope, receive, send)
        elif not client and scope["path"] == REPORTS:  # it speaks for itself, and for no client
            await self._take_reports(receive, send)
        elif not client and scope["path"] == HELLO:
            await self._takeover.hear(scope, receive, send)
        elif not port.isdigit():
            await self._app(scope, receive, send)
        else:
            scope["client"] = (address, int(port))
            if carries is None or not self._is_understood(carries, scope):
                await self._app(scope, receive, send)
                return
            can = shakes_hands(read_carries(carries)[0])
            scope[CARRIER] = carrier = FrontCarrier(self._carried, send, shakes_hands=can)
            try:
                await self._app(scope, receive, carrier.send)
                await carrier.finish()
            except HandedOver:
                await carrier.hand_over()

    def _is_understood(self, carries: str, scope: Scope) -> bool:
        """Whether its front can carry out attempts of ours; how long the request waited there."""
        wire, scope[WAITED], is_early = read_carries(carries)
        if is_early:
            self._takeover.hear_early()
        if is_understood(wire):
            return True
        if wire not in self._strange:
            self._strange.add(wire)
            log.warning(
                "another coordinator's version is too far from this one's to carry out attempts;"
                " its answers pass through this one until both have versions that follow each"
                " other",
                extra={"url": scope["client"], "wire": wire},
            )
        return False

    async def _take_reports(self, receive: Receive, send: Send) -> None:
        body = await read_body(receive, REPORT_BYTES, {})
        try:
            self._carried.take(bytes(body))
        except (msgspec.DecodeError, ValueError) as exc:
            log.warning("a front reports what cannot be read", extra={"reason": str(exc)})
        await send_whole(send, 204, [], b"")
