"""The audit: every change with who made it and from where, on real sockets and both databases."""

import asyncio
import csv
import io
import json
from typing import Any

import pytest
from starlette.routing import Route
from typer.testing import CliRunner

from ollama_coordinator.access import NewKey
from ollama_coordinator.api.http.dialects import INFERENCE_ROUTES
from ollama_coordinator.api.http.routing import Methods
from ollama_coordinator.app import create_app
from ollama_coordinator.main import app
from ollama_coordinator_common.settings import CoordinatorConfig
from support.coordinator import Running, running
from support.databases import Space
from support.ollama import Model, StandIn

PROXIED: dict[str, Any] = {"trusted_proxies": ("127.0.0.1",), "access": "keys"}
FROM = "192.168.1.7"


async def listed(coordinator: Running, query: str = "", **headers: str) -> list[dict[str, Any]]:
    url = f"{coordinator.url}/api/audit?{query}"
    async with coordinator.session.get(url, headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        return list((await answer.json())["changes"])


@pytest.mark.spec("ACCESS-28")
async def test_each_change_says_who_made_it_and_from_where(database: Space) -> None:
    models = [Model("llama3.2")]
    async with StandIn(models, registry=[Model("smollm")]) as ollama:
        async with running(database_url=database.url, **PROXIED) as coordinator:
            _, text = coordinator.parts.access.keys.create(NewKey(name="boss", rights=("operate",)))
            boss = {"Authorization": f"Bearer {text}", "X-Forwarded-For": FROM}

            async def sent(method: str, path: str, body: Any = None) -> Any:
                async with coordinator.session.request(
                    method, coordinator.url + path, json=body, headers=boss
                ) as answer:
                    assert answer.status < 400, await answer.text()
                    return await answer.json(content_type=None) if answer.status != 204 else None

            facts = {"machine_name": "gpu-1", "ip_address": "127.0.0.1", "ollama_version": "0.33.0"}
            own = {"Authorization": f"Bearer {text}"}
            registering = {**facts, "ollama_port": ollama.port}
            url = f"{coordinator.url}/api/agents"
            for _ in range(2):  # the second time nothing changes
                async with coordinator.session.post(url, json=registering, headers=own) as answer:
                    agent = (await answer.json())["agent_id"]
            made = await sent("POST", "/api/keys", {"name": "anna", "models": ["llama3*"]})
            token = await sent("POST", "/api/keys", {"name": "rack", "rights": ["join"]})
            await sent("DELETE", "/api/keys/rack")
            hook = "https://example.org/a-secret-hook"
            await sent("PATCH", "/api/settings", {"max_queue": 7, "webhook": hook})
            await sent("PATCH", f"/api/agents/{agent}", {"draining": False, "notes": "mine"})
            await sent("POST", "/api/pull", {"model": "smollm", "stream": False})
            await sent("POST", "/api/copy", {"source": "smollm", "destination": "other"})
            await sent("POST", "/api/aliases", {"name": "fast", "models": ["smollm"]})
            await sent("POST", "/api/generate", {"model": "llama3.2", "keep_alive": 0})
            ollama.hold(after=1)
            body = {"model": "llama3.2", "prompt": "hello"}
            async with coordinator.session.post(
                f"{coordinator.url}/api/generate", json=body, headers={"X-Api-Key": made["key"]}
            ) as answer:
                await answer.content.readline()
                [live] = coordinator.parts.observation.journal.live
                await sent("DELETE", f"/api/requests/{live}")
            ollama.release()
            # What changes nothing, is refused, or only asks, is not there.
            await sent("POST", "/api/show", {"model": "llama3.2"})
            assert (await coordinator.post("/api/keys", {"name": "x"}))[0] == 401
        async with running(database_url=database.url, **PROXIED) as coordinator:
            rows = await listed(coordinator, "limit=100", **boss)
            assert [(row["action"], row["subject"]) for row in reversed(rows)] == [
                ("POST /api/agents", "gpu-1"),
                ("POST /api/keys", "anna"),
                ("POST /api/keys", "rack"),
                ("DELETE /api/keys/{name}", "rack"),
                ("PATCH /api/settings", "max_queue, webhook"),
                ("PATCH /api/agents/{agent_id}", "gpu-1"),
                ("POST /api/pull", "smollm"),
                ("POST /api/copy", "smollm"),
                ("POST /api/aliases", "fast"),
                ("POST /api/generate", "llama3.2"),
                ("DELETE /api/requests/{request_id}", live),
            ]
            assert {(row["by"], row["key"]) for row in rows} == {("boss", "boss")}
            assert {row["address"] for row in rows[:-1]} == {FROM}
            assert rows[0]["details"] == {"client": "anna", "model": "llama3.2"}
            assert rows[5]["details"]["notes"] == "mine"
            assert rows[6]["details"]["max_queue"] == 7
            everything = json.dumps(rows)
            for secret in (made["key"], token["key"], text, "a-secret-hook"):
                assert secret not in everything
            assert await listed(coordinator, "by=anna", **boss) == []
            # Page by page, and as files.
            first = await coordinator.session.get(
                f"{coordinator.url}/api/audit?limit=4", headers=boss
            )
            following = (await first.json())["next"]
            second = await listed(coordinator, f"limit=100&after={following}", **boss)
            assert (await first.json())["changes"] + second == rows
            for form in ("csv", "json"):
                url = f"{coordinator.url}/api/audit/export?format={form}"
                async with coordinator.session.get(url, headers=boss) as answer:
                    content = await answer.text()
                if form == "json":
                    assert json.loads(content) == rows
                else:
                    assert len(list(csv.DictReader(io.StringIO(content)))) == len(rows)
            async with coordinator.session.get(
                f"{coordinator.url}/api/audit?after=x", headers=boss
            ) as answer:
                assert answer.status == 400


@pytest.mark.spec("ACCESS-28")
async def test_log_ins_admissions_and_refusals_are_changes() -> None:
    async with running(**PROXIED) as coordinator, StandIn() as ollama:
        _, text = coordinator.parts.access.keys.create(NewKey(name="boss", rights=("operate",)))
        boss = {"Authorization": f"Bearer {text}", "X-Forwarded-For": FROM}
        url = f"{coordinator.url}/dashboard/session"
        for key in ("oc_wrong", text):
            async with coordinator.session.post(
                url, data={"key": key}, headers={"X-Forwarded-For": FROM}, allow_redirects=False
            ) as answer:
                assert answer.status == (303 if key == text else 401)
        for name, method in (("one", "POST"), ("two", "DELETE")):
            facts = {"machine_name": name, "ip_address": FROM, "ollama_version": "0.33.0"}
            proof = {"X-Agent-Secret": name * 10, "X-Forwarded-For": FROM}
            async with coordinator.session.post(
                f"{coordinator.url}/api/agents",
                json={**facts, "ollama_port": ollama.port},
                headers=proof,
            ) as answer:
                assert answer.status == 403
            async with coordinator.session.request(
                method, f"{coordinator.url}/api/join-requests/{name}", headers=boss
            ) as answer:
                assert answer.status == 200
        rows = await listed(coordinator, **boss)
        assert [(row["action"], row["subject"]) for row in reversed(rows)] == [
            ("POST /dashboard/session", "boss"),
            ("POST /api/join-requests/{name}", "one"),
            ("DELETE /api/join-requests/{name}", "two"),
        ]


ONLY_ASK = {
    "POST /api/show", "POST /api/explain", "POST /api/me", "POST /api/health",
    "POST /api/agents/{agent_id}/log", "POST /api/experimental/web_search",
    "POST /api/experimental/web_fetch",
}  # fmt: skip
"""Routes whose methods sound like a change, and that change nothing; so do those of inference."""


@pytest.mark.spec("ACCESS-28")
async def test_every_route_that_changes_something_is_kept() -> None:
    routes = create_app(CoordinatorConfig(database_url="sqlite://:memory:")).routes
    asking = {f"POST {route.path}" for route in INFERENCE_ROUTES} | ONLY_ASK
    for route in routes:
        assert isinstance(route, Route)
        assert isinstance(route.app, Methods)
        for method, guarded in route.app.by_method.items():
            is_safe = method in ("GET", "HEAD") or f"{method} {route.path}" in asking
            assert bool(guarded.changes) is not is_safe, (method, route.path)


@pytest.mark.spec("ACCESS-28")
async def test_it_is_pruned_and_shown_in_a_terminal(coordinator: Running) -> None:
    for number in range(5):
        await coordinator.post("/api/keys", {"name": f"key-{number}", "rights": ["join"]})
    runner = CliRunner(env={"COORDINATOR_URL": coordinator.url, "COLUMNS": "120"})
    done = await asyncio.to_thread(runner.invoke, app, ["audit", "--limit", "2"])
    assert done.exit_code == 0, done.output
    assert "key-4" in done.stdout
    assert "key-2" not in done.stdout
    assert len(await listed(coordinator)) == 5
    coordinator.parts.observation.limits.rows = 2
    await coordinator.parts.observation.prune()
    assert [row["subject"] for row in await listed(coordinator)] == ["key-4", "key-3"]
