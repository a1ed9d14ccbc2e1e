"""Keys, proxies, browsers and machines at the gate, on real sockets."""

import asyncio
import base64
import gc
import json
import logging
import shutil
import stat
import sys
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
from yarl import URL

from ollama_coordinator.access import NewKey, machines
from ollama_coordinator.access.keys import hash_of, key_made_in
from ollama_coordinator.upstream import Unreachable
from ollama_coordinator_common.error import ConfigError
from support.coordinator import Running, running
from support.ollama import StandIn

PUBLIC, PRIVATE = "203.0.113.9", "192.168.1.7"
PROXIED: dict[str, Any] = {"trusted_proxies": ("127.0.0.1",)}
"""The tests' own address is a trusted proxy: it says for whom it asks."""


@pytest.fixture
async def behind() -> AsyncIterator[Running]:
    """A coordinator behind a trusted proxy."""
    async with running(**PROXIED) as coordinator:
        yield coordinator


async def made(coordinator: Running, name: str = "anna", **more: Any) -> str:
    """The text of a new key."""
    status, body = await coordinator.post("/api/keys", {"name": name, **more})
    assert status == 201, body
    assert "key" in body
    return str(body["key"])


async def asked(
    coordinator: Running,
    path: str = "/api/tags",
    method: str = "GET",
    *,
    of: str = "",
    body: Any = None,
    **headers: str,
) -> tuple[int, str]:
    """Status and body, of a client at the address `of`."""
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    if of:
        sent["X-Forwarded-For"] = of
    async with coordinator.session.request(
        method, coordinator.url + path, headers=sent, json=body
    ) as answer:
        return answer.status, await answer.text()


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# ── zones and proxies ─────────────────────────────────────────────────────────────────────────


@pytest.mark.spec("ACCESS-2")
@pytest.mark.parametrize(
    "header",
    [
        {"X-Forwarded-For": PRIVATE},
        {"Forwarded": "for=127.0.0.1"},
        {"X-Real-IP": "127.0.0.1"},
        {"CF-Connecting-IP": "127.0.0.1"},
        {"Via": "1.1 squid"},
        {"X-Forwarded-Proto": "https"},
    ],
)
async def test_what_an_unknown_proxy_passes_on_is_public(
    coordinator: Running, header: dict[str, str]
) -> None:
    assert (await asked(coordinator))[0] == 200
    status, text = await asked(coordinator, **header)
    assert status == 403
    assert "COORDINATOR_TRUSTED_PROXIES=127.0.0.1" in text


@pytest.mark.spec("ACCESS-2")
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"X-Forwarded-For": PRIVATE}, 200),
        ({"X-Forwarded-For": f"{PUBLIC}, {PRIVATE}"}, 200),
        ({"X-Forwarded-For": f"{PRIVATE}, {PUBLIC}"}, 403),
        ({"X-Forwarded-For": f"{PRIVATE}, {PUBLIC}, 127.0.0.1"}, 403),
        ({"X-Forwarded-For": "127.0.0.1"}, 200),
        ({"X-Forwarded-For": "::ffff:192.168.1.7"}, 200),
        ({"X-Forwarded-For": "100.64.0.9"}, 200),
        ({"X-Forwarded-For": "240.0.0.1"}, 403),
        ({"X-Forwarded-For": "192.168.1.7:4711"}, 200),
        ({"Forwarded": 'proto=http;for="[fd00::7]:4711"'}, 200),
        ({"Forwarded": 'for="[2001:4860::7]"'}, 403),
        ({"Forwarded": "for=_hidden"}, 403),
        ({"Forwarded": "proto=https"}, 403),
        ({"X-Forwarded-For": "not an address"}, 403),
        ({"X-Forwarded-For": ""}, 403),
        # A client's own header, which the proxy passes beside the one that it writes itself.
        ({"X-Forwarded-For": PUBLIC, "Forwarded": "for=127.0.0.1"}, 403),
        ({"X-Forwarded-For": PUBLIC, "X-Real-IP": "127.0.0.1"}, 403),
        ({"Via": "1.1 caddy"}, 403),
    ],
)
async def test_a_trusted_proxy_says_who_asks(
    behind: Running, headers: dict[str, str], status: int
) -> None:
    assert (await asked(behind, **headers))[0] == status


