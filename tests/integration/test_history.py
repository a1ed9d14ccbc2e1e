"""What has been: request by request, over time, across restarts, and out of it as a file."""

import asyncio
import csv
import io
import re
import time
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ollama_coordinator.db import DatabaseError, Filter, Finished, StoredBucket, Used
from ollama_coordinator.db.database import Database
from ollama_coordinator.journal.observation import SETTLED_SECONDS
from support.coordinator import Running, running
from support.databases import Space, SqliteFile
from support.ollama import StandIn
from support.past import past


@pytest.fixture
async def coordinator(database: Space) -> AsyncIterator[Running]:
    """An empty coordinator, with each kind of database."""
    async with running(database_url=database.url) as coordinator:
        yield coordinator


async def remember(coordinator: Running, requests: list[Finished]) -> None:
    """Put finished requests into the history."""
    history = coordinator.parts.observation.history
    for start in range(0, len(requests), 10_000):
        for request in requests[start : start + 10_000]:
            history.note(request, [])
        assert await history.write(())


async def everything(coordinator: Running, query: str = "", limit: int = 500) -> list[Any]:
    """All pages."""
    rows: list[Any] = []
    after = ""
    while True:
        page = await coordinator.get(f"/api/history?limit={limit}{after}{query}")
        rows += page["requests"]
        if page["next"] is None:
            return rows
        after = f"&after={page['next']}"


@pytest.mark.spec("DASH-7")
async def test_every_end_is_in_the_history_newest_first(
    coordinator: Running, ollama: StandIn
) -> None:
    assert (await coordinator.chat())[0] == 200
    async with coordinator.stream() as answer:
        await answer.read()
    assert (await coordinator.chat(model="nonesuch"))[0] == 404
    with ollama.faults.status(500, "boom"):
        assert (await coordinator.chat())[0] == 500
    with ollama.faults.fin():
        assert (await coordinator.chat())[0] == 503
    rows = (await coordinator.get("/api/history"))["requests"]
    told = [(row["status"], row["http_status"]) for row in rows]
    assert told == [
        ("failed", 503), ("failed", 500), ("refused", 404), ("served", 200), ("served", 200),
    ]  # fmt: skip
    streamed = rows[3]
    assert (streamed["model"], streamed["agent"]) == ("llama3.2:latest", "first")
    assert streamed["output_tokens"] == 16
    assert streamed["streamed"] is True
    assert 0 <= streamed["waited_seconds"] <= streamed["first_token_seconds"]
    assert streamed["first_token_seconds"] <= streamed["total_seconds"]
    assert "nonesuch" in rows[2]["error"]


@pytest.mark.spec("DASH-7")
async def test_a_client_that_left_is_cancelled(coordinator: Running, ollama: StandIn) -> None:
    ollama.hold(after=1)
    async with coordinator.stream() as answer:
        await answer.content.readline()
    await coordinator.until(coordinator.at_rest)
    (row,) = (await coordinator.get("/api/history"))["requests"]
    assert row["status"] == "cancelled"


@pytest.mark.spec("DASH-7")
async def test_the_history_survives_a_restart_with_its_reasons(database: Space) -> None:
    async with StandIn() as ollama:
        async with running(database_url=database.url) as coordinator:
            await coordinator.register(ollama, "first")
            await coordinator.chat()
        async with running(database_url=database.url) as coordinator:
            (row,) = (await coordinator.get("/api/history"))["requests"]
            told = await coordinator.get(f"/api/requests/{row['id']}")
            assert told["attempts"][0]["agent"] == "first"


@pytest.mark.spec("DASH-8")
async def test_pages_miss_nothing_and_repeat_nothing(coordinator: Running) -> None:
    same_time = past(1).finished_at
    await remember(coordinator, [past(n, finished_at=same_time) for n in range(30)])
    await remember(coordinator, [past(n) for n in range(30, 60)])
    rows = await everything(coordinator, limit=7)
    assert len(rows) == 60
    assert len({row["id"] for row in rows}) == 60
    assert [row["finished_at"] for row in rows] == sorted(
        (row["finished_at"] for row in rows), reverse=True
    )


