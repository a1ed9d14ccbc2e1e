"""What leader and fronts tell each other.

These are msgpack, and grow only: a new field comes last and has a default, a field that is not
known is passed over, and no message has a tag or a value that the version before does not know. So
versions of the program that follow each other serve together. `WIRE` counts the changes; with a
coordinator whose number is too low or too high, requests are passed on plainly, by HTTP alone.
"""

import struct
from collections.abc import AsyncIterable, AsyncIterator

import msgspec
from msgspec import Struct

from ollama_coordinator.api.inference.relay import Failure, Sent
from ollama_coordinator.scheduler import Outcome, Request
from ollama_coordinator.upstream import (
    AgentLost,
    Cut,
    ModelStuck,
    RequestCancelled,
    TakenBack,
    UpstreamError,
)
from ollama_coordinator_common.types import AgentId

WIRE = 3
"""Of this version: 3 shakes hands with relays, 2 does not; 1 says no hello to a new leader."""

HANDSHAKE_WIRE = 3

OLDEST_WIRE = 2
"""The lowest number that is understood."""

NEWEST_WIRE = WIRE + 1
"""The highest one: the version after this one understands this one."""

FRONT = b"x-ollama-coordinator-front"
"""In a request that a coordinator passes on: the secret, and its client's address and port."""

CARRIES = b"x-ollama-coordinator-carries"
"""In a request of a front, which carries out attempts: its wire, for how many milliseconds the
request waited there, and `early` if the hello has counted it."""

FOLLOWS = b"x-ollama-coordinator-follows"
"""In the answer of a coordinator that was taken for the leader, and is not: `MAY_LEAD`, or
something else where it does not begin to lead now.
"""

MAY_LEAD = b"may-lead"
"""It reaches the database, and leads when it finds that nobody does."""

REPORTS = "/api/coordinators/reports"
"""Where a leader takes the reports of fronts; it is no route of the API."""

HELLO = "/api/coordinators/hello"
"""Where a new leader hears what fronts carry out. Its answer lasts as long as these attempts do."""

CONTENT_TYPE = b"application/vnd.ollama-coordinator.attempts"

LARGEST_BYTES = 256 * 1024 * 1024
"""Of one message; a body may be in it."""

_LENGTH = struct.Struct(">I")


# ── from the leader ───────────────────────────────────────────────────────────────────────────


class AnswerStart(Struct, frozen=True, tag="start", array_like=True):
    """Status and headers of the leader's own answer."""

    status: int
    headers: list[tuple[bytes, bytes]]


class AnswerPiece(Struct, frozen=True, tag="piece", array_like=True):
    """A piece of its body; the last one, unless there are `more`."""

    body: bytes
    more: bool


class Order(Struct, frozen=True, tag="attempt", array_like=True):
    """Carry out this attempt. `others`: what other holders of the model list as capabilities.

    It may go out once more where a kept connection was idle for `again_after` seconds. `grant` is
    an encoded `Grant`, for the next leader.
    """

    id: int
    sent: Sent
    others: list[str] | None
    again_after: float
    grant: bytes = b""


class Abort(Struct, frozen=True, tag="abort", array_like=True):
    """End an attempt with an error of this kind."""

    id: int
    kind: str
    reason: str


class Grant(Struct, frozen=True):
    """What a leader has granted, as the next one has to know it: the request, its route, its agent.

    The times of the request are of no use to others; it had waited for so many seconds.
    """

    request: Request
    path: str
    agent_id: AgentId
    waited_seconds: float


# ── from a front ──────────────────────────────────────────────────────────────────────────────


class AttemptEnd(Struct, frozen=True, array_like=True):
    """How an attempt ended. `cancelled`: the error that its client still has to be told."""

    outcome: Outcome
    status: int
    failure: Failure | None = None
    cancelled: str | None = None

    @property
    def goes_on(self) -> bool:
        """Whether the client has seen nothing, and its request goes on, perhaps with the next
        leader.
        """
        return self.failure is not None and self.failure.written is None


class Report(Struct, frozen=True, array_like=True):
    """What a front tells of an attempt: its first byte, how far it is, its end."""

    id: int
    has_begun: bool
    records: int
    ended: AttemptEnd | None = None


class Carrying(Struct, frozen=True, array_like=True):
    """An attempt that a former leader granted `seconds` ago.

    `first_byte_seconds`: after the grant; `None` if there was none. `ended_seconds`: after the
    grant, of an attempt that is over, and of whose end no leader may know.
    """

    id: int
    grant: bytes
    seconds: float
    first_byte_seconds: float | None
    records: int
    ended: AttemptEnd | None = None
    ended_seconds: float = 0.0


class Hello(Struct, frozen=True, array_like=True):
    """What a front says to a new leader: its number on the wire, its id among the coordinators, how
    many requests without an attempt it will pass on again, and what it carries out.
    """

    wire: int
    id: str
    waiting: int
    carrying: list[Carrying]


ABORTS: dict[str, type[UpstreamError]] = {
    kind.__name__: kind for kind in (AgentLost, ModelStuck, RequestCancelled, TakenBack)
}

Told = AnswerStart | AnswerPiece | Order | Abort
_told = msgspec.msgpack.Decoder(Told)
_encoder = msgspec.msgpack.Encoder()
encoded = _encoder.encode


def framed(told: Told) -> bytes:
    """A message of the leader as it is sent."""
    body = encoded(told)
    return _LENGTH.pack(len(body)) + body


def abort(number: int, error: Exception) -> Abort:
    """The message that ends an attempt with an error."""
    name = type(error).__name__
    return Abort(number, name if name in ABORTS else AgentLost.__name__, str(error))


def shakes_hands(wire: int) -> bool:
    """Whether a front can, with relays that ask for a handshake."""
    return wire >= HANDSHAKE_WIRE


def is_understood(wire: int) -> bool:
    """Whether another coordinator's messages are understood here, and ours there."""
    return OLDEST_WIRE <= wire <= NEWEST_WIRE


def carries(waited_seconds: float, *, is_early: bool) -> str:
    """The value of `CARRIES` of a request that waited at its front for so long."""
    return f"{WIRE} {round(waited_seconds * 1000)}{' early' if is_early else ''}"


def read_carries(value: str) -> tuple[int, float, bool]:
    """What `carries` has made, also by another version: wire, seconds, and whether it is early."""
    wire, *rest = value.split(" ")
    waited = rest[0] if rest else ""
    seconds = int(waited) / 1000 if waited.isascii() and waited.isdigit() else 0.0
    number = int(wire) if wire.isascii() and wire.isdigit() else 0
    return number, seconds, "early" in rest


async def messages(chunks: AsyncIterable[bytes]) -> AsyncIterator[Told]:
    """What a leader tells, of the bytes of its answer.

    Raises:
        Cut: these are no messages.
    """
    rest = bytearray()
    async for chunk in chunks:
        rest += chunk
        while len(rest) >= _LENGTH.size:
            [length] = _LENGTH.unpack_from(rest)
            end = _LENGTH.size + length
            if length > LARGEST_BYTES:
                raise Cut("sent a message that is too long")
            if len(rest) < end:
                break
            try:
                yield _told.decode(memoryview(rest)[_LENGTH.size : end])
            except (msgspec.DecodeError, ValueError) as exc:
                raise Cut(f"sent what is no message: {exc}") from exc
            del rest[:end]