@pytest.mark.spec("ACCESS-3")
async def test_a_stranger_is_told_what_to_do_and_the_operator_once_a_minute(
    behind: Running, caplog: pytest.LogCaptureFixture
) -> None:
    for path in ("/api/chat", "/v1/chat/completions", "/v1/messages", "/v1/models"):
        method = "GET" if path == "/v1/models" else "POST"
        status, text = await asked(behind, path, method, of=PUBLIC)
        assert status == 403
        error = json.loads(text)["error"]
        sentence = error["message"] if path.startswith("/v1") else error
        assert "ollama-coordinator keys create" in sentence
        assert "COORDINATOR_ACCESS=open" in sentence
    assert caplog.text.count("without keys this coordinator serves") == 1
    assert PUBLIC in behind.parts.access.notice
    behind.parts.attention.look(behind.parts.clock.now())
    listed = (await behind.get("/api/attention"))["attention"]
    assert any(one["concern"]["kind"] == "access" for one in listed)


@pytest.mark.spec("ACCESS-1")
async def test_open_to_the_world_is_open_and_the_dashboard_says_so() -> None:
    async with running(access="open", **PROXIED) as coordinator:
        assert coordinator.parts.access.notice == ""
        assert (await asked(coordinator, of=PUBLIC))[0] == 200
        assert PUBLIC in coordinator.parts.access.notice


# ── keys ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.spec("ACCESS-7")
async def test_a_key_is_taken_in_each_of_its_forms(behind: Running) -> None:
    key = await made(behind, in_path=True)
    basic = base64.b64encode(f"anna:{key}".encode()).decode()
    assert (await asked(behind, of=PUBLIC))[0] == 401
    for headers in (
        bearer(key),
        {"authorization": f"bearer {key}"},
        {"X-API-Key": key},
        {"Authorization": f"Basic {basic}"},
        {"Authorization": "Bearer unused", "X-API-Key": key},
    ):
        assert (await asked(behind, of=PUBLIC, **headers))[0] == 200, headers
    for path in (f"/k/{key}/api/tags", f"/k/{key}//api/tags", f"/k/{key}/v1/models"):
        assert (await asked(behind, path, of=PUBLIC))[0] == 200, path
    assert (await asked(behind, f"/k/{key}", of=PUBLIC))[1] == "Ollama is running"
    assert (await asked(behind, f"/k/{key}x/api/tags", of=PUBLIC))[0] == 401
    assert (await asked(behind, f"/api/tags?api_key={key}", of=PUBLIC))[0] == 401


@pytest.mark.spec("ACCESS-7")
@pytest.mark.parametrize(
    ("method", "path", "clean"),
    [
        ("GET", "/api//tags?a=b", "/api/tags?a=b"),
        ("POST", "/api/./show", "/api/show"),
        ("GET", "/v1/models/", "/v1/models"),
        ("POST", "/api/show/", "/api/show"),
    ],
)
async def test_a_redirect_to_a_clean_path_keeps_the_key(
    behind: Running, method: str, path: str, clean: str
) -> None:
    key = await made(behind, in_path=True)
    url = URL(f"{behind.url}/k/{key}{path}", encoded=True)
    sent = {"X-Forwarded-For": PUBLIC}
    async with behind.session.request(
        method, url, headers=sent, json={"model": "none"}, allow_redirects=False
    ) as answer:
        assert answer.headers["location"] == f"/k/{key}{clean}"
    async with behind.session.request(method, url, headers=sent, json={"model": "none"}) as answer:
        assert answer.status == (503 if "show" in path else 200)  # there is no agent


@pytest.mark.spec("ACCESS-7")
async def test_only_a_key_made_for_it_may_stand_in_a_path(behind: Running) -> None:
    key = await made(behind)
    assert (await asked(behind, f"/k/{key}/api/tags", of=PUBLIC))[0] == 401
    status, body = await behind.post(
        "/api/keys", {"name": "b", "rights": ["manage"], "in_path": True}
    )
    assert status == 400
    assert "'use' alone" in body["error"]


@pytest.mark.spec("ACCESS-7")
async def test_a_key_decides_alone_also_on_loopback(coordinator: Running) -> None:
    key = await made(coordinator)
    assert (await asked(coordinator, "/api/history"))[0] == 200
    status, text = await asked(coordinator, "/api/history", **bearer(key))
    assert status == 403
    assert "'anna' may not do this" in text


@pytest.mark.spec("ACCESS-8")
async def test_a_dummy_key_is_nobody_at_home_and_401_elsewhere(behind: Running) -> None:
    assert (await asked(behind, of=PRIVATE, **bearer("ollama")))[0] == 200
    assert (await asked(behind, "/k/unused/api/tags", of=PRIVATE))[0] == 200
    await made(behind)
    assert (await asked(behind, **bearer("ollama")))[0] == 200
    for path in ("/api/version", "/v1/models", "/api/ps"):
        assert (await asked(behind, path, of=PRIVATE, **bearer("ollama")))[0] == 401
    async with behind.session.get(
        f"{behind.url}/api/version", headers={"X-Forwarded-For": PRIVATE}
    ) as answer:
        assert answer.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.spec("ACCESS-8")
