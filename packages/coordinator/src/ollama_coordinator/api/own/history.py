"""`/api/history`, `/api/statistics`: finished requests, one by one and as numbers over time."""

import csv
from collections.abc import AsyncIterator, Iterable, Sequence
from datetime import UTC, date, datetime
from io import StringIO
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from ollama_coordinator.access import Right, caller_of
from ollama_coordinator.aio import Slices
from ollama_coordinator.api.http.errors import HttpError, decode, reply
from ollama_coordinator.api.http.openapi import Media, Query, operation
from ollama_coordinator.db import (
    DIMENSIONS,
    Change,
    Cursor,
    Filter,
    Finished,
    History,
    Status,
    Used,
)
from ollama_coordinator.journal import Advice, Point
from ollama_coordinator.operations import MoveView
from ollama_coordinator.parts import Parts
from ollama_coordinator_common.error import InvalidModelName
from ollama_coordinator_common.names import ModelName
from ollama_coordinator_common.types import AgentId

PAGE, LARGEST_PAGE = 50, 500
"""Rows of a page of the history: a screen or two, and at most some hundred kilobytes."""

EXPORT_PAGE = 1000
"""Rows that an export reads at a time: the database's one thread serves others in between."""

SHORTEST_MINUTES, LONGEST_MINUTES = 1, 31 * 24 * 60
"""Of a chart: some points of the finest tier; nearly as much as the coarsest one keeps."""

SHORTEST_HOURS, LONGEST_HOURS = 1, 31 * 24
"""Of advice: a few requests at least, and as much as the history usually keeps."""

USAGE_DAYS = 30
"""Of usage, where nothing else is asked for: a month."""

Limit = Annotated[int, Meta(ge=1, le=LARGEST_PAGE)]
Hours = Annotated[float, Meta(ge=SHORTEST_HOURS, le=LONGEST_HOURS)]
Minutes = Annotated[float, Meta(ge=SHORTEST_MINUTES, le=LONGEST_MINUTES)]

FILTERS = (
    Query("model", "the model's name, in any spelling"),
    Query("agent", "the agent's id, or the name it had"),
    Query("client", "the address that asked"),
    Query("status", "how it ended", Status),
    Query("since", "finished at or after this time", datetime),
    Query("until", "finished before this time", datetime),
)


Export = list[Finished]


class HistoryPage(Struct, frozen=True):
    """`GET /api/history`: `next` is the `after` of the page that follows, `null` at the end."""

    requests: list[Finished]
    next: str | None


class Choices(Struct, frozen=True):
    """`GET /api/history/choices`: the values that finished requests can be filtered by."""

    model: list[str]
    agent: list[str]
    client: list[str]


class Statistics(Struct, frozen=True):
    """`GET /api/statistics`: the points of a chart over so many minutes."""

    minutes: float
    points: list[Point]


class AuditPage(Struct, frozen=True):
    """`GET /api/audit`: `next` is the `after` of the page that follows, `null` at the end."""

    changes: list[Change]
    next: str | None


Changes = list[Change]


class AppliedHours(Struct, frozen=True, forbid_unknown_fields=True):
    """`POST /api/advice`: follow the advice of so many last hours."""

    hours: Annotated[float, Meta(ge=SHORTEST_HOURS, le=LONGEST_HOURS)] = 24.0


class Applied(Struct, frozen=True):
    """What was done about each piece of advice."""

    moves: list[MoveView]


class UsageView(Struct, frozen=True):
    """`GET /api/usage`: from one day of UTC to another, both included; the newest or most first."""

    since: date
    until: date
    by: list[str]
    usage: list[Used]


