"""The command line's options, each with its environment variable, and what they mean.

Options are taken as text and read here, so that a wrong value is answered in one way: which
variable, which value, what would be right.
"""

import shutil
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec
import typer

from ollama_coordinator_common.commandline import LOG_LEVELS, one_of, truth
from ollama_coordinator_common.config import AgentConfig
from ollama_coordinator_common.error import ConfigError
from ollama_coordinator_common.protocol import is_address

from .relay import parse_networks


class Settings(msgspec.Struct, frozen=True):
    """What a command gets: the agent's configuration and how much to log."""

    config: AgentConfig
    log_level: str = "INFO"


def _option(name: str, variable: str, metavar: str, text: str) -> Any:
    return typer.Option(
        name, envvar=variable, metavar=metavar, help=text, show_default=True, show_envvar=True
    )


CoordinatorUrl = Annotated[
    str, _option("--coordinator-url", "COORDINATOR_URL", "URL", "The coordinator.")
]
OllamaPort = Annotated[
    str, _option("--ollama-port", "OLLAMA_PORT", "PORT", "The local Ollama's port.")
]
MachineName = Annotated[
    str,
    _option(
        "--machine-name",
        "AGENT_MACHINE_NAME",
        "NAME",
        "What people call this machine; its host name if not given.",
    ),
]
IpAddress = Annotated[
    str,
    _option(
        "--ip-address",
        "AGENT_IP_ADDRESS",
        "ADDRESS",
        "Where the coordinator reaches this machine; found out if not given.",
    ),
]
StateDir = Annotated[
    str,
    _option(
        "--state-dir",
        "AGENT_STATE_DIR",
        "FOLDER",
        "Where the machine's id and Ollama's log are kept; the user's state folder if not given.",
    ),
]
ManageOllama = Annotated[
    str,
    _option(
        "--manage-ollama",
        "AGENT_MANAGE_OLLAMA",
        "true|false",
        "Whether to start `ollama serve` when no Ollama answers.",
    ),
]
KeepOllama = Annotated[
    str,
    _option(
        "--keep-ollama",
        "AGENT_KEEP_OLLAMA",
        "true|false",
        "Whether an `ollama serve` that the agent started outlives it.",
    ),
]
OllamaBinary = Annotated[
    str,
    _option(
        "--ollama-binary",
        "OLLAMA_BINARY",
        "FILE",
        "The ollama program; looked for on PATH and where it is installed if not given.",
    ),
]
Relay = Annotated[
    str,
    _option(
        "--relay",
        "AGENT_RELAY",
        "auto|always|never",
        "Whether to relay the coordinator to an Ollama that listens on loopback only.",
    ),
]
RelayPort = Annotated[
    str, _option("--relay-port", "AGENT_RELAY_PORT", "PORT", "The relay's port; 0 for any.")
]
RelayAllow = Annotated[
    str,
    _option(
        "--relay-allow",
        "AGENT_RELAY_ALLOW",
        "LIST",
        "Addresses and networks, separated by commas, that may use the relay besides the"
        " coordinator.",
    ),
]
LogLevel = Annotated[
    str, _option("--log-level", "AGENT_LOG_LEVEL", "|".join(LOG_LEVELS), "How much to log.")
]


def read(
    coordinator_url: CoordinatorUrl = "http://localhost:8080",
    ollama_port: OllamaPort = "11434",
    machine_name: MachineName = "",
    ip_address: IpAddress = "",
    state_dir: StateDir = "",
    manage_ollama: ManageOllama = "true",
    keep_ollama: KeepOllama = "false",
    ollama_binary: OllamaBinary = "",
    relay: Relay = "auto",
    relay_port: RelayPort = "0",
    relay_allow: RelayAllow = "",
    log_level: LogLevel = "INFO",
) -> Settings:
    """The settings as the operator gave them.

    Raises:
        ConfigError: one of them cannot work.
    """
    config = AgentConfig(
        coordinator_url=_url(coordinator_url),
        ollama_port=_port("OLLAMA_PORT", ollama_port),
        machine_name=machine_name.strip() or None,
        ip_address=_host(ip_address.strip()),
        state_dir=Path(state_dir).expanduser() if state_dir else None,
        manage_ollama=truth("AGENT_MANAGE_OLLAMA", manage_ollama),
        keep_ollama=truth("AGENT_KEEP_OLLAMA", keep_ollama),
        ollama_binary=_program(ollama_binary),
        relay=relay.strip().lower(),
        relay_port=_port("AGENT_RELAY_PORT", relay_port),
        relay_allow=_networks(relay_allow),
    )
    return Settings(config, one_of("AGENT_LOG_LEVEL", log_level, LOG_LEVELS))


def _url(text: str) -> str:
    """The URL, if its parts can be taken apart at all; `AgentConfig` judges them."""
    try:
        _ = urlsplit(text).port
    except ValueError as exc:
        expected = f"{exc}; give a URL such as http://coordinator:8080"
        raise ConfigError("COORDINATOR_URL", text, expected) from exc
    return text


def _port(variable: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(variable, text, "give a port from 1 to 65535") from None


def _host(text: str) -> str | None:
    if text and not is_address(text):
        expected = "give an address such as 192.168.1.20, without scheme and port"
        raise ConfigError("AGENT_IP_ADDRESS", text, expected)
    return text or None


def _program(text: str) -> Path | None:
    if text and shutil.which(str(Path(text).expanduser())) is None:
        raise ConfigError("OLLAMA_BINARY", text, "give the path of an executable ollama program")
    return Path(text).expanduser() if text else None


def _networks(text: str) -> tuple[str, ...]:
    entries = tuple(entry.strip() for entry in text.split(",") if entry.strip())
    try:
        parse_networks(entries)
    except ValueError as exc:
        expected = f"{exc}; give addresses or networks such as 192.168.1.5,10.0.0.0/8"
        raise ConfigError("AGENT_RELAY_ALLOW", text, expected) from exc
    return entries
