"""Which file a `DATABASE_URL` names."""

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_coordinator.db import database_path
from ollama_coordinator_common.error import ConfigError


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
        ("mysql://host/db", "sqlite://FILE"),
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
        database_path(url)
    assert caught.value.variable == "DATABASE_URL"
    assert str(caught.value).startswith(f"DATABASE_URL={url} does not work: ")


@given(st.text())
def test_any_database_url_is_a_file_or_a_config_error(url: str) -> None:
    with suppress(ConfigError):
        database_path(f"sqlite://{url}")