class HistoryApi:
    """The handlers of finished requests and of numbers over time."""

    def __init__(self, parts: Parts) -> None:
        self._observation = parts.observation
        self._history: History = parts.observation.history
        self._registry = parts.registry
        self._rebalance = parts.rebalance
        self._clock = parts.clock

    @operation(
        gives={200: HistoryPage},
        query=(
            *FILTERS,
            Query("limit", "rows of a page", Limit),
            Query("after", "the `next` of the page before"),
        ),
        errors=(400, 503),
    )
    async def list(self, request: Request) -> Response:
        """Finished requests, newest first; `next` leads to the older ones."""
        limit = _number(request, "limit", PAGE, 1, LARGEST_PAGE)
        wanted, after = self._filter(request), _after(request, 2)
        before = Cursor(*after) if after is not None else None
        rows, cursor = await self._history.page(wanted, limit=int(limit), after=before)
        following = f"{cursor.finished_ms}.{cursor.seq}" if cursor is not None else None
        return reply(HistoryPage(rows, following))

    @operation(gives={200: Choices}, errors=(503,))
    async def choices(self, request: Request) -> Response:
        """The models, agents and clients to filter by."""
        return reply(Choices(**await self._history.choices()))

    @operation(
        gives={200: (Media("text/csv"), Media("application/json", Export))},
        query=(*FILTERS, Query("format", "of the file", Literal["csv", "json"])),
        errors=(400, 503),
    )
    async def export(self, request: Request) -> Response:
        """All finished requests that the filters let through, as a file."""
        form = _format(request)
        rows = self._pages(self._filter(request))
        return _file("requests", form, _csv_of(Finished, rows) if form == "csv" else _json_of(rows))

    @operation(
        gives={200: Statistics},
        query=(
            Query("minutes", "how far back", Minutes),
            Query("agent", "the agent's id; the whole fleet without it"),
        ),
        errors=(400, 404, 503),
    )
    async def statistics(self, request: Request) -> Response:
        """Numbers over time, of the fleet or of one agent."""
        minutes = _number(request, "minutes", 60.0, SHORTEST_MINUTES, LONGEST_MINUTES)
        agent = request.query_params.get("agent")
        name = self._registry.get(agent).id if agent else ""
        points = await self._observation.points(name, minutes * 60, agent=bool(agent))
        return reply(Statistics(minutes, points))

    @operation(
        gives={200: Advice}, query=(Query("hours", "how far back", Hours),), errors=(400, 503)
    )
    async def advice(self, request: Request) -> Response:
        """Which replica or load would have cut waiting most, from what was recorded."""
        hours = _number(request, "hours", 24.0, SHORTEST_HOURS, LONGEST_HOURS)
        return reply(await self._observation.advisor.advice(hours))

    @operation(takes=AppliedHours, gives={200: Applied}, errors=(503,))
    async def apply(self, request: Request) -> Response:
        """Do what the advice proposes, by copies from machine to machine; what was done, and why.

        Where a model has to leave for another one, that is the copy that fewest requests used;
        never the last one, and none that somebody brought within a week.
        """
        wanted = await decode(AppliedHours, request)
        return reply(Applied(await self._rebalance.apply(wanted.hours)))

    @operation(
        gives={200: (Media("application/json", UsageView), Media("text/csv"))},
        query=(
            Query("by", "a row for each `day`, `person`, `key` and `model`, or for some of them"),
            Query("since", "the first day", date),
            Query("until", "the last day", date),
            *(Query(name, f"of this {name} alone") for name in ("person", "key", "model")),
            Query("format", "of the answer", Literal["json", "csv"]),
        ),
        errors=(400, 403, 503),
    )
    async def usage(self, request: Request) -> Response:
        """What each person, key and model used on each day; who may not look on sees its own."""
        query = request.query_params
        by = [name for name in query.get("by", ",".join(DIMENSIONS)).split(",") if name]
        if not by or len({*by}) != len(by) or not {*by} <= {*DIMENSIONS}:
            raise HttpError(400, f"by: give some of {','.join(DIMENSIONS)}, each once")
        if query.get("format", "json") not in ("json", "csv"):
            raise HttpError(400, f"format={query['format']} is not known: give csv or json")
        today = self._clock.utc(self._clock.now()).date()
        until = _day(request, "until", today)
        first = max(until.toordinal() - USAGE_DAYS + 1, date.min.toordinal())
        since = _day(request, "since", date.fromordinal(first))
        only = {name: query[name] for name in ("person", "key") if query.get(name)}
        if model := _model(query.get("model")):
            only["model"] = model
        caller = caller_of(request.scope)
        if not caller.rights & Right.WATCH:
            only |= {"key": caller.key.name} if caller.key else {"person": caller.name, "key": ""}
        rows = await self._history.usage(by, since, until, only)
        if query.get("format", "json") == "json":
            return reply(UsageView(since, until, by, rows))
        return _file("usage", "csv", _usage_csv(by, rows))

    @operation(
        gives={200: (Media("application/json", AuditPage), Media("text/csv"))},
        query=(
            Query("by", "of this client, or with the key of this name"),
            Query("since", "at or after this time", datetime),
            Query("until", "before this time", datetime),
            Query("limit", "rows of a page", Limit),
            Query("after", "the `next` of the page before"),
        ),
        errors=(400, 503),
    )
    async def audit(self, request: Request) -> Response:
        """Who changed what from where, newest first; `next` leads to the older ones."""
        limit = _number(request, "limit", PAGE, 1, LARGEST_PAGE)
        after = _after(request, 1)
        before = after[0] if after is not None else None
        wanted = self._audited(request)
        changes, following = await self._history.changes(int(limit), before=before, **wanted)
        return reply(AuditPage(changes, None if following is None else str(following)))

    @operation(
        gives={200: (Media("text/csv"), Media("application/json", Changes))},
        query=(
            Query("by", "of this client, or with the key of this name"),
            Query("since", "at or after this time", datetime),
            Query("until", "before this time", datetime),
            Query("format", "of the file", Literal["csv", "json"]),
        ),
        errors=(400, 503),
    )
    async def export_audit(self, request: Request) -> Response:
        """All changes that the filters let through, as a file."""
        form = _format(request)
        rows = self._all_changes(self._audited(request))
        lines = _csv_of(Change, rows) if form == "csv" else _json_of(rows)
        return _file("audit", form, lines)

    def _audited(self, request: Request) -> dict[str, Any]:
        by = request.query_params.get("by") or None
        return {"by": by, "since": _time(request, "since"), "until": _time(request, "until")}

    async def _all_changes(self, wanted: dict[str, Any]) -> AsyncIterator[Sequence[Change]]:
        before: int | None = None
        while True:
            rows, before = await self._history.changes(EXPORT_PAGE, before=before, **wanted)
            yield rows
            if before is None:
                return

    # ── reading the query ─────────────────────────────────────────────────────────────────────

    def _filter(self, request: Request) -> Filter:
        query = request.query_params
        agent = query.get("agent") or None
        is_id = agent is not None and self._registry.find(AgentId(agent)) is not None
        status = query.get("status") or None
        if status is not None and status not in {known.value for known in Status}:
            known = ", ".join(known.value for known in Status)
            raise HttpError(400, f"status={status} is not known: give one of {known}")
        return Filter(
            model=_model(query.get("model")),
            agent=None if is_id else agent,
            agent_id=agent if is_id else None,
            client=query.get("client") or None,
            status=status,
            since=_time(request, "since"),
            until=_time(request, "until"),
        )

    # ── writing all of it ─────────────────────────────────────────────────────────────────────

    async def _pages(self, wanted: Filter) -> AsyncIterator[Sequence[Finished]]:
        after: Cursor | None = None
        while True:
            rows, after = await self._history.page(wanted, limit=EXPORT_PAGE, after=after)
            yield rows
            if after is None:
                return


