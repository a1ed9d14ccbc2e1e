"""The audit: who changed what, from where; kept like the history of requests."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
from msgspec import Struct

from .database import Database
from .finished import milliseconds

MOST_DETAIL_BYTES = 2000
"""Of one change; more is left out, for a client says it."""


class Change(Struct, frozen=True, kw_only=True):
    """One change. `by` is the client, `key` the name of its key, `address` where it came from.

    `action` is the method and the path of the route, `subject` what it was about.
    """

    id: str
    at: datetime
    by: str
    key: str
    address: str
    action: str
    subject: str
    details: dict[str, Any]
    http_status: int


COLUMNS = (
    "id", "at_ms", "caller", "key_name", "address", "action", "subject", "details", "http_status"
)  # fmt: skip
INSERT = f"INSERT INTO audit ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})"  # noqa: S608


def to_columns(change: Change) -> list[Any]:
    """A change in the order of `COLUMNS`."""
    details = msgspec.json.encode(change.details)
    if len(details) > MOST_DETAIL_BYTES:
        details = b'{"too_long": true}'
    return [
        change.id,
        milliseconds(change.at),
        change.by,
        change.key,
        change.address,
        change.action,
        change.subject,
        details.decode(),
        change.http_status,
    ]


def page(
    db: Database,
    *,
    by: str | None,
    since: datetime | None,
    until: datetime | None,
    before: int | None,
    limit: int,
) -> tuple[list[Change], int | None]:
    """The next changes, newest first, and the number before which the page that follows begins."""
    terms: dict[str, Sequence[Any]] = {}
    if by is not None:
        terms["(caller = ? OR key_name = ?)"] = [by, by]
    if since is not None:
        terms["at_ms >= ?"] = [milliseconds(since)]
    if until is not None:
        terms["at_ms < ?"] = [milliseconds(until)]
    if before is not None:
        terms["seq < ?"] = [before]
    where = f"WHERE {' AND '.join(terms)}" if terms else ""
    values = [value for some in terms.values() for value in some]
    sql = f"SELECT * FROM audit {where} ORDER BY seq DESC LIMIT ?"  # noqa: S608
    rows = db.query(sql, [*values, limit + 1])
    following = int(rows[limit - 1]["seq"]) if len(rows) > limit else None
    return [_change(row) for row in rows[:limit]], following


def _change(row: dict[str, Any]) -> Change:
    return Change(
        id=row["id"],
        at=datetime.fromtimestamp(row["at_ms"] / 1000, UTC),
        by=row["caller"],
        key=row["key_name"],
        address=row["address"],
        action=row["action"],
        subject=row["subject"],
        details=msgspec.json.decode(row["details"], type=dict[str, Any]),
        http_status=row["http_status"],
    )
