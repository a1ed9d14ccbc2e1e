"""Usage: what each person, key and model took on a day of UTC.

It is added up in the transaction that writes the requests: each counts once, whatever fails. A
request's row says what it added, so that it can be moved to another day.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, date, datetime
from typing import Any

import msgspec
from msgspec import Struct, structs

from .database import Database

DIMENSIONS = {"day": "day", "person": "person", "key": "key_name", "model": "model"}
"""By what usage can be asked for, and their columns."""

MOST_ROWS_A_DAY = 5000
"""What is new beyond them counts for `OTHERS`: people's names may come from outside."""

MOST_ROWS = 50_000
"""Of one answer."""

OTHERS = "(others)"

_PUT = """
    INSERT INTO usage_days
        (day, person, key_name, model, requests, prompt_tokens, output_tokens, gpu_seconds)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (day, person, key_name, model) DO UPDATE SET
        requests = usage_days.requests + excluded.requests,
        prompt_tokens = usage_days.prompt_tokens + excluded.prompt_tokens,
        output_tokens = usage_days.output_tokens + excluded.output_tokens,
        gpu_seconds = usage_days.gpu_seconds + excluded.gpu_seconds
"""

Place = tuple[str, str, str, str]


class Used(Struct, frozen=True):
    """What requests used on a day (such as `2026-01-31`), of a person with a key, of a model.

    A part that was not asked for, or is not kept, is empty. `gpu_seconds`: how long they held slots
    of machines, whatever those compute with.
    """

    day: str = ""
    person: str = ""
    key: str = ""
    model: str = ""
    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    gpu_seconds: float = 0.0


def day_of(milliseconds: int) -> str:
    """The day of UTC of a Unix time; empty for one that is none."""
    try:
        return datetime.fromtimestamp(milliseconds / 1000, UTC).date().isoformat()
    except (OverflowError, ValueError, OSError):
        return ""


def to_column(used: Used | None) -> str | None:
    """What a request used, beside what its row has anyway; `None`: it does not count."""
    if used is None:
        return None
    return msgspec.json.encode([used.person, used.key, used.gpu_seconds]).decode()


def move(db: Database, rows: Iterable[dict[str, Any]], by: int) -> None:
    """Move what requests used to the days on which they ended so many milliseconds later."""
    moved: list[Used] = []
    for row in rows:
        with suppress(TypeError, ValueError, msgspec.DecodeError):  # a damaged one stays
            moved += _moved(row, by)
    if moved:
        add_up(db, moved)
        db.execute("DELETE FROM usage_days WHERE requests <= 0")


def _moved(row: dict[str, Any], by: int) -> list[Used]:
    """What to add to two days, for one request; nothing where it stays on its day."""
    before, after = day_of(row["finished_ms"]), day_of(row["finished_ms"] + by)
    if row["used"] is None or before == after:
        return []
    person, key, seconds = _share.decode(row["used"])
    read, written = int(row["prompt_tokens"] or 0), int(row["output_tokens"] or 0)
    used = Used(after, person, key, row["model"], 1, read, written, seconds)
    return [used, _less(structs.replace(used, day=before))]


_share = msgspec.json.Decoder(tuple[str, str, float])


def _less(used: Used) -> Used:
    return structs.replace(
        used,
        requests=-used.requests,
        prompt_tokens=-used.prompt_tokens,
        output_tokens=-used.output_tokens,
        gpu_seconds=-used.gpu_seconds,
    )


def add_up(db: Database, used: Iterable[Used]) -> None:
    """Add what requests used to the rows of their days."""
    sums: dict[Place, list[float]] = {}
    for one in used:
        row = sums.setdefault((one.day, one.person, one.key, one.model), [0, 0, 0, 0.0])
        for at, value in enumerate(
            (one.requests, one.prompt_tokens, one.output_tokens, one.gpu_seconds)
        ):
            row[at] += value
    room = {day: _room(db, day) for day in {place[0] for place in sums}}
    rows = []
    for place, values in sums.items():
        day = place[0]
        if room[day] < len(sums) and not _is_known(db, place):
            room[day] -= 1
            place = place if room[day] >= 0 else (day, OTHERS, "", "")
        rows.append([*place, *values])
    db.execute_many(_PUT, rows)


def _room(db: Database, day: str) -> int:
    rows = db.query("SELECT count(*) AS many FROM usage_days WHERE day = ?", [day])
    return MOST_ROWS_A_DAY - int(rows[0]["many"])


def _is_known(db: Database, place: Place) -> bool:
    sql = "SELECT 1 AS one FROM usage_days WHERE day = ? AND person = ? AND key_name = ?"
    return bool(db.query(f"{sql} AND model = ?", list(place)))


def read(
    db: Database, by: Sequence[str], since: date, until: date, only: dict[str, str]
) -> list[Used]:
    """Usage from one day to another, both included, a row for each combination of `by`.

    `only`: the values that some of `DIMENSIONS` must have.
    """
    terms = ["day BETWEEN ? AND ?", *(f"{DIMENSIONS[name]} = ?" for name in only)]
    columns = [DIMENSIONS[name] for name in by]
    sums = ", ".join(
        f"CAST(sum({name}) AS {kind}) AS {name}"
        for name, kind in (
            *((name, "bigint") for name in ("requests", "prompt_tokens", "output_tokens")),
            ("gpu_seconds", "double precision"),
        )
    )
    grouped = f"GROUP BY {', '.join(columns)}" if columns else ""
    order = ", ".join(["day DESC"] * ("day" in by) + ["output_tokens DESC", *columns])
    sql = f"""
        SELECT {", ".join([*columns, sums])} FROM usage_days
        WHERE {" AND ".join(terms)} {grouped} ORDER BY {order} LIMIT ?
    """  # noqa: S608 - the table's own names
    values = [since.isoformat(), until.isoformat(), *only.values(), MOST_ROWS]
    return [_used(row) for row in db.query(sql, values) if row["requests"] is not None]


def _used(row: dict[str, Any]) -> Used:
    named = {"key" if name == "key_name" else name: value for name, value in row.items()}
    return Used(**named)


def prune(db: Database, first_day: date) -> None:
    """Delete what is older than a day."""
    db.execute("DELETE FROM usage_days WHERE day < ?", [first_day.isoformat()])
