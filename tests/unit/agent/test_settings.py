"""The command line and its environment."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ollama_coordinator_agent import main
from ollama_coordinator_agent.settings import certificate, read
from ollama_coordinator_common.settings import AgentConfig

VARIABLES = {
    "COORDINATOR_URL",
    "COORDINATOR_CERTIFICATE",
    "OLLAMA_PORT",
    "OLLAMA_BINARY",
    "AGENT_MACHINE_NAME",
    "AGENT_IP_ADDRESS",
    "AGENT_STATE_DIR",
    "AGENT_MODELS",
    "AGENT_MANAGE_OLLAMA",
    "AGENT_KEEP_OLLAMA",
    "AGENT_TRANSPORT",
    "AGENT_SCHEDULE",
    "AGENT_IDLE_AFTER",
    "AGENT_RELAY",
    "AGENT_RELAY_PORT",
    "AGENT_JOIN_TOKEN",
    "AGENT_RELAY_ALLOW",
    "AGENT_LOG_FORMAT",
    "AGENT_LOG_LEVEL",
}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[AgentConfig]:
    """What `run` was called with; nothing is run."""
    calls: list[AgentConfig] = []
    monkeypatch.setattr(main, "_run", calls.append)
    return calls


@pytest.mark.spec("AGENT-1")
@pytest.mark.parametrize("command", [[], ["run"]])
def test_the_bare_command_runs(ran: list[AgentConfig], command: list[str]) -> None:
    arguments = [*command, "--coordinator-url", "http://c:1", "--keep-ollama", "yes"]
    result = CliRunner().invoke(main.app, arguments, env={"OLLAMA_PORT": "5000"})
    assert result.exit_code == 0, result.output
    assert ran == [AgentConfig(coordinator_url="http://c:1", ollama_port=5000, keep_ollama=True)]


@pytest.mark.spec("AGENT-1")
def test_options_before_the_command_are_refused_and_not_lost(ran: list[AgentConfig]) -> None:
    result = CliRunner().invoke(main.app, ["--ollama-port", "5000", "run"])
    assert result.exit_code == 2
    assert "after" in result.output
    assert ran == []


@pytest.mark.spec("AGENT-2")
@pytest.mark.parametrize("command", [[], ["run"], ["status"]])
def test_help_names_every_variable(command: list[str]) -> None:
    result = CliRunner().invoke(main.app, [*command, "--help"], terminal_width=200)
    assert set(re.findall(r"env var: (\w+)", " ".join(result.output.split()))) == VARIABLES


@pytest.mark.spec("ACCESS-26")
@pytest.mark.parametrize(
    "given",
    [
        {"COORDINATOR_CERTIFICATE": "AB:" * 31 + "AB"},
        {"AGENT_JOIN_TOKEN": f"oc1.{'ab' * 32}.oc_{'x' * 43}"},
    ],
)
def test_a_certificate_needs_a_url_with_tls(ran: list[AgentConfig], given: dict[str, str]) -> None:
    refused = CliRunner().invoke(main.app, [], env={"COORDINATOR_URL": "http://c:8080", **given})
    assert (refused.exit_code, "https://" in refused.output, ran) == (2, True, [])
    done = CliRunner().invoke(main.app, [], env={"COORDINATOR_URL": "https://c:8080", **given})
    assert done.exit_code == 0
    assert certificate(ran[0]) == "ab" * 32


@pytest.mark.spec("AGENT-2")
def test_the_version_is_that_of_the_distribution() -> None:
    result = CliRunner().invoke(main.app, ["--version"])
    assert re.fullmatch(r"ollama-coordinator-agent \d+\.\d+\.\d+\n", result.output)


@pytest.mark.spec("AGENT-3")
@pytest.mark.parametrize(
    ("variable", "value", "right"),
    [
        ("COORDINATOR_URL", "ws://coordinator:8080", "http://coordinator:8080"),
        ("COORDINATOR_URL", "http://c:99999", "http://coordinator:8080"),
        ("COORDINATOR_URL", "http://[::1", "http://coordinator:8080"),
        ("COORDINATOR_CERTIFICATE", "ab:cd", "64 hexadecimal digits"),
        ("OLLAMA_PORT", "http", "1 to 65535"),
        ("OLLAMA_PORT", "0", "1 to 65535"),
        ("OLLAMA_PORT", "70000", "1 to 65535"),
        ("OLLAMA_BINARY", "/no/such/ollama", "path"),
        ("AGENT_IP_ADDRESS", "http://192.168.1.2:1", "192.168.1.20"),
        ("AGENT_IP_ADDRESS", "300.1.1.1", "192.168.1.20"),
        ("AGENT_MANAGE_OLLAMA", "maybe", "true or false"),
        ("AGENT_KEEP_OLLAMA", "2", "true or false"),
        ("AGENT_TRANSPORT", "tunnel", "auto, direct, link"),
        ("AGENT_SCHEDULE", "mon 8-18", "mon-fri 18:00-08:00"),
        ("AGENT_IDLE_AFTER", "-5", "0 to serve always"),
        ("AGENT_RELAY", "sometimes", "auto, always, never"),
        ("AGENT_RELAY_PORT", "-1", "0 for any"),
        ("AGENT_RELAY_ALLOW", "10.0.0.1,lan", "networks"),
        ("AGENT_LOG_LEVEL", "LOUD", "DEBUG"),
    ],
)
@pytest.mark.parametrize("command", [[], ["run"], ["status"]])
def test_a_wrong_setting_is_explained(
    ran: list[AgentConfig], command: list[str], variable: str, value: str, right: str
) -> None:
    result = CliRunner().invoke(main.app, command, env={variable: value})
    assert result.exit_code == 2
    assert f"{variable}={value}" in result.output
    assert right in result.output
    assert ran == []


@pytest.mark.spec("AGENT-3")
def test_what_is_not_given_has_its_default() -> None:
    config = read({})
    assert config.coordinator_urls == ()
    assert config.ollama_port == 11434
    assert (config.machine_name, config.ip_address, config.state_dir) == (None, None, None)
    assert config.manage_ollama
    assert not config.keep_ollama


@pytest.mark.spec("AGENT-3")
def test_text_becomes_what_it_means() -> None:
    config = read(
        {
            "ip_address": "192.168.1.9",
            "state_dir": "~/agent",
            "relay": "Always",
            "relay_allow": "10.0.0.0/8, 192.168.1.5 ,",
            "log_level": "debug",
        }
    )
    assert config.ip_address == "192.168.1.9"
    assert config.state_dir == Path.home() / "agent"
    assert config.relay == "always"
    assert config.relay_allow == ("10.0.0.0/8", "192.168.1.5")
