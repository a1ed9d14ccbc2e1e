"""Settings as an operator sees and changes them."""

from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from ollama_coordinator.tuning import started
from ollama_coordinator_common.config import CoordinatorConfig
from support.coordinator import Running, running


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
async def test_what_the_environment_sets_cannot_be_changed_here() -> None:
    async with running(max_queue=7, given=frozenset({"max_queue"})) as coordinator:
        status, body = await change(coordinator, max_queue=9, agent_timeout=5)
        assert status == 409
        assert "COORDINATOR_MAX_QUEUE" in body["error"]
        assert (await settings(coordinator))["agent_timeout"]["value"] == 60
        for name in ("port", "nonesuch"):
            assert (await change(coordinator, **{name: 1}))[0] == 409


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
        {"agent_timeout": 0}, {"agent_timeout": "soon"}, {"policy": "best"}, {"max_queue": 1.5},
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
async def test_changes_survive_a_restart_and_some_wait_for_it(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/fleet.db"
    async with running(database_url=url) as coordinator:
        await change(coordinator, policy="round-robin", agent_timeout=33, max_queue=5)
        policy = (await settings(coordinator))["policy"]
        assert policy["next"] == "round-robin"
        assert policy["value"] == coordinator.parts.config.policy != "round-robin"
    async with running(database_url=url) as coordinator:
        listed = await settings(coordinator)
        assert listed["policy"]["value"] == coordinator.parts.config.policy == "round-robin"
        assert listed["agent_timeout"]["value"] == coordinator.parts.registry.agent_timeout == 33
        assert listed["max_queue"]["source"] == "dashboard"
        assert (await change(coordinator, agent_timeout=None))[0] == 200
        assert coordinator.parts.registry.agent_timeout == 60
    given = {"policy": "random", "given": frozenset({"policy"})}
    async with running(database_url=url, **given) as coordinator:
        assert coordinator.parts.config.policy == "random"
        assert coordinator.parts.config.agent_timeout == 60
        assert coordinator.parts.config.max_queue == 5


@pytest.mark.spec("DASH-17")
async def test_a_database_that_cannot_be_read_changes_no_setting(tmp_path: Path) -> None:
    (tmp_path / "fleet.db").write_bytes(b"not a database at all, but long enough to look at")
    config = CoordinatorConfig(database_url=f"sqlite:///{tmp_path}/fleet.db")
    assert started(config).config == config