def _file(name: str, form: str, lines: AsyncIterator[str | bytes]) -> Response:
    kind = "text/csv; charset=utf-8" if form == "csv" else "application/json; charset=utf-8"
    headers = {"content-disposition": f'attachment; filename="{name}.{form}"'}
    return StreamingResponse(lines, media_type=kind, headers=headers)


async def _csv_of(
    kind: type[Struct], pages: AsyncIterator[Sequence[Struct]]
) -> AsyncIterator[str | bytes]:
    yield _csv_lines([kind.__struct_fields__])
    async for rows in pages:
        yield _csv_lines(map(_plain, msgspec.to_builtins(row).values()) for row in rows)


async def _usage_csv(by: Sequence[str], rows: Sequence[Used]) -> AsyncIterator[str | bytes]:
    """In slices: tens of thousands of rows take half a second."""
    columns = (*by, "requests", "prompt_tokens", "output_tokens", "gpu_seconds")
    slices = Slices()
    yield _csv_lines([columns])
    for start in range(0, len(rows), EXPORT_PAGE):
        page = rows[start : start + EXPORT_PAGE]
        yield _csv_lines([getattr(row, name) for name in columns] for row in page)
        await slices.pause()


async def _json_of(pages: AsyncIterator[Sequence[Struct]]) -> AsyncIterator[str | bytes]:
    separator = b"["
    async for rows in pages:
        for row in rows:
            yield separator + msgspec.json.encode(row)
            separator = b",\n"
    yield b"[]" if separator == b"[" else b"]"