async def test_the_ollama_program_gets_403_with_our_sentence(behind: Running) -> None:
    await made(behind)
    agent = "ollama/0.33.0 (amd64 linux) Go/go1.24"
    status, text = await asked(behind, of=PRIVATE, **{"User-Agent": agent})
    assert status == 403
    assert "/k/KEY" in text


@pytest.mark.spec("ACCESS-9")
@pytest.mark.skipif(sys.platform == "win32", reason="open files cannot be copied there")
async def test_a_key_that_was_answered_is_in_the_database(tmp_path: Path) -> None:
    """The files as they are at the answer: what a coordinator leaves that is killed then."""
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    async with running(database_url=f"sqlite://{before}/a.db") as coordinator:
        url = f"{coordinator.url}/api/keys"
        texts = {}
        for name in ("anna", "ben"):
            async with coordinator.session.post(url, json={"name": name}) as answer:
                assert answer.status == 201
                texts[name] = (await answer.json())["key"].encode()
        async with coordinator.session.delete(f"{url}/ben") as answer:
            assert answer.status == 200
        shutil.copytree(before, after)
    async with running(database_url=f"sqlite://{after}/a.db") as coordinator:
        keys = coordinator.parts.access.keys
        found = keys.by_secret(texts["anna"], time.time())
        assert found is not None
        assert found.name == "anna"
        assert keys.by_secret(texts["ben"], time.time()) is None


@pytest.mark.spec("ACCESS-9")
async def test_a_key_is_made_listed_shown_ended_and_kept(tmp_path: Path) -> None:
    url = f"sqlite://{tmp_path}/a.db"
    async with running(database_url=url, **PROXIED) as coordinator:
        keys = {name: await made(coordinator, name) for name in ("anna", "ben")}
        soon = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
        old = await made(coordinator, "old", expires_at=soon)
        assert (await asked(coordinator, of=PUBLIC, **bearer(keys["anna"])))[0] == 200
        assert (await asked(coordinator, of=PUBLIC, **bearer(old)))[0] == 401
        status, body = await coordinator.post("/api/keys", {"name": "anna"})
        assert status == 400
        assert "already" in body["error"]
        status, text = await asked(coordinator, "/api/keys/anna", "DELETE")
        assert status == 200
        assert json.loads(text)["revoked_at"]
        assert (await asked(coordinator, of=PUBLIC, **bearer(keys["anna"])))[0] == 401
        assert (await asked(coordinator, "/api/keys/nobody"))[0] == 404
        again = await made(coordinator, "anna", weight=2)
    async with running(database_url=url, **PROXIED) as coordinator:
        listed = (await coordinator.get("/api/keys"))["keys"]
        assert [key["name"] for key in listed] == ["anna", "ben", "old", "anna"]
        assert (await coordinator.get("/api/keys/anna"))["weight"] == 2
        assert listed[0]["last_used_at"] is not None
        assert (await asked(coordinator, of=PUBLIC, **bearer(keys["anna"])))[0] == 401
        assert (await asked(coordinator, of=PUBLIC, **bearer(keys["ben"])))[0] == 200
        assert (await asked(coordinator, of=PUBLIC, **bearer(again)))[0] == 200


@pytest.mark.spec("ACCESS-9")
@pytest.mark.parametrize(
    "wanted",
    [
        {"name": ""},
        {"name": "10.0.0.1"},
        {"name": "a\nb"},
        {"name": "a", "rights": []},
        {"name": "a", "rights": ["root"]},
        {"name": "a", "weight": 0},
        {"name": "a", "lane": "fast"},
        {"name": "a", "limits": {"concurrent": -1}},
        {"name": "a", "expires_at": "2030-01-31T00:00:00"},
        {"name": "a", "ssh": "ssh-rsa AAAA"},
        {"name": "a", "right": "use"},
    ],
)
async def test_a_key_that_cannot_be_is_refused_with_a_sentence(
    coordinator: Running, wanted: dict[str, Any]
) -> None:
    status, body = await coordinator.post("/api/keys", wanted)
    assert status == 400
    assert body["error"]
    assert (await coordinator.get("/api/keys")) == {"keys": []}


