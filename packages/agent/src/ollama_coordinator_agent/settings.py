"""The command line's options, each with its environment variable, and what they mean.

Options are taken as text and read here, so that a wrong value is answered in one way: which
variable, which value, what would be right.
"""

import shutil
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from ollama_coordinator_common.commandline import LOG_LEVELS, Option, one_of, texts, truth
from ollama_coordinator_common.config import AgentConfig
from ollama_coordinator_common.error import ConfigError
from ollama_coordinator_common.protocol import is_address

from .relay import parse_networks


class Settings(msgspec.Struct, frozen=True):
    """What a command gets: the agent's configuration and how much to log."""

    config: AgentConfig
    log_level: str = "INFO"


OPTIONS = (
    Option(
        "COORDINATOR_URL", "coordinator_url", "http://localhost:8080", "URL", "The coordinator."
    ),
    Option("OLLAMA_PORT", "ollama_port", "11434", "PORT", "The local Ollama's port."),
    Option(
        "AGENT_MACHINE_NAME",
        "machine_name",
        "",
        "NAME",
        "What people call this machine; its host name if not given.",
    ),
    Option(
        "AGENT_IP_ADDRESS",
        "ip_address",
        "",
        "ADDRESS",
        "Where the coordinator reaches this machine; found out if not given.",
    ),
    Option(
        "AGENT_STATE_DIR",
        "state_dir",
        "",
        "FOLDER",
        "Where the machine's id and Ollama's log are kept; the user's state folder if not given.",
    ),
    Option(
        "AGENT_MANAGE_OLLAMA",
        "manage_ollama",
        "true",
        "true|false",
        "Whether to start `ollama serve` when no Ollama answers.",
    ),
    Option(
        "AGENT_KEEP_OLLAMA",
        "keep_ollama",
        "false",
        "true|false",
        "Whether an `ollama serve` that the agent started outlives it.",
    ),
    Option(
        "OLLAMA_BINARY",
        "ollama_binary",
        "",
        "FILE",
        "The ollama program; looked for on PATH and where it is installed if not given.",
    ),
    Option(
        "AGENT_RELAY",
        "relay",
        "auto",
        "auto|always|never",
        "Whether to relay the coordinator to an Ollama that listens on loopback only.",
    ),
    Option("AGENT_RELAY_PORT", "relay_port", "0", "PORT", "The relay's port; 0 for any."),
    Option(
        "AGENT_RELAY_ALLOW",
        "relay_allow",
        "",
        "LIST",
        "Addresses and networks, split by commas, that may use the relay besides the coordinator.",
    ),
    Option("AGENT_LOG_LEVEL", "log_level", "INFO", "|".join(LOG_LEVELS), "How much to log."),
)


def read(**given: str) -> Settings:
    """The settings as the operator gave them.

    Raises:
        ConfigError: one of them cannot work.
    """
    text = texts(OPTIONS, given)
    config = AgentConfig(
        coordinator_url=_url(text["coordinator_url"]),
        ollama_port=_port("OLLAMA_PORT", text["ollama_port"]),
        machine_name=text["machine_name"].strip() or None,
        ip_address=_host(text["ip_address"].strip()),
        state_dir=Path(text["state_dir"]).expanduser() if text["state_dir"] else None,
        manage_ollama=truth("AGENT_MANAGE_OLLAMA", text["manage_ollama"]),
        keep_ollama=truth("AGENT_KEEP_OLLAMA", text["keep_ollama"]),
        ollama_binary=_program(text["ollama_binary"]),
        relay=text["relay"].strip().lower(),
        relay_port=_port("AGENT_RELAY_PORT", text["relay_port"]),
        relay_allow=_networks(text["relay_allow"]),
    )
    return Settings(config, one_of("AGENT_LOG_LEVEL", text["log_level"], LOG_LEVELS))


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
