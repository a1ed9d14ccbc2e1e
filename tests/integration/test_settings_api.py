"""Settings as an operator sees and changes them."""

import asyncio
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from ollama_coordinator.db import Store, database_of
from ollama_coordinator.settings import Settings
from ollama_coordinator_common.settings import CoordinatorConfig
from support.coordinator import Running, running
from support.ollama import Model, StandIn


async def settings(coordinator: Running) -> dict[str, dict[str, Any]]:
    """Every setting by its name."""
    listed = (await coordinator.get("/api/settings"))["settings"]
    return {setting["name"]: setting for setting in listed}


async def change(coordinator: Running, **wanted: Any) -> tuple[int, Any]:
    """Status and answer of a change."""
    url = f"{coordinator.url}/api/settings"
    async with coordinator.session.patch(url, json=wanted) as response:
        return response.status, await response.json()


@pytest.mark.spec("DASH-16")
async def test_settings_say_where_they_come_from() -> None:
    async with running(max_queue=7, given=frozenset({"max_queue"})) as coordinator:
        listed = await settings(coordinator)
        assert listed["max_queue"]["value"] == 7
        assert listed["max_queue"]["source"] == "environment"
        assert not listed["max_queue"]["editable"]
        assert listed["agent_timeout"]["source"] == "default"
        assert listed["agent_timeout"]["editable"]
        assert not listed["port"]["editable"]
        assert (await change(coordinator, agent_timeout=90))[0] == 200
        assert (await settings(coordinator))["agent_timeout"]["source"] == "dashboard"


@pytest.mark.spec("DASH-16")
async def test_every_kind_of_setting_is_listed_when_it_is_set(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("oc_" + "x" * 43)
    names = ("key_file", "origins", "join_token", "loop")
    async with running(
        key_file=key, origins=("https://chat.example.org",), join_token="oc1.-.oc_" + "y" * 43,
        loop="asyncio", given=frozenset(names),
    ) as coordinator:  # fmt: skip
        listed = await settings(coordinator)
    shown = {name: listed[name]["value"] for name in names}
    assert shown["key_file"] == str(key)
    assert shown["origins"] == ["https://chat.example.org"]
    assert "y" * 43 not in shown["join_token"]


@pytest.mark.spec("DASH-16")
async def test_what_the_environment_sets_cannot_be_changed_here() -> None:
    async with running(max_queue=7, given=frozenset({"max_queue"})) as coordinator:
        status, body = await change(coordinator, max_queue=9, agent_timeout=5)
        assert status == 409
        assert "COORDINATOR_MAX_QUEUE" in body["error"]
        assert (await settings(coordinator))["agent_timeout"]["value"] == 60
        for name, refused in (("port", 409), ("policy", 409), ("nonesuch", 400)):
            assert (await change(coordinator, **{name: 1}))[0] == refused


@pytest.mark.spec("DASH-17")
async def test_a_change_counts_at_once_where_it_can(coordinator: Running) -> None:
    status, _ = await change(
        coordinator, agent_timeout=5, health_check_interval=3, max_body_mebibytes=1, history_rows=9
    )
    assert status == 200
    assert coordinator.parts.registry.agent_timeout == 5
    assert coordinator.parts.monitor.interval == 3
    assert coordinator.parts.observation.limits.rows == 9
    large = BytesIO(b'{"model": "m", "prompt": "%s"}' % (b"x" * 1_200_000))
    url = f"{coordinator.url}/api/generate"
    async with coordinator.session.post(url, data=large) as response:
        assert response.status == 413


@pytest.mark.spec("DASH-17")
@pytest.mark.parametrize(
    "wanted",
    [
        {"agent_timeout": 0}, {"agent_timeout": "soon"}, {"max_queue": 1.5},
        {"agent_timeout": True}, {"history_rows": 10**30}, {"history_days": 1e9},
        {"agent_timeout": 1e300}, {"max_queue": []},
        {"max_body_mebibytes": 10**12}, {"larger_context": "perhaps"}, {"pull_placement": 5},
        {"pull_placement": "label:"}, {"history_days": -1}, {"agent_timeout": 7, "max_queue": -1},
    ],
)  # fmt: skip
async def test_a_wrong_value_changes_nothing(coordinator: Running, wanted: dict[str, Any]) -> None:
    before = await settings(coordinator)
    status, body = await change(coordinator, **wanted)
    assert status == 400
    assert body["error"]
    assert await settings(coordinator) == before


@pytest.mark.spec("DASH-17")
@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000])
async def test_what_is_no_number_of_json_changes_nothing(coordinator: Running, number: str) -> None:
    before = await settings(coordinator)
    url = f"{coordinator.url}/api/settings"
    body = f'{{"agent_timeout": {number}}}'
    async with coordinator.session.patch(url, data=body) as response:
        assert response.status == 400
        assert (await response.json())["error"]
    assert await settings(coordinator) == before


@pytest.mark.spec("DASH-17")
async def test_every_setting_that_can_be_changed_counts_at_once(coordinator: Running) -> None:
    listed = await settings(coordinator)
    assert all(setting["live"] for setting in listed.values() if setting["editable"])
    assert not any(setting["live"] for setting in listed.values() if not setting["editable"])
    parts = coordinator.parts
    status, _ = await change(
        coordinator, max_queue=3, drain_timeout=4, larger_context=False,
        pull_placement="2", pull_patience=5, max_spool_gibibytes=0.5,
    )  # fmt: skip
    assert status == 200
    assert parts.scheduler.max_queue == 3
    assert parts.settings.config.drain_timeout == 4
    assert not parts.settings.config.larger_context
    assert (await change(coordinator, max_queue=None))[0] == 200
    assert parts.scheduler.max_queue == 512