@pytest.mark.spec("ACCESS-10")
async def test_a_key_with_models_sees_and_uses_those_alone(coordinator: Running) -> None:
    async with StandIn() as ollama:
        await coordinator.register(ollama, "first")
        names = {model["name"] for model in (await coordinator.get("/api/tags"))["models"]}
        assert "llama3.2:latest" in names
        everything = bearer(await made(coordinator, "all", rights=["manage"], models=["llama*"]))
        nothing = bearer(await made(coordinator, "none", rights=["manage"], models=["other/*"]))
        for path in ("/api/tags", "/v1/models", "/api/models", "/api/ps"):
            assert "llama3.2" not in (await asked(coordinator, path, **nothing))[1]
        for path in ("/api/tags", "/v1/models", "/api/models", "/v1/models/llama3.2"):
            assert "llama3.2" in (await asked(coordinator, path, **everything))[1]
        chat = {"model": "LLAMA3.2:latest", "messages": [], "stream": False}
        for path, method, body in (
            ("/api/chat", "POST", chat),
            ("/v1/chat/completions", "POST", chat),
            ("/v1/messages", "POST", {**chat, "max_tokens": 5}),
            ("/api/show", "POST", {"model": "llama3.2"}),
            ("/api/pull", "POST", {"model": "llama3.2"}),
            ("/api/push", "POST", {"model": "me/llama3.2"}),
            ("/api/copy", "POST", {"source": "llama3.2", "destination": "other/x"}),
            ("/api/copy", "POST", {"source": "other/x", "destination": "llama3.2"}),
            ("/api/create", "POST", {"model": "other/y", "from": "llama3.2"}),
            ("/api/delete", "DELETE", {"model": "llama3.2"}),
            ("/api/operations", "POST", {"kind": "load", "model": "llama3.2"}),
            ("/v1/models/llama3.2", "GET", None),
        ):
            status, text = await asked(coordinator, path, method, body=body, **nothing)
            assert (status, "may not use this model" in text) == (403, True), path
        assert (await asked(coordinator, "/api/chat", "POST", body=chat, **everything))[0] == 200


@pytest.mark.spec("ACCESS-5")
async def test_dropping_a_model_from_memory_is_managing(coordinator: Running) -> None:
    async with StandIn() as ollama:
        await coordinator.register(ollama, "first")
        body = {"model": "llama3.2", "keep_alive": 0}
        for right, expected in (("use", 403), ("manage", 200)):
            headers = bearer(await made(coordinator, right, rights=[right]))
            status, _ = await asked(coordinator, "/api/generate", "POST", body=body, **headers)
            assert status == expected


@pytest.mark.spec("ACCESS-11")
async def test_the_name_of_a_key_is_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**PROXIED, "user_header": ("Remote-User",)}
    async with running(**settings) as coordinator, StandIn() as ollama:
        await coordinator.register(ollama, "first")
        heavy = bearer(await made(coordinator, "heavy", weight=2.5))
        webui = bearer(await made(coordinator, "webui", names_users=True))
        chat = {"model": "llama3.2", "messages": [], "stream": False}
        cases: list[tuple[dict[str, str], str, float, str]] = [
            ({}, "127.0.0.1", 1.0, ""),
            (heavy, "heavy", 2.5, "heavy"),
            ({**webui, "Remote-User": "carla"}, "carla", 1.0, "webui"),
            ({"X-Forwarded-For": PRIVATE, **webui}, "webui", 1.0, "webui"),
            ({"X-Forwarded-For": "127.0.0.1", "Remote-User": "dora"}, "dora", 1.0, ""),
        ]
        for headers, client, _, _ in cases:
            status, text = await asked(coordinator, "/api/chat", "POST", body=chat, **headers)
            assert status == 200, text
            last = coordinator.parts.observation.journal.recent[-1].request
            assert last.client == client
        requests: list[Any] = []
        submit = coordinator.parts.scheduler.submit

        def submitted(request: Any, now: float) -> None:
            requests.append(request)
            submit(request, now)

        monkeypatch.setattr(coordinator.parts.scheduler, "submit", submitted)
        for headers, client, weight, key in cases:
            await asked(coordinator, "/api/chat", "POST", body=chat, **headers)
            seen = requests[-1]
            assert (seen.client, seen.weight, seen.key) == (client, weight, key)


@pytest.mark.spec("ACCESS-11")
async def test_open_webui_names_its_user_where_its_key_may(coordinator: Running) -> None:
    async with StandIn() as ollama:
        await coordinator.register(ollama, "first")
        user = {"X-OpenWebUI-User-Email": "eva@example.org", "X-OpenWebUI-User-Name": "Eva%20E"}
        chat = {"model": "llama3.2", "messages": [], "stream": False}
        for name, says, client in (("w", True, "eva@example.org"), ("v", False, "v")):
            key = bearer(await made(coordinator, name, names_users=says))
            await asked(coordinator, "/api/chat", "POST", body=chat, **key, **user)
            assert coordinator.parts.observation.journal.recent[-1].request.client == client
        await asked(coordinator, "/api/chat", "POST", body=chat, **user)
        assert coordinator.parts.observation.journal.recent[-1].request.client == "127.0.0.1"


