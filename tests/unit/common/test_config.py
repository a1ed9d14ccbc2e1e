"""Settings: what they mean by default, and how an impossible one is told."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_coordinator_common.config import AgentConfig, CoordinatorConfig, database_path
from ollama_coordinator_common.error import ConfigError


def test_the_defaults_are_those_of_the_first_version() -> None:
    config = CoordinatorConfig()
    assert (config.host, config.port) == ("0.0.0.0", 8080)
    assert config.database_url == "sqlite://coordinator.db"
    assert (config.health_check_interval, config.agent_timeout) == (30, 60)
    assert (AgentConfig().coordinator_url, AgentConfig().ollama_port) == (
        "http://localhost:8080",
        11434,
    )


@pytest.mark.spec("OPERATION-3")
@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite://coordinator.db", "coordinator.db"),
        ("sqlite:///coordinator.db", "coordinator.db"),
        ("sqlite://data/coordinator.db", "data/coordinator.db"),
        ("sqlite:///var/lib/coordinator.db", "/var/lib/coordinator.db"),
        ("sqlite:////var/lib/coordinator.db", "/var/lib/coordinator.db"),
        ("sqlite:///C:/data/coordinator.db", "C:/data/coordinator.db"),
        ("sqlite://C:/data/coordinator.db", "C:/data/coordinator.db"),
        ("sqlite:///C:\\data\\coordinator.db", "C:\\data\\coordinator.db"),
        ("sqlite://my%20fleet.db", "my fleet.db"),
        ("sqlite://my fleet.db", "my fleet.db"),
        ("sqlite://fleet.db?mode=rwc", "fleet.db"),
        ("sqlite://./fleet.db", "fleet.db"),
        ("sqlite://../fleet.db", "../fleet.db"),
    ],
)
def test_a_database_url_names_a_file(url: str, path: str) -> None:
    assert database_path(url) == Path(path)


@pytest.mark.spec("OPERATION-3")
@pytest.mark.parametrize(
    "url", ["sqlite://:memory:", "sqlite:///:memory:", "sqlite://:memory:?a=b"]
)
def test_a_database_can_be_in_memory(url: str) -> None:
    assert database_path(url) is None


@pytest.mark.spec("OPERATION-3")
@pytest.mark.parametrize(
    ("url", "right"),
    [
        ("postgresql://host/db", "only SQLite is supported"),
        ("coordinator.db", "sqlite://FILE"),
        ("sqlite:coordinator.db", "sqlite://FILE"),
        ("", "sqlite://FILE"),
        ("sqlite://", "the file name is missing"),
        ("sqlite:///", "the file name is missing"),
        ("sqlite://data/", "the file name is missing"),
        ("sqlite://?mode=rwc", "the file name is missing"),
    ],
)
def test_another_url_is_told_with_what_would_be_right(url: str, right: str) -> None:
    with pytest.raises(ConfigError, match=right) as caught:
        CoordinatorConfig(database_url=url)
    assert caught.value.variable == "DATABASE_URL"
    assert str(caught.value).startswith(f"DATABASE_URL={url} does not work: ")


@given(st.text())
def test_any_database_url_is_a_file_or_a_config_error(url: str) -> None:
    with suppress(ConfigError):
        database_path(f"sqlite://{url}")


@pytest.mark.parametrize(
    ("variable", "setting"),
    [
        ("HEALTH_CHECK_INTERVAL", {"health_check_interval": 0.0}),
        ("HEALTH_CHECK_INTERVAL", {"health_check_interval": float("nan")}),
        ("AGENT_TIMEOUT", {"agent_timeout": -1.0}),
        ("AGENT_TIMEOUT", {"agent_timeout": float("inf")}),
        ("COORDINATOR_MAX_BODY_MIB", {"max_body_mebibytes": 0}),
        ("COORDINATOR_MAX_QUEUE", {"max_queue": -1}),
        ("COORDINATOR_DRAIN_TIMEOUT", {"drain_timeout": -0.5}),
        ("COORDINATOR_STALL_TIMEOUT", {"stall_timeout": -1}),
        ("COORDINATOR_BODY_TIMEOUT", {"body_timeout": float("inf")}),
        ("COORDINATOR_DRAIN_TIMEOUT", {"drain_timeout": float("nan")}),
        ("COORDINATOR_DRAIN_TIMEOUT", {"drain_timeout": float("inf")}),
        ("COORDINATOR_PORT", {"port": -1}),
        ("COORDINATOR_PORT", {"port": 65536}),
    ],
)
def test_an_impossible_number_names_its_variable_and_value(
    variable: str, setting: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="give ") as caught:
        CoordinatorConfig(**setting)
    assert caught.value.variable == variable
    assert caught.value.value is next(iter(setting.values()))
    assert f"{variable}={next(iter(setting.values()))}" in str(caught.value)


def test_nothing_may_wait_and_nothing_may_linger() -> None:
    config = CoordinatorConfig(max_queue=0, drain_timeout=0, port=0)
    assert (config.max_queue, config.drain_timeout, config.port) == (0, 0, 0)


def test_the_body_limit_is_given_in_mebibytes() -> None:
    assert CoordinatorConfig(max_body_mebibytes=3).max_body_bytes == 3 * 1024 * 1024


@pytest.mark.parametrize(
    ("variable", "setting"),
    [
        ("COORDINATOR_URL", {"coordinator_url": "coordinator:8080"}),
        ("COORDINATOR_URL", {"coordinator_url": "ftp://coordinator"}),
        ("COORDINATOR_URL", {"coordinator_url": "http://"}),
        ("COORDINATOR_URL", {"coordinator_url": ""}),
        ("OLLAMA_PORT", {"ollama_port": 0}),
        ("OLLAMA_PORT", {"ollama_port": 65536}),
        ("AGENT_RELAY_PORT", {"relay_port": -1}),
        ("AGENT_RELAY", {"relay": "perhaps"}),
    ],
)
def test_an_agents_impossible_setting_names_its_variable(
    variable: str, setting: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="give ") as caught:
        AgentConfig(**setting)
    assert caught.value.variable == variable
