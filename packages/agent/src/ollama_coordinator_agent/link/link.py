"""The agent's side of its link: one control connection, and some that wait for requests.

`LinkReport` goes to the coordinator, a line of JSON each, and `LinkOrder` comes from it. The first
order names the session of the link; from then on the agent keeps as many unused connections parked
as Ollama has slots, and `SPARE` more. The end of the control connection is the end of the link.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import quote

import msgspec

from ollama_coordinator_agent.client import CoordinatorClient, CoordinatorError, Forgotten, Rejected
from ollama_coordinator_agent.watch import Watch
from ollama_coordinator_common.network import keep_alive
from ollama_coordinator_common.protocol import (
    HealthReply,
    HealthReport,
    LinkOrder,
    LinkReport,
    LogReport,
)
from ollama_coordinator_common.pump import Framing, carry
from ollama_coordinator_common.tickets import PREFIX
from ollama_coordinator_common.types import AgentId
from ollama_coordinator_common.websocket import FrameReader, NotWebSocket, head_of

from .dial import Dialled
from .tunnel import Tunnel

log = logging.getLogger(__name__)

SPARE = 4
"""Connections parked beyond Ollama's slots: for probes, lists and what queues in Ollama."""

MOST_SLOTS = 32
"""Of more slots no account is taken: a request that finds no connection asks for one."""

MOST_AT_ONCE = 256
"""Connections that are opened at the same time, however many requests wait."""

DIAL_AGAIN_SECONDS = 1.0
"""Until another connection is tried after one that failed."""

TICK_SECONDS = 1.0
DOUBT_TICKS = 3
LOST_TICKS = 15
"""The coordinator sends a line each second. After three seconds without one the agent sends some:
a connection that the other side has given up answers with a reset. A coordinator that is only
held up for a while is not left; one whose machine is gone is, after fifteen seconds."""

REPLY_SECONDS = 5.0

FOR_MODELS = tuple(f"{method} {PREFIX}".encode() for method in ("GET", "POST"))
"""How a connection begins that is for the agent's own port and not for its Ollama."""

_orders = msgspec.json.Decoder(LinkOrder)


class LinkLost(CoordinatorError):
    """The link has ended."""

    def __init__(self) -> None:
        super().__init__("the link to the coordinator has ended")


