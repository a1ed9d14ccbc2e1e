"""The command line and its environment."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import ollama_coordinator
from ollama_coordinator import main
from ollama_coordinator.settings import read
from ollama_coordinator_common.settings import POLICIES, CoordinatorConfig

DEFAULTS = {
    "COORDINATOR_HOST": "0.0.0.0",
    "COORDINATOR_PORT": "8080",
    "DATABASE_URL": "sqlite://coordinator.db",
    "HEALTH_CHECK_INTERVAL": "30",
    "AGENT_TIMEOUT": "60",
    "COORDINATOR_POLICY": POLICIES[0],
    "COORDINATOR_MAX_QUEUE": "512",
    "COORDINATOR_MAX_BODY_MIB": "64",
    "COORDINATOR_DRAIN_TIMEOUT": "300",
    "COORDINATOR_LOG_LEVEL": "INFO",
}
"""Some of the variables, the first version's among them; README's tables are tested whole."""


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[CoordinatorConfig]:
    """What `serve` was called with; nothing is served."""
    calls: list[CoordinatorConfig] = []
    monkeypatch.setattr(main, "_serve", lambda settings, *more: calls.append(settings))
    return calls


@pytest.mark.spec("OPERATION-2")
@pytest.mark.parametrize("command", [[], ["serve"]])
def test_help_names_every_variable_with_its_default(command: list[str]) -> None:
    result = CliRunner().invoke(main.app, [*command, "--help"], terminal_width=300)
    text = " ".join(result.output.split())
    shown = dict(re.findall(r"\[env var: (\w+); default: ([^\]]*)\]", text))
    assert shown.items() >= DEFAULTS.items()


@pytest.mark.parametrize("command", [[], ["serve"]])
def test_the_bare_command_serves(served: list[CoordinatorConfig], command: list[str]) -> None:
    result = CliRunner().invoke(main.app, [*command, "--port", "1"], env={"AGENT_TIMEOUT": "5"})
    assert result.exit_code == 0, result.output
    assert served == [CoordinatorConfig(port=1, agent_timeout=5.0)]


@pytest.mark.spec("OPERATION-2")
def test_an_option_beats_the_environment(served: list[CoordinatorConfig]) -> None:
    CliRunner().invoke(main.app, ["--port", "2"], env={"COORDINATOR_PORT": "1"})
    assert served[0].port == 2


def test_options_before_the_command_are_refused_and_not_lost(
    served: list[CoordinatorConfig],
) -> None:
    result = CliRunner().invoke(main.app, ["--port", "1", "serve"])
    assert result.exit_code == 2
    assert "give options after `serve`" in result.output
    assert served == []


def test_the_version_is_that_of_the_distribution() -> None:
    result = CliRunner().invoke(main.app, ["--version"])
    assert re.fullmatch(r"ollama-coordinator \d+\.\d+\.\d+\n", result.output)


@pytest.mark.spec("OPERATION-2")
@pytest.mark.parametrize("command", [[], ["serve"]])
@pytest.mark.parametrize(
    ("variable", "value", "right"),
    [
        ("COORDINATOR_PORT", "http", "give a port from 1 to 65535, or 0 for any"),
        ("COORDINATOR_PORT", "65536", "1 to 65535"),
        ("DATABASE_URL", "mysql://db", "sqlite://FILE"),
        ("HEALTH_CHECK_INTERVAL", "0.0", "seconds from 0.01 to 31536000"),
        ("HEALTH_CHECK_INTERVAL", "often", "give a number"),
        ("AGENT_TIMEOUT", "inf", "seconds from 0.01 to 31536000"),
        ("AGENT_TIMEOUT", "nan", "seconds from 0.01 to 31536000"),
        ("COORDINATOR_POLICY", "fastest", POLICIES[0]),
        ("COORDINATOR_MAX_QUEUE", "-1", "whole number of requests from 0 to 1000000"),
        ("COORDINATOR_MAX_QUEUE", "1.5", "whole number"),
        ("COORDINATOR_MAX_BODY_MIB", "0", "mebibytes from 1 to 1000000"),
        ("COORDINATOR_DRAIN_TIMEOUT", "nan", "seconds from 0 to 31536000"),
        ("COORDINATOR_STALL_TIMEOUT", "-1", "seconds from 0.01 to 31536000, or 0 for ever"),
        ("COORDINATOR_HISTORY_DAYS", "1e300", "days from 0.001 to 365000"),
        ("COORDINATOR_PULL_PLACEMENT", "label:", "label:NAME"),
        ("COORDINATOR_ORIGINS", "not an origin", "https://chat.example.org"),
        ("COORDINATOR_ORIGINS", "https://chat.example.org/", "without a path"),
        ("COORDINATOR_HOSTS", "http://fleet.lan", "coordinator.example.org"),
        ("COORDINATOR_USER_HEADER", "X User", "X-User"),
        ("COORDINATOR_LOG_LEVEL", "LOUD", "DEBUG"),
    ],
)
def test_a_wrong_setting_is_explained(
    served: list[CoordinatorConfig], command: list[str], variable: str, value: str, right: str
) -> None:
    result = CliRunner().invoke(main.app, command, env={variable: value})
    assert result.exit_code == 2
    assert f"Error: {variable}={value} does not work: " in result.output
    assert right in result.output
    assert served == []


def test_an_option_in_help_is_the_default_of_the_configuration(
    served: list[CoordinatorConfig],
) -> None:
    assert CliRunner().invoke(main.app, []).exit_code == 0
    assert served == [CoordinatorConfig()]


def test_text_becomes_what_it_means() -> None:
    config = read({"host": " ::1 ", "policy": POLICIES[-1].upper(), "log_level": "debug"})
    assert (config.host, config.policy, config.log_level) == ("::1", POLICIES[-1], "DEBUG")


@pytest.mark.spec("OPERATION-2")
def test_origins_are_taken_as_browsers_send_them_and_as_ollama_takes_them() -> None:
    origins = "https://chat.example.org:8443,chrome-extension://abc,http://*.lan,*,null,*.lan"
    assert read({"origins": origins}).origins == tuple(origins.split(","))


@pytest.mark.spec("OPERATION-4")
@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.9"])
def test_an_address_that_is_not_here_is_explained(tmp_path: Path, host: str) -> None:
    arguments = ["--host", host, "--database-url", f"sqlite://{tmp_path}/c.db"]
    result = CliRunner().invoke(main.app, arguments)
    assert result.exit_code == 1
    assert f"COORDINATOR_HOST={host} does not work" in result.output
    assert "give an address of this machine" in result.output


def test_every_command_says_what_it_does() -> None:
    result = CliRunner().invoke(main.app, ["--help"], terminal_width=200)
    assert "Serve until stopped" in result.output
    assert ollama_coordinator.__doc__
