"""Changes by an operator while the database fails, goes away and comes back."""

import time
from contextlib import suppress
from typing import Any

import pytest

from ollama_coordinator.db import DatabaseError
from support.coordinator import Running, running
from support.databases import PostgresSchema, Space
from support.line import Line
from support.ollama import StandIn

ALIAS = {"name": "fast", "models": ["llama3.2"]}


async def sent(coordinator: Running, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    url = f"{coordinator.url}{path}"
    async with coordinator.session.request(method, url, json=body) as answer:
        return answer.status, await answer.json(content_type=None) if answer.status != 204 else None


async def in_force(coordinator: Running) -> set[str]:
    """The names of the keys that are not revoked."""
    keys = (await coordinator.get("/api/keys"))["keys"]
    return {key["name"] for key in keys if key["revoked_at"] is None}


@pytest.mark.spec("OPERATION-99")
async def test_a_change_that_is_not_written_is_not_answered_as_done(
    database: Space, ollama: StandIn
) -> None:
    async with running(database_url=database.url) as coordinator:
        await coordinator.register(ollama)
        made = {}
        for name in ("old", "kept"):
            _, made[name] = await sent(coordinator, "POST", "/api/keys", {"name": name})
        store = coordinator.parts.store
        await store.run(database.stop_writing)
        for changed in (
            ("POST", "/api/keys", {"name": "new"}),
            ("POST", "/api/keys", {"name": "rack", "rights": ["join"]}),
            ("DELETE", "/api/keys/old"),
            ("PATCH", "/api/settings", {"max_queue": 7}),
            ("POST", "/api/aliases", ALIAS),
        ):
            status, answer = await sent(coordinator, *changed)
            assert status == 503, changed
            assert "ask once more to be sure" in answer["error"]
            assert "oc_" not in str(answer)
        # A key that nobody was given is none; what ends one, and what was set, counts at once.
        assert await in_force(coordinator) == {"kept"}
        keys = coordinator.parts.access.keys
        assert keys.by_secret(made["old"]["key"].encode(), time.time()) is None
        assert keys.by_secret(made["kept"]["key"].encode(), time.time()) is not None
        assert coordinator.parts.settings.config.max_queue == 7
        await store.run(database.mend)
        for changed in (
            ("POST", "/api/keys", {"name": "new"}),
            ("DELETE", "/api/keys/old"),
            ("POST", "/api/aliases", ALIAS),
        ):
            assert (await sent(coordinator, *changed))[0] in (200, 201), changed
        changes = (await coordinator.get("/api/audit"))["changes"]
        assert {one["http_status"] for one in changes if "keys" in one["action"]} == {200, 201, 503}
    async with running(database_url=database.url) as coordinator:
        assert await in_force(coordinator) == {"new", "kept"}
        assert coordinator.parts.settings.config.max_queue == 7
        assert [one["name"] for one in (await coordinator.get("/api/aliases"))["aliases"]] == [
            "fast"
        ]


@pytest.mark.spec("OPERATION-99")
@pytest.mark.parametrize("how", ["cut", "freeze"])
async def test_keys_made_and_revoked_while_a_server_goes_and_comes_are_what_was_answered(
    postgres: PostgresSchema, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr("ollama_coordinator.db.postgres.CONNECT_SECONDS", 2)  # libpq's least
    monkeypatch.setattr("ollama_coordinator.db.postgres.ANSWER_SECONDS", 0.3)
    made: set[str] = set()
    ended: set[str] = set()
    refused = 0
    async with Line(postgres.url) as line:
        async with running(database_url=line.url) as coordinator:
            for number in range(8):
                if number % 4 == 1:
                    getattr(line, how)()
                elif number % 4 == 3:
                    await line.mend()
                status, answer = await sent(
                    coordinator, "POST", "/api/keys", {"name": f"key-{number}"}
                )
                assert (status == 201) == ("key" in answer)
                if status == 201:
                    made.add(answer["name"])
                else:
                    assert status == 503
                    refused += 1
                if number % 4 == 2:
                    name = min(made - ended)
                    status, _ = await sent(coordinator, "DELETE", f"/api/keys/{name}")
                    assert status in (200, 503)
                    ended.add(name)
            await coordinator.until(lambda: coordinator.parts.store.problem is None)
            assert await in_force(coordinator) == made - ended
        assert refused
        assert made - ended
        async with running(database_url=postgres.url) as again:
            assert await in_force(again) == made - ended


@pytest.mark.spec("OPERATION-99")
async def test_a_coordinator_that_leads_no_more_makes_no_key(postgres: PostgresSchema) -> None:
    async with running(database_url=postgres.url) as coordinator:
        await coordinator.parts.store.yield_lead()
        status, answer = await sent(coordinator, "POST", "/api/keys", {"name": "late"})
        assert (status, answer["error"].endswith("ask again")) == (503, True)
        assert await in_force(coordinator) == set()
        with suppress(DatabaseError):
            await coordinator.parts.store.flush()
    async with running(database_url=postgres.url) as coordinator:
        assert await in_force(coordinator) == set()