@pytest.mark.spec("DASH-17")
async def test_a_shorter_line_refuses_new_requests_and_keeps_who_waits(
    coordinator: Running,
) -> None:
    async with StandIn(slots=1) as ollama:
        agent = await coordinator.register(ollama, "only")
        await coordinator.heartbeat(agent, runner={"num_parallel": 1})
        ollama.hold()
        asked = [asyncio.create_task(coordinator.chat()) for _ in range(4)]
        await coordinator.until(lambda: len(coordinator.parts.scheduler.waiting(0.0)) == 3)
        await change(coordinator, max_queue=1)
        assert (await coordinator.chat())[0] == 503
        await change(coordinator, max_queue=4)
        asked.append(asyncio.create_task(coordinator.chat()))
        await coordinator.until(lambda: len(coordinator.parts.scheduler.waiting(0.0)) == 4)
        ollama.release()
        assert {status for status, _ in await asyncio.gather(*asked)} == {200}


@pytest.mark.spec("DASH-17")
async def test_the_disk_for_uploads_and_where_pulls_go_change_at_once(
    coordinator: Running,
) -> None:
    registry = [Model("qwen3:8b", 1000)]
    async with StandIn(registry=registry) as one, StandIn(registry=registry) as two:
        for ollama in (one, two):
            agent = await coordinator.register(ollama, f"m{ollama.port}")
            await coordinator.heartbeat(agent, disk_free_bytes=10**11)
        await change(coordinator, pull_placement="1", max_spool_gibibytes=1e-9)
        body = {"model": "qwen3:8b", "stream": False}
        assert (await coordinator.post("/api/pull", body))[0] == 200
        assert [one.models.find("qwen3:8b"), two.models.find("qwen3:8b")].count(None) == 1
        data = b"a file of more than one byte"
        url = f"{coordinator.url}/api/blobs/sha256:{sha256(data).hexdigest()}"
        async with coordinator.session.post(url, data=data) as response:
            assert response.status == 507
        await change(coordinator, max_spool_gibibytes=None)
        async with coordinator.session.post(url, data=data) as response:
            assert response.status == 201


@pytest.mark.spec("DASH-17")
async def test_changes_survive_a_restart(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/fleet.db"
    async with running(database_url=url) as coordinator:
        await change(coordinator, history_days=9, agent_timeout=33, max_queue=5)
    async with running(database_url=url) as coordinator:
        listed = await settings(coordinator)
        assert (
            listed["history_days"]["value"] == coordinator.parts.settings.config.history_days == 9
        )
        assert listed["agent_timeout"]["value"] == coordinator.parts.registry.agent_timeout == 33
        assert listed["max_queue"]["source"] == "dashboard"
        assert (await change(coordinator, agent_timeout=None))[0] == 200
        assert coordinator.parts.registry.agent_timeout == 60
    given = {"history_days": 7.0, "given": frozenset({"history_days"})}
    async with running(database_url=url, **given) as coordinator:
        assert coordinator.parts.settings.config.history_days == 7
        assert coordinator.parts.settings.config.agent_timeout == 60
        assert coordinator.parts.settings.config.max_queue == 5


@pytest.mark.spec("DASH-17")
async def test_a_database_that_cannot_be_read_changes_no_setting(tmp_path: Path) -> None:
    (tmp_path / "fleet.db").write_bytes(b"not a database at all, but long enough to look at")
    config = CoordinatorConfig(database_url=f"sqlite:///{tmp_path}/fleet.db")
    store = Store(database_of(config.database_url))
    assert Settings(config, store).config == config


@pytest.mark.spec("DASH-17")
async def test_a_kept_value_that_cannot_work_is_logged_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"sqlite:///{tmp_path}/fleet.db"
    wrong = b'"agent_timeout": 1e300, "policy": "cpu", "gone": 1, "history_days": "x"'
    async with running(database_url=url) as coordinator:
        coordinator.parts.store.note_document("settings", b'{"max_queue": 5, %s}' % wrong)
    async with running(database_url=url) as coordinator:
        config = coordinator.parts.settings.config
        assert config.max_queue == 5
        assert (config.agent_timeout, config.policy, config.history_days) == (60, "predicted", 30)
    left_out = {vars(record).get("setting") for record in caplog.records} - {None}
    assert left_out == {"agent_timeout", "policy", "gone", "history_days"}


@pytest.mark.spec("DASH-17")
async def test_a_change_is_kept_once_it_works(tmp_path: Path) -> None:
    store = Store(database_of(f"sqlite:///{tmp_path}/fleet.db"))
    async with store:
        settings = Settings(CoordinatorConfig(database_url="sqlite://:memory:"), store)
        settings.change({"max_queue": 5})
        assert settings.config.max_queue == 5
        await store.flush()
        assert await store.document("settings") is None
        settings.keep()
        await store.flush()
        assert await store.document("settings") == b'{"max_queue":5}'