def _plain(value: Any) -> Any:
    return msgspec.json.encode(value).decode() if isinstance(value, dict) else value


def _csv_lines(rows: Iterable[Iterable[Any]]) -> str:
    """RFC 4180; a text that a spreadsheet would take for a formula gets a quote before it."""
    text = StringIO(newline="")
    csv.writer(text).writerows(map(_harmless, row) for row in rows)
    return text.getvalue()


def _harmless(value: Any) -> Any:
    starts = ("=", "+", "-", "@", "\t", "\r")
    return "'" + value if isinstance(value, str) and value.startswith(starts) else value


def _model(name: str | None) -> str | None:
    """A model's name in any spelling as the history has it."""
    if not name:
        return None
    try:
        return ModelName.parse(ModelName.parse(name).key).short
    except InvalidModelName:
        return name


def _number(request: Request, name: str, default: float, least: float, most: float) -> float:
    text = request.query_params.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value <= most:
        raise HttpError(400, f"{name}={text} does not work: give {least:g} to {most:g}")
    return value


def _time(request: Request, name: str) -> datetime | None:
    text = request.query_params.get(name)
    if not text:
        return None
    try:
        at = datetime.fromisoformat(text)
    except ValueError as exc:
        hint = "give a time such as 2026-01-31T08:00:00Z"
        raise HttpError(400, f"{name}={text} does not work: {hint}") from exc
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def _day(request: Request, name: str, default: date) -> date:
    text = request.query_params.get(name)
    if not text:
        return default
    try:
        return date.fromisoformat(text)
    except ValueError as exc:
        raise HttpError(400, f"{name}={text} does not work: give a day such as 2026-01-31") from exc


def _format(request: Request) -> str:
    form = request.query_params.get("format", "csv")
    if form not in ("csv", "json"):
        raise HttpError(400, f"format={form} is not known: give csv or json")
    return form


def _after(request: Request, count: int) -> list[int] | None:
    """The `after` of a page: so many numbers, with dots between them.

    Raises:
        HttpError: 400, it is none of ours.
    """
    text = request.query_params.get("after")
    if not text:
        return None
    numbers = text.split(".")
    if len(numbers) != count or not all(map(_is_number, numbers)):
        raise HttpError(400, "after does not work: give the `next` of the page before")
    return [int(number) for number in numbers]


def _is_number(text: str) -> bool:
    """Whether a database has such numbers, too: they have 64 bits there."""
    return text.isascii() and text.isdigit() and len(text) < 19