@pytest.mark.spec("ACCESS-6")
async def test_a_key_is_found_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    file = tmp_path / "a.db"
    async with running(database_url=f"sqlite://{file}") as coordinator, StandIn() as ollama:
        await coordinator.register(ollama, "first")
        key = await made(coordinator, in_path=True)
        assert len(key) == 46
        assert key.startswith("oc_")
        secret = file.with_name("a.db.secret").read_text()
        chat = {"model": "llama3.2", "messages": [], "stream": False}
        prefix = f"/k/{key}"
        texts = []
        for path, method, body in (
            ("/api/chat", "POST", chat),
            ("/api/chat", "POST", {"model": "none"}),
            ("/api/chat", "POST", 7),
            ("/api/nothing", "GET", None),
            ("/api/tags/", "GET", None),
            ("/api/history", "GET", None),
            ("/api/delete", "DELETE", {"model": "llama3.2"}),
        ):
            texts.append((await asked(coordinator, prefix + path, method, body=body))[1])
            await asked(coordinator, path, method, body=body, **bearer(key))
        ollama.settings.version = "0.0.1"
        names = ("keys", "keys/anna", "history", "requests", "events", "attention", "agents")
        texts += [json.dumps(await coordinator.get(f"/api/{name}")) for name in names]
        texts.append(str(coordinator.parts.snapshots.take().state))
        forwarded = [str(dict(request.headers)) + request.path for request in ollama.seen.requests]
        assert forwarded
        texts += forwarded
    texts.append(caplog.text)
    texts += [
        one.read_bytes().decode("latin-1")
        for one in tmp_path.glob("a.db*")
        if one.suffix != ".secret"
    ]
    for text in texts:
        assert key not in text
        assert key[12:40] not in text
        assert secret not in text


@pytest.mark.spec("ACCESS-13")
async def test_the_secret_file_proves_being_on_this_machine(tmp_path: Path) -> None:
    file = tmp_path / "a.db"
    url = f"sqlite://{file}"
    async with running(access="keys", database_url=url, **PROXIED) as coordinator:
        path = file.with_name("a.db.secret")
        secret = path.read_text()
        if sys.platform != "win32":
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert (await asked(coordinator, "/api/keys"))[0] == 401
        assert (await asked(coordinator, "/api/keys", **bearer(secret)))[0] == 200
        assert (await asked(coordinator, "/api/keys", of=PRIVATE, **bearer(secret)))[0] == 401
    async with running(access="keys", database_url=url) as coordinator:
        assert path.read_text() != secret
        assert (await asked(coordinator, "/api/keys", **bearer(secret)))[0] == 401


@pytest.mark.spec("ACCESS-13")
async def test_the_first_key_comes_from_a_file_and_follows_it(tmp_path: Path) -> None:
    file, url = tmp_path / "key", f"sqlite://{tmp_path}/a.db"
    for number in "01":
        key = "oc_" + number * 43
        file.write_text(f"{key}\n")
        async with running(access="keys", key_file=file, database_url=url) as coordinator:
            status, text = await asked(coordinator, "/api/keys", **bearer(key))
            assert status == 200
            states = [bool(one["revoked_at"]) for one in json.loads(text)["keys"]]
            assert states == [False] if number == "0" else [True, False]
            other = "oc_" + ("1" if number == "0" else "0") * 43
            assert (await asked(coordinator, "/api/keys", **bearer(other)))[0] == 401


@pytest.mark.spec("ACCESS-13")
async def test_a_file_without_a_first_key_is_made_with_one(tmp_path: Path) -> None:
    file, url = tmp_path / "key", f"sqlite://{tmp_path}/a.db"
    texts = set()
    for _ in range(2):
        async with running(access="keys", key_file=file, database_url=url) as coordinator:
            texts.add(file.read_text().strip())
            status, _ = await asked(coordinator, "/api/keys", **bearer(file.read_text().strip()))
            assert status == 200
    assert len(texts) == 1
    if sys.platform != "win32":
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match="cannot be made"):
        key_made_in(tmp_path / "none" / "key")


