"""A finished request as a row of the database, and the filters of the history."""

import zlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any

import msgspec
from msgspec import Struct, structs

from ollama_coordinator_common.types import AgentId

WORTH_PACKING_BYTES = 2000
"""Shorter reasons are kept as they are: readable in any tool, and hardly smaller packed."""

PACKED = b"x"
"""With this byte begins what zlib has packed; JSON never does."""


class Status(Enum):
    """How a request ended; `refused`: by an error of its own, such as an unknown model."""

    SERVED = "served"
    REFUSED = "refused"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Finished(Struct, frozen=True, kw_only=True):
    """A request that has ended; times are UTC, durations are seconds since its arrival.

    `waited_seconds` is until the last attempt got its slot, `first_token_seconds` until the first
    token arrived. `None` means unknown. `lane` is `interactive`, `batch` or `embedding`. `alias` is
    the name that the client asked for, where that stood for the model.
    """

    id: str
    status: Status
    model: str
    path: str
    client: str
    arrived_at: datetime
    finished_at: datetime
    waited_seconds: float
    total_seconds: float
    http_status: int = 0
    error: str = ""
    agent_id: AgentId | None = None
    agent: str | None = None
    attempts: int = 0
    streamed: bool = False
    lane: str | None = None
    alias: str | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    load_seconds: float | None = None
    first_token_seconds: float | None = None
    tokens_per_second: float | None = None

    def moved(self, by: timedelta) -> "Finished":
        """With its times so much later."""
        return structs.replace(
            self, arrived_at=self.arrived_at + by, finished_at=self.finished_at + by
        )


class Filter(Struct, frozen=True):
    """Which requests are wanted; `None` is any. `since` and `until` are about their end."""

    model: str | None = None
    agent: str | None = None
    agent_id: str | None = None
    client: str | None = None
    status: str | None = None
    since: datetime | None = None
    until: datetime | None = None


class Cursor(Struct, frozen=True):
    """Where a page ended: the time in milliseconds and the number of its last row."""

    finished_ms: int
    seq: int


COLUMNS = (
    "id", "status", "model", "path", "client", "arrived_ms", "finished_ms", "waited_seconds",
    "total_seconds", "http_status", "error", "agent_id", "agent", "attempts", "streamed",
    "prompt_tokens", "output_tokens", "load_seconds", "first_token_seconds", "tokens_per_second",
    "lane", "alias", "why", "used",
)  # fmt: skip
INSERT = f"INSERT INTO requests ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})"  # noqa: S608
SHOWN = ", ".join(["seq", *COLUMNS[:-2]])


def conditions(wanted: Filter, after: Cursor | None) -> tuple[str, list[Any]]:
    """The WHERE clause of a filter from a cursor on, and its values."""
    terms: dict[str, Sequence[Any]] = {}
    for column in ("model", "agent", "agent_id", "client", "status"):
        value = getattr(wanted, column)
        if value is not None:
            terms[f"{column} = ?"] = [value]
    if wanted.since is not None:
        terms["finished_ms >= ?"] = [milliseconds(wanted.since)]
    if wanted.until is not None:
        terms["finished_ms < ?"] = [milliseconds(wanted.until)]
    if after is not None:
        terms["(finished_ms, seq) < (?, ?)"] = [after.finished_ms, after.seq]
    where = f"WHERE {' AND '.join(terms)}" if terms else ""
    return where, [value for values in terms.values() for value in values]


def to_columns(request: Finished, why: bytes, used: str | None = None) -> list[Any]:
    """A request, its packed reasons and its share of the usage in the order of `COLUMNS`."""
    values = msgspec.structs.asdict(request)
    values["status"] = request.status.value
    values["arrived_ms"] = milliseconds(request.arrived_at)
    values["finished_ms"] = milliseconds(request.finished_at)
    values["streamed"] = int(request.streamed)
    values["why"], values["used"] = why, used
    return [values[column] for column in COLUMNS]


def why_of(row: dict[str, Any]) -> bytes:
    """The reasons of a row as JSON.

    Raises:
        ValueError: the row is damaged.
    """
    try:
        why = row["why"]
        if isinstance(why, bytes) and why.startswith(PACKED):
            why = zlib.decompress(why)
        return bytes(msgspec.json.decode(why, type=msgspec.Raw))
    except (zlib.error, TypeError) as exc:
        raise ValueError(f"reasons: {exc}") from exc


def moved_why(why: bytes, by: timedelta) -> bytes:
    """The column of the reasons of a request, with the attempts' times so much later.

    Raises:
        ValueError: the row is damaged.
    """
    attempts = msgspec.json.decode(why, type=list[dict[str, Any]])
    for attempt in attempts:
        if "granted_at" in attempt:
            at = msgspec.convert(attempt["granted_at"], datetime)
            attempt["granted_at"] = at + by
    return packed(attempts)


def packed(why: Any) -> bytes:
    """The column of the reasons: JSON, compressed where it is long."""
    encoded = msgspec.json.encode(why)
    return zlib.compress(encoded, 1) if len(encoded) > WORTH_PACKING_BYTES else encoded


def from_columns(row: dict[str, Any]) -> Finished:
    """A request from its row.

    Raises:
        ValueError: the row is damaged.
    """
    values = {name: row[name] for name in Finished.__struct_fields__ if name in row}
    values["status"] = Status(row["status"])
    values["streamed"] = bool(row["streamed"])
    try:
        values["arrived_at"] = _utc(row["arrived_ms"])
        values["finished_at"] = _utc(row["finished_ms"])
        return Finished(**values)
    except (TypeError, OverflowError) as exc:
        raise ValueError(f"times: {exc}") from exc


def milliseconds(at: datetime) -> int:
    """Unix time in milliseconds."""
    return round(at.timestamp() * 1000)


def _utc(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)
