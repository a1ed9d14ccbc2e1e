"""One connection that an agent opened: a WebSocket below, a transport for its user above."""

import asyncio
from collections.abc import Iterable
from typing import Any

from ollama_coordinator_common.network import keep_alive
from ollama_coordinator_common.websocket import (
    PONG,
    SMALL_BYTES,
    FrameReader,
    NotWebSocket,
    head_of,
)


class LinkConnection(asyncio.Transport, asyncio.Protocol):
    """The protocol of the connection's socket, and the transport of the protocol that uses it.

    Until `use` it is parked: the agent sends nothing, so that bytes end it. `heard`: bytes came
    since somebody set it to false. `ended` is set when the socket is closed.
    """

    def __init__(self, socket_transport: asyncio.Transport) -> None:
        super().__init__()
        self.heard = True
        self.ended = asyncio.Event()
        self._below = socket_transport
        self._frames = FrameReader()
        self._user: asyncio.Protocol | None = None
        keep_alive(socket_transport.get_extra_info("socket"))
        socket_transport.set_protocol(self)

    def use(self, protocol: asyncio.Protocol) -> None:
        """Serve as the transport of `protocol` from now on."""
        self._user = protocol
        protocol.connection_made(self)

    # ── the protocol of the socket ────────────────────────────────────────────────────────────

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        self.heard = True
        try:
            payload = self._frames.feed(data)
        except NotWebSocket:
            self._below.abort()
            return
        if payload:
            if self._user is None:
                self._below.abort()
            else:
                self._user.data_received(payload)
        if self._frames.pings:
            for ping in self._frames.pings:
                self._below.write(head_of(len(ping), PONG, masked=False) + ping)
            self._frames.pings.clear()
        if self._frames.closed:
            self._below.close()

    def eof_received(self) -> None:
        """The agent sends no more: with its half the connection is closed."""
        if self._user is not None:
            self._user.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is closed."""
        self.ended.set()
        user, self._user = self._user, None
        if user is not None:
            user.connection_lost(exc)

    def pause_writing(self) -> None:
        """The agent does not keep up."""
        if self._user is not None:
            self._user.pause_writing()

    def resume_writing(self) -> None:
        """The agent keeps up again."""
        if self._user is not None:
            self._user.resume_writing()

    # ── the transport of its user ─────────────────────────────────────────────────────────────

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send some bytes."""
        head = head_of(len(data), masked=False)
        if len(data) <= SMALL_BYTES:
            self._below.write(head + bytes(data))
        else:
            self._below.write(head)
            self._below.write(data)

    def writelines(self, pieces: Iterable[bytes | bytearray | memoryview]) -> None:
        """Send several pieces, as one."""
        self.write(b"".join(pieces))

    def can_write_eof(self) -> bool:
        """Half of a WebSocket cannot be closed."""
        return False

    def close(self) -> None:
        """Close the connection once everything is sent."""
        self._below.close()

    def abort(self) -> None:
        """Close the connection now."""
        self._below.abort()

    def is_closing(self) -> bool:
        """Whether it is closed, or will be."""
        return self._below.is_closing()

    def pause_reading(self) -> None:
        """Take nothing from the agent."""
        self._below.pause_reading()

    def resume_reading(self) -> None:
        """Take what the agent sends."""
        self._below.resume_reading()

    def is_reading(self) -> bool:
        """Whether what the agent sends is taken."""
        return self._below.is_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """As the socket's transport has it."""
        return self._below.get_extra_info(name, default)

    def get_write_buffer_size(self) -> int:
        """Bytes that are not sent yet."""
        return self._below.get_write_buffer_size()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """As the socket's transport has it."""
        self._below.set_write_buffer_limits(high, low)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Replace the user."""
        if not isinstance(protocol, asyncio.Protocol):
            raise TypeError("a link connection needs a streaming protocol")
        self._user = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Its user."""
        return self if self._user is None else self._user