@pytest.mark.spec("ACCESS-14")
async def test_guessing_is_slowed_down_and_logged(
    behind: Running, caplog: pytest.LogCaptureFixture
) -> None:
    key = await made(behind)
    statuses = []
    for number in range(50):
        wrong = bearer("oc_" + f"{number:043d}")
        statuses.append((await asked(behind, of=PUBLIC, **wrong))[0])
    assert statuses[0] == 401
    assert statuses[-1] == 429
    assert caplog.text.count("wrong keys, many of one address") == 1
    assert (await asked(behind, of=PUBLIC, **bearer(key)))[0] == 200
    assert (await asked(behind, of=PRIVATE, **bearer("oc_")))[0] == 401
    async with behind.session.get(
        f"{behind.url}/api/tags", headers={"X-Forwarded-For": PUBLIC, **bearer("x")}
    ) as answer:
        assert int(answer.headers["retry-after"]) > 0


WRONG = "oc_" + "x" * 43
JOINS = {"machine_name": "m", "ip_address": PRIVATE, "ollama_version": "1", "ollama_port": 9}
GUESSES: dict[str, tuple[str, dict[str, Any]]] = {
    "x-api-key": ("/api/tags", {"X-Api-Key": WRONG}),
    "password": (
        "/api/tags", {"Authorization": "Basic " + base64.b64encode(f"a:{WRONG}".encode()).decode()},
    ),
    "path": (f"/k/{WRONG}/api/tags", {}),
    "signature": ("/api/tags", {"Authorization": "A" * 68 + ":" + "B" * 88}),
    "a free form": ("/api/tags", {"Authorization": WRONG}),
    "join token": ("/api/agents", {"method": "POST", "body": JOINS, "X-Api-Key": WRONG}),
    "join token of an agent": (
        "/api/agents",
        {"method": "POST", "body": JOINS, "X-Api-Key": WRONG, "X-Agent-Secret": "s" * 43},
    ),
}  # fmt: skip


@pytest.mark.spec("ACCESS-14")
@pytest.mark.parametrize("form", GUESSES)
async def test_a_guess_counts_in_each_form(behind: Running, form: str) -> None:
    await made(behind)
    path, sent = GUESSES[form]
    statuses = [(await asked(behind, path, of=PUBLIC, **sent))[0] for _ in range(32)]
    assert (statuses[0], statuses[-1]) == (401, 429)


@pytest.mark.spec("ACCESS-14")
async def test_one_network_of_ipv6_is_one_who_guesses(behind: Running) -> None:
    await made(behind)
    wrong = bearer("oc_" + "x" * 43)
    statuses = [(await asked(behind, of=f"2001:db8::{n:x}", **wrong))[0] for n in range(50)]
    assert (statuses[0], statuses[-1]) == (401, 429)
    assert (await asked(behind, of="2001:db8:0:1::1", **wrong))[0] == 401


@pytest.mark.spec("ACCESS-6")
@pytest.mark.spec("ACCESS-22")
async def test_what_a_caller_sends_is_compared_as_its_hash(behind: Running) -> None:
    """How long that takes tells nobody how much of a guess was right: nothing else is there."""
    access = behind.parts.access
    key, text = access.keys.create(NewKey(name="boss", rights=("operate",)))
    cookie, secret = access.sessions.begin(key, time.time()), "s" * 43
    async with (
        StandIn() as ollama,
        behind.session.post(
            f"{behind.url}/api/agents",
            json=registration("127.0.0.1", ollama.port),
            headers={"X-Agent-Secret": secret, "X-Api-Key": text},
        ) as answer,
    ):
        assert answer.status == 201
    for right in (bearer(text), {"Cookie": f"ollama_coordinator_session={cookie}"}):
        assert (await asked(behind, "/api/keys", of=PUBLIC, **right))[0] == 200
    texts = texts_in(access)
    assert {hash_of(one) for one in (text, cookie, secret)} <= texts
    assert not {text, cookie, secret} & texts


def texts_in(root: object) -> set[str]:
    """Every text that an object has, or that those have which it has."""
    seen, found, left = {id(root)}, set(), [root]
    while left:
        one = left.pop()
        if isinstance(one, str | bytes):
            found.add(one if isinstance(one, str) else one.decode("latin-1"))
        # The collector passes over the keys of a dictionary that are texts.
        for other in (*gc.get_referents(one), *(one if isinstance(one, dict) else ())):
            if id(other) not in seen and not isinstance(other, NO_DATA):
                seen.add(id(other))
                left.append(other)
    return found


NO_DATA = (type, ModuleType, FunctionType, asyncio.AbstractEventLoop)


# ── browsers ──────────────────────────────────────────────────────────────────────────────────

BROWSERS = [
    {"User-Agent": "Mozilla/5.0 (X11; Linux x86_64)"},
    {"Referer": "http://evil.example/"},
    {"Sec-Fetch-Mode": "cors"},
    {"Origin": "http://evil.example"},
]


