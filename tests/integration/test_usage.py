"""Usage by person, key, model and day, on real sockets and on both kinds of database."""

import asyncio
import csv
import io
from datetime import UTC, date, datetime, timedelta
from time import thread_time
from typing import Any

import pytest
from msgspec import structs
from typer.testing import CliRunner

from ollama_coordinator.access import NewKey
from ollama_coordinator.db import Filter, History, Used, usage
from ollama_coordinator.main import app
from support.coordinator import Running, running
from support.databases import Space, slow, store_of
from support.ollama import Model, StandIn
from support.past import past

PROXIED: dict[str, Any] = {"trusted_proxies": ("127.0.0.1",), "access": "keys"}


def made(coordinator: Running, name: str, **more: Any) -> dict[str, str]:
    """The header of a new key."""
    _, text = coordinator.parts.access.keys.create(NewKey(name=name, **more))
    return {"Authorization": f"Bearer {text}"}


async def chat(coordinator: Running, headers: dict[str, str], model: str = "llama3.2") -> None:
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "stream": False}
    url = f"{coordinator.url}/api/chat"
    async with coordinator.session.post(url, json=body, headers=headers) as answer:
        assert answer.status == 200, await answer.text()


async def used(
    coordinator: Running, headers: dict[str, str], query: str = ""
) -> list[dict[str, Any]]:
    url = f"{coordinator.url}/api/usage?{query}"
    async with coordinator.session.get(url, headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        return list((await answer.json())["usage"])


def counted(rows: list[dict[str, Any]], *names: str) -> dict[tuple[str, ...], int]:
    return {tuple(row[name] for name in names): row["requests"] for row in rows}


@pytest.mark.spec("ACCESS-27")
async def test_each_request_counts_once_for_its_person_key_model_and_day(database: Space) -> None:
    models = [Model("llama3.2"), Model("qwen3")]
    async with StandIn(models) as ollama:
        async with running(database_url=database.url, **PROXIED) as coordinator:
            anna, boss = made(coordinator, "anna"), made(coordinator, "boss", rights=("operate",))
            webui = made(coordinator, "webui", names_users=True)
            coordinator.session.headers.update(boss)
            await coordinator.register(ollama)
            for headers, model in (
                (anna, "llama3.2"), (anna, "llama3.2"), (anna, "qwen3"),
                ({**webui, "X-OpenWebUI-User-Email": "bob@example.org"}, "qwen3"),
                ({**webui, "X-OpenWebUI-User-Email": "eve@example.org"}, "qwen3"),
                ({**anna, "X-OpenWebUI-User-Email": "bob@example.org"}, "qwen3"),  # who may not
            ):  # fmt: skip
                await chat(coordinator, headers, model)
            # A request that nobody could serve has used nothing.
            assert (await coordinator.chat("unknown"))[0] == 404
            today = datetime.now(UTC).date().isoformat()
            rows = await used(coordinator, boss)
            assert counted(rows, "person", "key", "model") == {
                ("anna", "anna", "llama3.2:latest"): 2,
                ("anna", "anna", "qwen3:latest"): 2,
                ("bob@example.org", "webui", "qwen3:latest"): 1,
                ("eve@example.org", "webui", "qwen3:latest"): 1,
            }
            assert {row["day"] for row in rows} <= {today, _before(today)}
            for row in rows:
                assert row["prompt_tokens"] > 0
                assert row["output_tokens"] > 0
                assert row["gpu_seconds"] > 0
        async with running(database_url=database.url, **PROXIED) as coordinator:
            await coordinator.until(lambda: bool(list(coordinator.parts.registry)))
            rows = await used(coordinator, boss, "by=key")
            assert counted(rows, "key") == {("anna",): 4, ("webui",): 2}
            rows = await used(coordinator, boss, "by=person&key=webui&model=qwen3:latest")
            assert counted(rows, "person") == {("bob@example.org",): 1, ("eve@example.org",): 1}
            # Who may not look on sees its own alone.
            rows = await used(coordinator, anna, "by=key,person&key=webui")
            assert counted(rows, "key", "person") == {("anna", "anna"): 4}
            history = await used(coordinator, boss, "until=2020-01-01&since=2019-01-01")
            assert history == []


def _before(day: str) -> str:
    return (date.fromisoformat(day) - timedelta(days=1)).isoformat()


@pytest.mark.spec("ACCESS-27")
@pytest.mark.parametrize(
    ("setting", "person"), [("people", "127.0.0.1"), ("keys", ""), ("off", None)]
)
async def test_a_setting_says_of_whom_it_is_kept(setting: str, person: str | None) -> None:
    async with running(usage=setting) as coordinator, StandIn() as ollama:
        await coordinator.register(ollama)
        await coordinator.chat()
        rows = await used(coordinator, {}, "by=person")
        assert [row["person"] for row in rows] == ([] if person is None else [person])
        url = f"{coordinator.url}/api/settings"
        async with coordinator.session.patch(url, json={"usage": "people"}) as answer:
            assert answer.status == 200
        await coordinator.chat()
        assert "127.0.0.1" in [row["person"] for row in await used(coordinator, {}, "by=person")]


@pytest.mark.spec("ACCESS-27")
async def test_it_is_a_file_and_a_table_and_what_is_asked_wrongly_is_refused() -> None:
    async with running() as coordinator, StandIn() as ollama:
        await coordinator.register(ollama)
        await coordinator.chat()
        url = f"{coordinator.url}/api/usage"
        async with coordinator.session.get(f"{url}?format=csv&by=day,model") as answer:
            assert answer.content_type == "text/csv"
            head, row = csv.reader(io.StringIO(await answer.text()))
        sums = ["requests", "prompt_tokens", "output_tokens", "gpu_seconds"]
        assert head == ["day", "model", *sums]
        assert row[1:3] == ["llama3.2:latest", "1"]
        for query in ("by=", "by=day,day", "by=client", "since=yesterday", "format=xml"):
            async with coordinator.session.get(f"{url}?{query}") as answer:
                assert answer.status == 400, query
        for query in ("until=0001-01-05", "since=0001-01-01&until=9999-12-31"):
            async with coordinator.session.get(f"{url}?{query}") as answer:
                assert answer.status == 200, query
        runner = CliRunner(env={"COORDINATOR_URL": coordinator.url, "COLUMNS": "120"})
        done = await asyncio.to_thread(runner.invoke, app, ["usage", "--by", "model"])
        assert done.exit_code == 0, done.output
        assert "llama3.2" in done.stdout
        done = await asyncio.to_thread(runner.invoke, app, ["usage", "--csv"])
        assert done.stdout.startswith("day,person,key,model,requests")


@pytest.mark.spec("OPERATION-30")
async def test_a_large_table_is_written_while_others_are_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [spent(f"person {number}") for number in range(usage.MOST_ROWS)]
    async with running() as coordinator:

        async def all_of_them(*_: object) -> list[Used]:
            return rows

        monkeypatch.setattr(coordinator.parts.observation.history, "usage", all_of_them)
        longest = 0.0
        written = asyncio.Event()

        async def others() -> None:
            nonlocal longest
            while not written.is_set():
                before = thread_time()
                await asyncio.sleep(0)
                longest = max(longest, thread_time() - before)

        beside = asyncio.create_task(others())
        async with coordinator.session.get(f"{coordinator.url}/api/usage?format=csv") as answer:
            text = await answer.read()
        written.set()
        await beside
        assert text.count(b"\n") == len(rows) + 1
        assert longest < 0.2, "processor time between two turns of the loop"


def spent(person: str, day: str = "2026-01-31") -> Used:
    return Used(day, person, "k", "m", 1, 10, 20, 0.5)


@pytest.mark.spec("ACCESS-27")
async def test_what_fails_or_is_cancelled_is_written_and_counted_once(database: Space) -> None:
    async with store_of(database) as store:
        history = History(store)
        history.note(past(1), [], spent("anna"))
        await store.run(database.stop_writing)
        assert not await history.write(())
        await store.run(database.mend)
        blocking = asyncio.create_task(store.run(slow))
        writing = asyncio.create_task(history.write(()))
        await asyncio.sleep(0)  # the database's thread has both by now, and does the second too
        await asyncio.sleep(0)
        writing.cancel()
        await asyncio.gather(writing, blocking, return_exceptions=True)
        for number in (2, 3):
            history.note(past(number), [], spent("anna"))
            assert await history.write(())
        days = date(2026, 1, 1), date(2026, 12, 31)
        [row] = await history.usage(["person"], *days, {})
        assert structs.astuple(row)[4:] == (3, 30, 60, 1.5)
        assert len((await history.page(Filter(), limit=9))[0]) == 3


@pytest.mark.spec("ACCESS-27")
async def test_rows_are_bounded_and_pruned_with_the_history(
    database: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "MOST_ROWS_A_DAY", 3)
    async with store_of(database) as store:
        history = History(store)
        for number in range(8):
            history.note(past(number), [], spent(f"person-{number}"))
            if number % 3 == 0:
                assert await history.write(())
        history.note(past(9), [], spent("person-0"))
        history.note(past(10), [], spent("late", "2026-02-01"))
        days = date(2026, 1, 1), date(2026, 12, 31)
        rows = await history.usage(["person"], *days, {"day": "2026-01-31"})
        assert {row.person: row.requests for row in rows} == {
            "person-0": 2, "person-1": 1, "person-2": 1, "(others)": 5,
        }  # fmt: skip
        now = datetime(2026, 2, 28, 12, tzinfo=UTC)
        await history.prune_before(now - timedelta(days=27.5))
        rows = await history.usage(["person", "day"], *days, {})
        assert [row.person for row in rows] == ["late"]
        assert sum(row.requests for row in rows) == 1