@pytest.mark.spec("DASH-8")
async def test_filters_can_be_put_together(coordinator: Running) -> None:
    await remember(coordinator, [past(n) for n in range(210)])
    assert len(await everything(coordinator, "&model=LLAMA3.2")) == 70
    assert len(await everything(coordinator, "&agent=machine-3")) == 30
    assert len(await everything(coordinator, "&status=failed")) == 42
    assert len(await everything(coordinator, "&client=10.0.0.49")) == 4
    both = await everything(coordinator, "&model=llama3.2&agent=machine-3")
    assert {(row["model"], row["agent"]) for row in both} == {("llama3.2:latest", "machine-3")}
    minute = "&since=2026-01-31T12:01:00Z&until=2026-01-31T12:02:00Z"
    assert len(await everything(coordinator, minute)) == 60
    choices = await coordinator.get("/api/history/choices")
    assert choices["model"] == ["gemma3:12b", "llama3.2:latest", "qwen3:8b"]
    assert len(choices["agent"]) == 7


@pytest.mark.spec("DASH-8")
async def test_an_agent_is_found_by_its_id_too(coordinator: Running, ollama: StandIn) -> None:
    await coordinator.chat()
    (agent,) = await coordinator.get("/api/agents")
    assert len(await everything(coordinator, f"&agent={agent['id']}")) == 1


@pytest.mark.spec("DASH-9")
async def test_every_page_and_filter_follows_an_index_in_order(
    coordinator: Running, database: Space
) -> None:
    await remember(coordinator, [past(n) for n in range(300)])
    plans: dict[str, str] = {}

    def watch(db: Database) -> None:
        query = db.query

        def explained(sql: str, values: Sequence[Any] = ()) -> list[dict[str, Any]]:
            if "FROM requests" in sql and "ORDER BY" in sql:
                plans[sql] = database.plan(query, sql, values)
            return query(sql, values)

        db.query = explained  # type: ignore[method-assign]

    await coordinator.parts.store.run(watch)
    last = f"&after={past(200).finished_at.timestamp() * 1000:.0f}.0"
    filters = ("", "&model=qwen3:8b", "&agent=machine-3", "&client=10.0.0.7", "&status=failed")
    for query in (*filters, "&model=qwen3:8b&client=10.0.0.7&status=failed"):
        for after in ("", last):
            await coordinator.get(f"/api/history?limit=50{query}{after}")
    assert len(plans) == 12
    for sql, plan in plans.items():
        # Requests of one millisecond may be sorted, not all that an index has in order.
        assert re.search(r"INDEX|Index Scan", plan), (sql, plan)
        assert not re.search(r"TEMP B-TREE|(?<!Incremental )Sort  \(|Seq Scan", plan), (sql, plan)


@pytest.mark.spec("DASH-10")
async def test_only_the_newest_are_kept() -> None:
    async with running(history_rows=50, history_days=365_000.0) as coordinator:
        await remember(coordinator, [past(n) for n in range(120)])
        await coordinator.parts.observation.prune()
        rows = await everything(coordinator)
        assert len(rows) == 50
        assert rows[0]["id"] == past(119).id
    async with running(history_days=0.01) as coordinator:
        coordinator.parts.clock.started_at -= SETTLED_SECONDS
        await remember(coordinator, [past(n) for n in range(10)])
        await coordinator.parts.observation.prune()
        assert await everything(coordinator) == []


@pytest.mark.spec("OPERATION-50")
async def test_a_wall_clock_that_may_be_wrong_deletes_no_history() -> None:
    async with running(history_days=0.01) as coordinator:
        await remember(coordinator, [past(n) for n in range(10)])
        clock = coordinator.parts.clock
        await coordinator.parts.observation.prune()
        assert len(await everything(coordinator)) == 10
        clock.started_at -= SETTLED_SECONDS
        clock.stepped_at = clock.now()
        await coordinator.parts.observation.prune()
        assert len(await everything(coordinator)) == 10
        clock.stepped_at -= SETTLED_SECONDS
        await coordinator.parts.observation.prune()
        assert await everything(coordinator) == []