@pytest.mark.spec("ACCESS-15")
@pytest.mark.parametrize("sign", BROWSERS, ids=lambda sign: next(iter(sign)))
async def test_a_rebound_name_serves_no_browser(coordinator: Running, sign: dict[str, str]) -> None:
    status, text = await asked(coordinator, Host="evil.example", **sign)
    assert status == 403
    assert "COORDINATOR_HOSTS" in text
    assert (await asked(coordinator, "/", Host="evil.example", **sign))[0] == 200
    assert (await asked(coordinator, Host="evil.example"))[0] == 200
    key = bearer(await made(coordinator))
    assert (await asked(coordinator, Host="evil.example", **sign, **key))[0] == 200


@pytest.mark.spec("ACCESS-15")
@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8080", 200), ("[fd00::1]:8080", 200), ("localhost", 200), ("gpu-1:8080", 200),
        ("a.localhost", 200), ("gpu.local", 200), ("gpu.local.", 200), ("x.internal", 200),
        ("gpu.lan", 200), ("gpu.home.arpa:1", 200), ("GPU.LAN", 200), ("ai.example.org", 200),
        ("evil.example", 403), ("local.evil.example", 403), ("127.0.0.1.evil.example", 403),
        ("notlan", 200), ("evil.notlan", 403), ("xai.example.org", 403),
    ],
)  # fmt: skip
async def test_the_names_of_this_machine(host: str, status: int) -> None:
    async with running(hosts=("ai.example.org",)) as coordinator:
        assert (await asked(coordinator, Host=host, **BROWSERS[0]))[0] == status


@pytest.mark.spec("ACCESS-16")
async def test_another_site_changes_nothing(coordinator: Running) -> None:
    cross = {"Sec-Fetch-Site": "cross-site"}
    body = {"name": "x"}
    assert (await asked(coordinator, "/api/keys", "POST", body=body, **cross))[0] == 403
    assert (await asked(coordinator, "/api/tags", **cross))[0] == 200
    for origin in ("null", "https://evil.example", "http://127.0.0.1.evil.example"):
        status, _ = await asked(coordinator, "/api/keys", "POST", body=body, Origin=origin)
        assert status == 403
    assert (await coordinator.get("/api/keys")) == {"keys": []}
    async with coordinator.session.post(
        f"{coordinator.url}/api/show",
        data=b'{"model":"none"}',
        headers={"Content-Type": "application/x-www-form-urlencoded"},
    ) as answer:
        assert answer.status == 503  # `curl -d` comes in; there is no agent yet
    allowed = {"Origin": "http://localhost:3000", **cross}
    assert (await asked(coordinator, "/api/show", "POST", body={"model": "none"}, **allowed))[
        0
    ] == 503


# ── machines ──────────────────────────────────────────────────────────────────────────────────


def registration(address: str, port: int = 11434) -> dict[str, Any]:
    return {
        "machine_name": "m",
        "ip_address": address,
        "ollama_version": "0.33.0",
        "ollama_port": port,
    }