class CoordinatorLink:
    """One link: `open`, then `run` until it ends. `reached`: what the coordinator last said of it.

    `changed` is set where the coordinator wants a report, and at the end. `models`: where the
    agent's own port is.
    """

    def __init__(
        self,
        client: CoordinatorClient,
        target: tuple[str, int],
        watch: Watch,
        agent_id: AgentId,
        changed: asyncio.Event,
        models: Callable[[], tuple[str, int] | None] = lambda: None,
    ) -> None:
        self.agent_id = agent_id
        self.reached: bool | None = None
        self._framings: set[Framing] = set()
        self._client = client
        self._target = target
        self._models = models
        self._watch = watch
        self._changed = changed
        self._control: _Control | None = None
        self._session: str | None = None
        self._replies: deque[asyncio.Future[HealthReply]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._parked = self._dialling = self._wanted = 0
        self._short = asyncio.Event()  # of parked connections
        self._is_retiring = False

    @property
    def has_ended(self) -> bool:
        """Whether its control connection is closed."""
        return self._control is None or self._control.ended.is_set()

    @property
    def active_requests(self) -> int:
        """The requests in progress over it."""
        return sum(framing.in_progress for framing in self._framings)

    async def open(self) -> None:
        """Open the control connection.

        Raises:
            Forgotten: the coordinator does not know the agent.
            Rejected: links are not possible here, and why.
            CoordinatorError: the coordinator cannot be reached.
        """
        self._control = _Control(await self._dial(""), self)

    async def run(self) -> None:
        """Keep connections parked until the link ends; then close all of them."""
        if self._control is None:
            raise RuntimeError("open() first")
        try:
            self._start(self._watch_silence(self._control))
            self._start(self._park())
            await self._control.ended.wait()
        finally:
            self._control.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._fail_replies()
            self._changed.set()

    def retire(self) -> None:
        """End once no request is served over it any more; the coordinator sends no new ones."""
        self._is_retiring = True

    # ── reports ───────────────────────────────────────────────────────────────────────────────

    async def report(self, report: HealthReport) -> HealthReply:
        """Send a heartbeat.

        Raises:
            LinkLost: the link has ended.
            Forgotten: the coordinator does not know the agent; register again.
            CoordinatorError: it refuses the report, or gives no answer.
        """
        future: asyncio.Future[HealthReply] = asyncio.get_running_loop().create_future()
        self._replies.append(future)
        self._send(LinkReport(health=report))
        try:
            async with asyncio.timeout(REPLY_SECONDS):
                return await future
        except TimeoutError:
            raise CoordinatorError("the coordinator does not answer over the link") from None

    async def send_log(self, agent_id: AgentId, report: LogReport) -> None:
        """Send the lines of the logs that the coordinator asked for.

        Raises:
            LinkLost: the link has ended.
        """
        self._send(LinkReport(log=report))

    def ask_reached(self) -> None:
        """Ask whether the coordinator reaches the port of this machine after all."""
        if not self.has_ended:
            self._send(LinkReport(asks_reached=True))

    def _send(self, report: LinkReport) -> None:
        if self._control is None or self.has_ended:
            raise LinkLost
        # Ollama's own lists may have line breaks between their parts; JSON has none in its texts.
        line = msgspec.json.encode(report).replace(b"\n", b" ")
        self._control.send(line + b"\n")

    def take(self, line: bytes) -> None:
        """Take a line from the coordinator."""
        try:
            order = _orders.decode(line)
        except msgspec.DecodeError as exc:
            log.warning("no line of a link", extra={"reason": str(exc)})
            return
        if order == LinkOrder():
            self._send(LinkReport())
        if isinstance(order.session, str):
            self._session = order.session
            self._short.set()
        if order.connections:
            self._wanted = order.connections
            self._short.set()
        if isinstance(order.reached, bool):
            self.reached = order.reached
            self._changed.set()
        if order.report:
            self._changed.set()
        self._reply(order)

    def _reply(self, order: LinkOrder) -> None:
        is_reply = isinstance(order.reply, HealthReply)
        if not (is_reply or isinstance(order.error, str)) or not self._replies:
            return
        future = self._replies.popleft()
        if future.done():
            return
        if isinstance(order.reply, HealthReply):
            future.set_result(order.reply)
        elif order.forgotten:
            future.set_exception(Forgotten("the coordinator does not know this agent (any more)"))
        else:
            future.set_exception(Rejected(f"{self._client.url} refuses: {order.error}"))

    def _fail_replies(self) -> None:
        for future in self._replies:
            if not future.done():
                future.set_exception(LinkLost())
                future.exception()  # nobody may wait for it any more

    # ── connections ───────────────────────────────────────────────────────────────────────────

    async def _dial(self, query: str) -> Dialled:
        path = f"/api/agents/{quote(self.agent_id, safe='')}/link{query}"
        return await self._client.upgrade(path)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("an error inside the agent; it goes on", exc_info=error)

    async def _park(self) -> None:
        """Keep enough connections parked."""
        while True:
            self._short.clear()
            if self._session is not None and not self._is_retiring:
                runner = self._watch.facts.runner
                slots = min((runner.num_parallel if runner else None) or 1, MOST_SLOTS)
                missing = max(slots + SPARE - self._parked, self._wanted) - self._dialling
                self._wanted = 0
                for _ in range(min(missing, MOST_AT_ONCE - self._dialling)):
                    self._dialling += 1
                    self._start(self._serve_one(self._session))
            await self._short.wait()

    async def _serve_one(self, session: str) -> None:
        """Open a connection, and serve what the coordinator sends over it."""
        try:
            dialled = await self._dial(f"?session={session}")
        except CoordinatorError as exc:
            log.debug("no connection of the link", extra={"reason": str(exc)})
            await asyncio.sleep(DIAL_AGAIN_SECONDS)
            return
        finally:
            self._dialling -= 1
            self._short.set()
        tunnel = Tunnel(dialled)
        self._parked += 1
        try:
            await tunnel.used.wait()
        except asyncio.CancelledError:
            tunnel.reset()
            raise
        finally:
            self._parked -= 1
            self._short.set()
        if tunnel.ended.is_set():
            return
        framing = Framing()
        models = self._models()
        if models is not None and tunnel.begins_with(*FOR_MODELS):
            await carry(tunnel, models, framing)
            return
        self._framings.add(framing)
        try:
            await carry(tunnel, self._target, framing)
        finally:
            self._framings.remove(framing)

    async def _watch_silence(self, control: "_Control") -> None:
        """Leave a coordinator that is gone, and end a link that is not needed any more."""
        silent = 0
        while True:
            await asyncio.sleep(TICK_SECONDS)
            silent = 0 if control.heard else silent + 1
            control.heard = False
            if silent >= LOST_TICKS:
                log.warning("nothing came over the link", extra={"seconds": LOST_TICKS})
                control.abort()
            elif silent >= DOUBT_TICKS:
                self._send(LinkReport())
            elif self._is_retiring and not self.active_requests:
                control.close()


class _Control(asyncio.Protocol):
    """The control connection: lines both ways. `heard`: bytes came since it was set to false."""

    def __init__(self, dialled: Dialled, link: CoordinatorLink) -> None:
        self.ended = asyncio.Event()
        self.heard = True
        self._transport = dialled.transport
        self._link = link
        self._frames = FrameReader()
        self._line = b""
        self._transport.set_protocol(self)
        keep_alive(self._transport.get_extra_info("socket"))
        if dialled.rest:
            self.data_received(dialled.rest)
        self._transport.resume_reading()

    def send(self, line: bytes) -> None:
        """Send a line, unless the connection has ended."""
        if not self._transport.is_closing():
            self._transport.write(head_of(len(line), masked=True) + line)

    def close(self) -> None:
        """Close it once everything is sent."""
        self._transport.close()

    def abort(self) -> None:
        """Close it now."""
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        self.heard = True
        try:
            *lines, self._line = (self._line + self._frames.feed(data)).split(b"\n")
        except NotWebSocket:
            self.abort()
            return
        for line in lines:
            if not self._transport.is_closing():
                self._link.take(line)
        if self._frames.closed:
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """It has ended."""
        self.ended.set()
