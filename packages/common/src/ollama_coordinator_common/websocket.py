"""A stream of bytes inside a WebSocket (RFC 6455), so that every proxy passes it on.

Where one frame ends and the next begins means nothing here: what is written to one end is read at
the other. There is no closing handshake either: the end of the connection is the end of the stream.
"""

import base64
import hashlib
import os
import struct

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
"""Section 1.3 of the RFC: hashed with the client's key, it shows that the server knows it."""

BINARY, CLOSE, PING, PONG = 0x2, 0x8, 0x9, 0xA
"""Opcodes; those from `CLOSE` on are of control frames."""

FINAL, MASKED = 0x80, 0x80
MOST_CONTROL_BYTES = 125
SMALL_BYTES = 64 * 1024
"""A larger payload is not copied to stand behind its head."""

NO_MASK = bytes(4)
"""The mask of an agent's frames. It keeps a script in a browser from choosing the bytes on the wire
(section 10.3); an agent runs no scripts, and with zeros nothing has to be computed."""


class NotWebSocket(ValueError):
    """The other side sends what is no WebSocket."""


def new_key() -> str:
    """A client's key."""
    return base64.b64encode(os.urandom(16)).decode()


def accept_of(key: str) -> str:
    """The server's answer to a client's key."""
    return base64.b64encode(hashlib.sha1(key.encode() + GUID).digest()).decode()  # noqa: S324


def head_of(length: int, opcode: int = BINARY, *, masked: bool) -> bytes:
    """The head of a frame with a payload of `length` bytes; `masked` as clients have to."""
    mask, bit = (NO_MASK, MASKED) if masked else (b"", 0)
    first = FINAL | opcode
    if length < 126:
        return bytes((first, bit | length)) + mask
    if length < 65536:
        return struct.pack("!BBH", first, bit | 126, length) + mask
    return struct.pack("!BBQ", first, bit | 127, length) + mask


class FrameReader:
    """Takes the bytes of one direction; `feed` returns what was written at the other end.

    `pings` are the payloads of pings that have not been answered yet. `closed`: the other side
    sends no more.
    """

    __slots__ = ("_control", "_head", "_left", "_mask", "_opcode", "closed", "pings")

    def __init__(self) -> None:
        self.pings: list[bytes] = []
        self.closed = False
        self._head = b""
        self._opcode = 0
        self._left = 0  # bytes of the current frame's payload that have not come yet
        self._mask = NO_MASK
        self._control = b""

    def feed(self, data: bytes) -> bytes:
        """The bytes of the stream among these.

        Raises:
            NotWebSocket: they are no frames.
        """
        if self._left >= len(data) and self._opcode < CLOSE and self._mask == NO_MASK:
            self._left -= len(data)  # the middle of a large frame
            return data
        pieces: list[bytes] = []
        if self._head:
            data, self._head = self._head + data, b""
        at, end = 0, len(data)
        while at < end:
            if not self._left:
                start = self._begin(data, at)
                if start < 0:
                    self._head = data[at:]
                    break
                at = start
            piece = data[at : at + self._left]
            at += len(piece)
            self._take(piece, pieces)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _begin(self, data: bytes, at: int) -> int:
        """Read the head of a frame; where its payload starts, or -1 if the head is incomplete."""
        if len(data) - at < 2:
            return -1
        first, second = data[at], data[at + 1]
        length, start = second & 0x7F, at + 2
        if length > 125:
            size, form = (2, "!H") if length == 126 else (8, "!Q")
            if len(data) < start + size:
                return -1
            (length,) = struct.unpack_from(form, data, start)
            start += size
        mask = NO_MASK
        if second & MASKED:
            if len(data) < start + 4:
                return -1
            mask, start = data[start : start + 4], start + 4
        self._opcode = first & 0x0F
        if first & 0x70 or (self._opcode >= CLOSE and length > MOST_CONTROL_BYTES):
            raise NotWebSocket("the other end of the link sends what is no WebSocket")
        self._left, self._mask = length, mask
        if not length:
            self._take(b"", [])
        return start

    def _take(self, piece: bytes, pieces: list[bytes]) -> None:
        self._left -= len(piece)
        if self._mask != NO_MASK:
            piece, self._mask = _unmasked(piece, self._mask)
        if self._opcode < CLOSE:
            pieces.append(piece)
            return
        self._control += piece
        if self._left:
            return
        if self._opcode == PING:
            self.pings.append(self._control)
        self.closed = self.closed or self._opcode == CLOSE
        self._control = b""


def _unmasked(piece: bytes, mask: bytes) -> tuple[bytes, bytes]:
    """A piece of a payload that a proxy masked anew, and the mask as the next piece needs it."""
    length = len(piece)
    whole = (mask * (length // 4 + 1))[:length]
    plain = int.from_bytes(piece, "little") ^ int.from_bytes(whole, "little")
    turn = length % 4
    return plain.to_bytes(length, "little"), mask[turn:] + mask[:turn]