@pytest.mark.spec("OPERATION-52")
async def test_old_history_is_deleted_a_little_at_a_time(
    database: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ollama_coordinator.db.history.ROWS_AT_ONCE", 10)
    async with running(database_url=database.url, history_rows=1) as coordinator:
        await remember(coordinator, [past(n) for n in range(100)])
        observation, store = coordinator.parts.observation, coordinator.parts.store
        buckets = [StoredBucket(10, n, name, b"{}") for n in range(25) for name in ("", "a")]
        await observation.history.write(buckets)
        coordinator.parts.clock.started_at -= SETTLED_SECONDS
        pruning = asyncio.create_task(observation.prune())
        left = [100]
        while left[-1] > 1:
            left += await store.run(rows)
        await pruning
        # Whoever asks meanwhile is answered between two deletions, of ten rows each.
        assert max(before - after for before, after in pairwise(left)) <= 20
        assert len(left) > 5
        assert await observation.history.buckets(10, "", 0, 25) == []
        assert await observation.history.buckets(10, "a", 0, 25) == []


def rows(db: Database) -> list[int]:
    return [row["n"] for row in db.query("SELECT count(*) AS n FROM requests")]


@pytest.mark.spec("OPERATION-50")
async def test_requests_before_the_clock_was_set_have_the_times_of_the_set_clock(
    database: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ollama_coordinator.db.history.ROWS_AT_ONCE", 2)
    async with running(database_url=database.url) as coordinator:
        await remember(coordinator, [past(1)])
    async with running(database_url=database.url) as coordinator, StandIn() as ollama:
        await coordinator.register(ollama)
        wall, ahead = time.time, [0.0]
        monkeypatch.setattr(time, "time", lambda: wall() + ahead[0])
        clock, observation = coordinator.parts.clock, coordinator.parts.observation
        began = datetime.now(UTC)
        for hours in (0, 24, 48):  # set twice, before and after rows are written
            ahead[0] = hours * 3600.0
            clock.utc(clock.now())
            for _ in range(3):
                await coordinator.chat()
            if hours:
                await observation.follow_clock()
        ended = await everything(coordinator)
        assert ended[-1]["id"] == past(1).id
        assert ended[-1]["finished_at"] == past(1).finished_at.isoformat().replace("+00:00", "Z")
        assert len(ended) == 10
        for row in ended[:9]:
            shown = await coordinator.get(f"/api/requests/{row['id']}")
            times = [row["arrived_at"], row["finished_at"], shown["attempts"][0]["granted_at"]]
            for at in [datetime.fromisoformat(text) for text in times]:
                assert abs(at - began - timedelta(hours=48)) < timedelta(minutes=10)
        # What is known of the last ones in memory says the same as the database.
        recent = {one.request.id: one.request for one in observation.journal.recent}
        for row in ended[:9]:
            known = await observation.history.find(row["id"])
            assert known is not None
            assert abs(known[0].finished_at - recent[row["id"]].finished_at).total_seconds() < 0.01


@pytest.mark.spec("OPERATION-50")
async def test_usage_and_changes_before_the_clock_was_set_have_the_days_of_the_set_clock(
    database: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ollama_coordinator.db.history.ROWS_AT_ONCE", 2)
    wall, ahead = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: wall() + ahead[0])
    began = datetime.now(UTC)
    async with StandIn() as ollama:
        for hours in ((0,), (0, 24, 72)):  # the clock of the second process is set twice
            async with running(database_url=database.url) as coordinator:
                await coordinator.register(ollama)
                clock, observation = coordinator.parts.clock, coordinator.parts.observation
                for number in hours:
                    ahead[0] = number * 3600.0
                    clock.utc(clock.now())
                    for queue in range(5, 8):
                        assert (await coordinator.chat())[0] == 200
                        url = f"{coordinator.url}/api/settings"
                        await coordinator.session.patch(url, json={"max_queue": queue})
                    await observation.follow_clock()
                    if number < 24:  # what is written by then, and what is not
                        assert await observation.history.write(())
                used = (await coordinator.get("/api/usage?by=day"))["usage"]
                audit = (await coordinator.get("/api/audit"))["changes"]
    days = [datetime.fromisoformat(one["day"]).replace(tzinfo=UTC) - began for one in used]
    of_now = [one for one, after in zip(used, days, strict=True) if after < timedelta(days=2)]
    later = [one for one, after in zip(used, days, strict=True) if after > timedelta(days=2)]
    assert sum(one["requests"] for one in of_now) == 3
    assert sum(one["requests"] for one in later) == 9
    assert len({one["output_tokens"] / one["requests"] for one in used}) == 1
    assert all(one["gpu_seconds"] > 0 for one in used)
    changed = [
        datetime.fromisoformat(one["at"]) - began for one in audit if "settings" in one["action"]
    ]
    assert [after > timedelta(days=2.9) for after in changed] == [True] * 9 + [False] * 3
    assert max(changed) < timedelta(days=3.1)


@pytest.mark.spec("OPERATION-50")
@pytest.mark.parametrize(
    ("column", "value"), [("used", "["), ("used", "[1]"), ("prompt_tokens", "many")]
)
async def test_a_damaged_row_holds_up_no_correction(
    tmp_path: Path, column: str, value: str
) -> None:
    database = SqliteFile(tmp_path / "a.db")
    async with running(database_url=database.url) as coordinator:
        history = coordinator.parts.observation.history
        for number in range(3):
            request = past(number, prompt_tokens=10)
            used = Used("2026-01-31", "anna", "k", request.model, 1, 10, 100, 0.5)
            history.note(request, [], used)
        assert await history.write(())
        database.ask(f"UPDATE requests SET {column} = '{value}' WHERE seq = 2")  # noqa: S608
        coordinator.parts.clock.stepped_by = 86_400.0
        await coordinator.parts.observation.follow_clock()
        days = await history.usage(["day"], date(2026, 1, 1), date(2026, 3, 1), {})
        assert {one.day: one.requests for one in days} == {"2026-02-01": 2, "2026-01-31": 1}


@pytest.mark.spec("OPERATION-50")
async def test_a_correction_that_the_database_refused_is_made_later(
    database: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ollama_coordinator.db.history.ROWS_AT_ONCE", 1)
    async with running(database_url=database.url) as coordinator:
        await remember(coordinator, [past(n) for n in range(5)])
        observation, store = coordinator.parts.observation, coordinator.parts.store
        await store.run(database.stop_writing)
        coordinator.parts.clock.stepped_by = 3600.0
        with pytest.raises(DatabaseError):
            await observation.follow_clock()
        await store.run(database.mend)
        await observation.follow_clock()
        page, _ = await observation.history.page(Filter(), limit=10)
        later = [past(number).finished_at + timedelta(hours=1) for number in range(5)]
        assert [one.finished_at for one in reversed(page)] == later


@pytest.mark.spec("DASH-11")
async def test_the_history_is_exported_whole(coordinator: Running) -> None:
    wild = past(2500, client='=HYPERLINK("http://example")', error='said "no", twice')
    await remember(coordinator, [*(past(n) for n in range(2500)), wild])
    async with coordinator.session.get(
        f"{coordinator.url}/api/history/export?format=csv"
    ) as response:
        assert response.headers["content-disposition"].endswith('"requests.csv"')
        rows = list(csv.DictReader(io.StringIO(await response.text(), newline="")))
    assert len(rows) == 2501
    assert rows[0]["client"].startswith("'=HYPERLINK")
    assert rows[0]["error"] == 'said "no", twice'
    listed = await coordinator.get("/api/history/export?format=json&status=failed")
    assert {row["status"] for row in listed} == {"failed"}
    assert await coordinator.get("/api/history/export?format=json&client=nobody") == []


@pytest.mark.spec("DASH-12")
@pytest.mark.parametrize(
    ("column", "value", "in_list"),
    [
        ("why", b"not packed", False),
        ("why", '[{"broken', False),
        ("status", "lost", True),
        ("finished_ms", 2**62, True),
    ],
)
async def test_a_damaged_row_is_an_error_that_says_what_to_do(
    coordinator: Running, column: str, value: object, *, in_list: bool
) -> None:
    request = past(1)
    await remember(coordinator, [request])
    sql = f"UPDATE requests SET {column} = ?"  # noqa: S608
    await coordinator.parts.store.run(lambda db: db.execute(sql, [value]))
    for path, damaged in ((f"/api/requests/{request.id}", True), ("/api/history", in_list)):
        async with coordinator.session.get(coordinator.url + path) as response:
            assert response.status == (503 if damaged else 200)
            assert ("a row is damaged" in await response.text()) == damaged


@pytest.mark.spec("DASH-12")
async def test_requests_go_on_while_the_database_does_not(
    coordinator: Running, ollama: StandIn
) -> None:
    store = coordinator.parts.store
    await store.run(lambda db: db.execute("ALTER TABLE requests RENAME TO elsewhere"))
    assert (await coordinator.chat())[0] == 200
    assert not await coordinator.parts.observation.history.write(())
    await store.run(lambda db: db.execute("ALTER TABLE elsewhere RENAME TO requests"))
    assert len(await everything(coordinator)) == 1


@pytest.mark.spec("DASH-13")
async def test_statistics_count_what_happened(coordinator: Running, ollama: StandIn) -> None:
    for _ in range(3):
        async with coordinator.stream() as answer:
            await answer.read()
    await coordinator.chat(model="nonesuch")
    (agent,) = await coordinator.get("/api/agents")
    for query, ended in (("", 4), (f"&agent={agent['id']}", 3)):
        points = (await coordinator.get(f"/api/statistics?minutes=15{query}"))["points"]
        assert sum(point["requests"] for point in points) == ended
        assert sum(point["output_tokens"] for point in points) == 48
        assert points[-1]["first_token_p50"] <= points[-1]["first_token_p95"] < 5
    for minutes in (1, 15, 60, 360, 1440, 10_080, 44_640):
        points = (await coordinator.get(f"/api/statistics?minutes={minutes}"))["points"]
        assert len(points) <= 130
        assert sum(point["requests"] for point in points) == 4


@pytest.mark.spec("DASH-13")
async def test_statistics_sample_the_queue_and_the_machines() -> None:
    async with running() as coordinator, StandIn() as ollama:
        agent = await coordinator.register(ollama, "single")
        gpu = {
            "name": "G", "memory_total_bytes": 100, "memory_used_bytes": 25,
            "utilization_percent": 50, "temperature_celsius": 70,
        }  # fmt: skip
        await coordinator.heartbeat(agent, runner={"num_parallel": 1}, gpus=[gpu], cpu_usage=20)
        ollama.hold(after=0)
        chats = [asyncio.create_task(coordinator.chat()) for _ in range(2)]
        journal = coordinator.parts.observation.journal
        await coordinator.until(lambda: journal.waiting() == 1)
        sampler = coordinator.parts.observation.sampler
        sampler.sparklines.number = 0
        sampler.sample(journal.live)
        fleet = (await coordinator.get("/api/statistics?minutes=15"))["points"][-1]
        mine = (await coordinator.get(f"/api/statistics?minutes=15&agent={agent}"))["points"][-1]
        ollama.release()
        await asyncio.gather(*chats)
    assert (fleet["waiting_most"], fleet["in_flight_most"]) == (1, 1)
    for one in (mine, fleet):
        assert (one["cpu_percent"], one["gpu_percent"], one["vram_percent"]) == (20, 50, 25)
        assert one["temperature_celsius"] == 70


@pytest.mark.spec("DASH-14")
async def test_statistics_go_on_after_a_restart(database: Space) -> None:
    async with StandIn() as ollama:
        for expected in (1, 2, 3):
            async with running(database_url=database.url) as coordinator:
                await coordinator.register(ollama, "first")
                assert (await coordinator.chat())[0] == 200
                for minutes in (15, 60, 1440):
                    path = f"/api/statistics?minutes={minutes}"
                    points = (await coordinator.get(path))["points"]
                    assert sum(point["requests"] for point in points) == expected


@pytest.mark.spec("DASH-15")
@pytest.mark.parametrize(
    "query",
    [
        "history?limit=0", "history?limit=many", "history?after=x", "history?status=fine",
        "history?since=yesterday", "history/export?format=xml", "statistics?minutes=0",
        "statistics?minutes=nan", "history?after=%C2%B2.1", "history?after=1.%D9%A1",
        f"history?after={'9' * 4400}.1", f"history?after=1.{'9' * 30}", "history?after=1.2.3",
        "history?after=1", "audit?after=1.2", f"audit?after={'9' * 30}",
    ],
    ids=lambda query: query[:24],
)  # fmt: skip
async def test_a_wrong_parameter_is_answered_400(coordinator: Running, query: str) -> None:
    async with coordinator.session.get(f"{coordinator.url}/api/{query}") as response:
        assert response.status == 400
        assert "give" in (await response.json())["error"]


@pytest.mark.spec("DASH-13")
async def test_statistics_of_an_unknown_agent_are_404(coordinator: Running) -> None:
    url = f"{coordinator.url}/api/statistics?agent=nobody"
    async with coordinator.session.get(url) as response:
        assert response.status == 404


@pytest.mark.spec("DASH-7")
async def test_a_prompt_whose_length_nobody_told_is_not_shown_as_none(
    coordinator: Running,
) -> None:
    async with StandIn() as ollama:
        await coordinator.register(ollama, "first")
        async with coordinator.stream("/v1/chat/completions") as response:
            assert response.status == 200
            await response.read()
        await coordinator.until(lambda: coordinator.parts.observation.journal.recent)
        ended = coordinator.parts.observation.journal.recent[-1].request
        assert ended.prompt_tokens is None
        assert ended.output_tokens
