"""The links that are open: one an agent, with its control connection and those that are parked."""

import asyncio
import contextlib
import secrets
from collections import deque
from collections.abc import Iterator
from hmac import compare_digest

import msgspec

from ollama_coordinator.clock import Clock
from ollama_coordinator_common.protocol import LinkOrder
from ollama_coordinator_common.types import AgentId

from .connection import LinkConnection

PING_SECONDS = 0.9
SILENT_PINGS = 3
"""So many pings without a byte from the agent: its machine, or the way to it, is gone. That is
noticed within 3.6 seconds: the last byte may have come just after the ping before these."""

MOST_CONNECTIONS = 1024
"""Of one link: more than one machine can serve at a time. An agent keeps some, not hundreds."""

LINE_BYTES = 8 * 1024 * 1024
"""The longest line on a control connection: an agent's lists of models, or the ends of its logs."""


class LinkDown(OSError):
    """An agent cannot be reached by its link."""


class Link:
    """The connections that one agent opened for one purpose: that the coordinator reaches it.

    `session` is what the agent names when it opens one that is to be parked.
    """

    def __init__(self, agent_id: AgentId, control: LinkConnection) -> None:
        self.agent_id = agent_id
        self.session = secrets.token_urlsafe(16)
        self.parked: deque[LinkConnection] = deque()
        self._control = control
        self._reader = _Lines()
        control.use(self._reader)
        self._open: set[LinkConnection] = set()
        self._silent = 0

    def __len__(self) -> int:
        return len(self._open)

    async def line(self) -> bytes:
        """The next line of the control connection; empty at its end.

        Raises:
            ValueError: it is longer than `LINE_BYTES`.
        """
        return await self._reader.stream.readline()

    def send(self, order: LinkOrder) -> None:
        """Send a line to the agent."""
        if not self._control.is_closing():
            self._control.write(msgspec.json.encode(order) + b"\n")

    def has_room(self) -> bool:
        """Whether the agent may open another connection."""
        return len(self._open) < MOST_CONNECTIONS

    async def hold(self, connection: LinkConnection) -> None:
        """Keep one of its connections until that ends."""
        self._open.add(connection)
        try:
            await connection.ended.wait()
        finally:
            self._open.discard(connection)

    def ping(self) -> None:
        """Ask for a sign of life.

        The control connection ends where too many such questions got none, and with it the link.
        """
        connections = (self._control, *self._open)
        self._silent = 0 if any(one.heard for one in connections) else self._silent + 1
        for connection in connections:
            connection.heard = False
        if self._silent >= SILENT_PINGS:
            self._control.abort()
        else:
            self.send(LinkOrder())

    async def close(self) -> None:
        """Close the control connection once what was sent has gone out, if that takes no time."""
        self._control.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PING_SECONDS):
                await self._control.ended.wait()

    def end(self) -> None:
        """End all its connections now."""
        for connection in (self._control, *self._open):
            connection.abort()


class Links:
    """The agents' links, and the requests that wait for a connection of one."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._links: dict[AgentId, Link] = {}
        self._waiting: dict[AgentId, deque[asyncio.Future[LinkConnection]]] = {}

    def __iter__(self) -> Iterator[Link]:
        return iter(list(self._links.values()))

    def find(self, agent_id: AgentId) -> Link | None:
        """The link of an agent, if it has one."""
        return self._links.get(agent_id)

    def with_session(self, agent_id: AgentId, session: str) -> Link | None:
        """The link of an agent, if this is its session."""
        link = self._links.get(agent_id)
        known = link is not None and compare_digest(link.session.encode(), session.encode())
        return link if known else None

    def add(self, link: Link) -> None:
        """From now on the agent is reached by this link; one that it had before ends."""
        before = self._links.get(link.agent_id)
        self._links[link.agent_id] = link
        if before is not None:
            before.end()

    def remove(self, link: Link) -> bool:
        """A link has ended; whether it was the agent's. Those that wait for it wait no more."""
        if self._links.get(link.agent_id) is not link:
            return False
        del self._links[link.agent_id]
        for future in self._waiting.pop(link.agent_id, ()):
            if not future.done():
                future.set_exception(LinkDown("its link has ended"))
        return True

    def park(self, link: Link, connection: LinkConnection) -> None:
        """The agent opened a connection: the first request that waits for one gets it."""
        waiting = self._waiting.get(link.agent_id)
        while waiting:
            future = waiting.popleft()
            if not future.done():
                future.set_result(connection)
                return
        link.parked.append(connection)

    async def take(self, agent_id: AgentId, seconds: float) -> LinkConnection:
        """A connection that nobody uses.

        Raises:
            LinkDown: there is none within `seconds`.
        """
        link = self._links.get(agent_id)
        while link is not None and link.parked:
            connection = link.parked.popleft()
            if not connection.is_closing():
                return connection
        future: asyncio.Future[LinkConnection] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(agent_id, deque())
        waiting.append(future)
        if link is not None:
            link.send(LinkOrder(connections=len(waiting)))
        try:
            async with self._clock.timeout(seconds):
                return await future
        except TimeoutError:
            self._give_back(agent_id, future)
            text = "its link is down" if link is None else "its agent opens no more connections"
            raise LinkDown(f"{text} (waited {seconds:g} s)") from None
        except asyncio.CancelledError:
            self._give_back(agent_id, future)
            raise
        finally:
            if future in waiting:
                waiting.remove(future)
            if not waiting and self._waiting.get(agent_id) is waiting:
                del self._waiting[agent_id]

    def _give_back(self, agent_id: AgentId, future: "asyncio.Future[LinkConnection]") -> None:
        """Park the connection that came at the moment at which its request stopped waiting."""
        link = self._links.get(agent_id)
        came = future.done() and not future.cancelled() and future.exception() is None
        if came and link is not None:
            self.park(link, future.result())

    async def run(self) -> None:
        """Ask every agent for a sign of life about each second, until cancelled."""
        while True:
            await asyncio.sleep(PING_SECONDS)
            for link in self:
                link.ping()


class _Lines(asyncio.Protocol):
    """Reads lines; the agent waits while they are not taken."""

    def __init__(self) -> None:
        self.stream = asyncio.StreamReader(limit=LINE_BYTES)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.stream.set_transport(transport)

    def data_received(self, data: bytes) -> None:
        self.stream.feed_data(data)

    def eof_received(self) -> None:
        self.stream.feed_eof()

    def connection_lost(self, exc: Exception | None) -> None:
        self.stream.feed_eof()