@pytest.mark.spec("ACCESS-17")
@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254", "0.0.0.0", "0.1.2.3", "224.0.0.1", "255.255.255.255", "240.0.0.1", "::",
        "ff02::1", "fe80::1", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1",
        "fd00:ec2::254", "100.100.100.200", "metadata.google.internal", "METADATA.google.internal.",
        "metadata", "localhost", "a.localhost", "127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1",
        "2130706433", "127.1",
    ],
)  # fmt: skip
async def test_no_machine_is_registered_where_none_can_be(
    behind: Running, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    monkeypatch.setattr(
        type(behind.parts.upstreams), "open", lambda *of, **more: sent.append(str(of))
    )
    body = registration(address)
    status, text = await asked(behind, "/api/agents", "POST", of=PRIVATE, body=body)
    assert (status, "ip_address" in text) == (400, True)
    assert sent == []
    assert await behind.get("/api/agents") == []


@pytest.mark.spec("ACCESS-17")
async def test_an_address_outside_is_registered_by_itself_or_with_proof(behind: Running) -> None:
    async with StandIn() as ollama:
        port = ollama.port

        async def tried(address: str, of: str, **headers: str) -> int:
            body = registration(address, port)
            return (await asked(behind, "/api/agents", "POST", of=of, body=body, **headers))[0]

        assert await tried("192.0.2.7", PRIVATE) == 403
        assert await tried("127.0.0.1", "127.0.0.1") == 201
        key = bearer(await made(behind, rights=["join"]))
        await made(behind, "ben")
        assert await tried("192.0.2.7", PRIVATE) == 401
        assert await tried("192.0.2.7", PRIVATE, **key) == 201


@pytest.mark.spec("ACCESS-17")
@pytest.mark.parametrize(
    ("of", "link", "right", "status"),
    [
        (PRIVATE, False, "", 403),
        (PRIVATE, False, "join", 403),
        (PRIVATE, False, "operate", 201),
        (PRIVATE, True, "", 201),
        ("192.168.1.2", False, "", 201),
        ("192.168.1.3", False, "", 201),
        ("127.0.0.1", False, "", 201),
    ],
)
async def test_the_coordinators_own_address_is_registered_from_there_alone(
    behind: Running, of: str, link: bool, right: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = {"192.168.1.2", "192.168.1.3"}
    monkeypatch.setattr(machines, "is_ours", lambda address: str(address) in ours)
    key: dict[str, str] = {}
    if right:
        key = bearer(await made(behind, rights=[right]))
    sent: list[str] = []

    def refused(self: object, method: str, url: str, **more: object) -> None:
        sent.append(url)
        raise Unreachable("nothing is sent in this test")

    monkeypatch.setattr(type(behind.parts.upstreams), "open", refused)
    body = {**registration("192.168.1.2", 5432), "link": link}
    given, text = await asked(behind, "/api/agents", "POST", of=of, body=body, **key)
    assert given == status, text
    if status == 403:
        assert "the coordinator's own machine" in text
        assert sent == []


@pytest.mark.spec("ACCESS-17")
async def test_nothing_is_sent_to_such_an_address_by_whatever_name(coordinator: Running) -> None:
    upstreams = coordinator.parts.upstreams
    for host in ("169.254.169.254", "0.0.0.0", "[ff02::1]"):
        with pytest.raises(Exception, match=r"no Ollama can be at|cannot connect"):
            await upstreams.fetch("GET", f"http://{host}:9/", seconds=2)


@pytest.mark.spec("ACCESS-12")
async def test_the_first_key_takes_no_machine_out(behind: Running) -> None:
    async with StandIn() as ollama, StandIn() as other:
        body = registration(PRIVATE, ollama.port)
        _, text = await asked(behind, "/api/agents", "POST", of="192.168.1.9", body=body)
        agent_id = json.loads(text)["agent_id"]
        beat = {"agent_id": agent_id, "cpu_usage": 1, "memory_usage": 1, "active_requests": 0}
        assert (await asked(behind, "/api/health", "POST", of=PRIVATE, body=beat))[0] == 200
        join = bearer(await made(behind, "machines", rights=["join"]))
        await made(behind, "ben")
        # From where the machine was registered, and from where it is; from nowhere else.
        for path, sent in (("/api/health", beat), ("/api/agents", body)):
            assert (await asked(behind, path, "POST", of="192.168.1.8", body=sent))[0] == 401
            for address in ("192.168.1.9", PRIVATE):
                assert (await asked(behind, path, "POST", of=address, body=sent))[0] == 200
        # What such a machine may say is said of that machine alone.
        other_one = registration(PRIVATE, 11500)
        other_one["machine_name"] = "n"
        assert (await asked(behind, "/api/agents", "POST", of=PRIVATE, body=other_one))[0] == 401
        fresh = registration("127.0.0.1", other.port)
        assert (await asked(behind, "/api/agents", "POST", body=fresh, **join))[0] == 201
        chat = {"model": "llama3.2", "messages": [], "stream": False}
        use = bearer(await made(behind, "u"))
        assert (await asked(behind, "/api/chat", "POST", of=PUBLIC, body=chat, **use))[0] == 200


@pytest.mark.spec("ACCESS-12")
async def test_where_machines_speak_from_is_known_after_a_restart(tmp_path: Path) -> None:
    url = f"sqlite://{tmp_path}/a.db"
    async with StandIn() as ollama:
        async with running(database_url=url, access="keys", **PROXIED) as coordinator:
            coordinator.parts.access.mode = "auto"
            coordinator.parts.access.mode = "open"
            body = registration("192.168.1.8", ollama.port)
            _, text = await asked(coordinator, "/api/agents", "POST", of=PRIVATE, body=body)
            agent_id = json.loads(text)["agent_id"]
            beat = {"agent_id": agent_id, "cpu_usage": 1, "memory_usage": 1, "active_requests": 0}
        async with running(database_url=url, access="keys", **PROXIED) as coordinator:
            coordinator.parts.access.keys.create(NewKey(name="a"))
            status, _ = await asked(coordinator, "/api/health", "POST", of=PRIVATE, body=beat)
            assert status == 200
