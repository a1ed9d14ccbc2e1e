"""The agent's configuration from its environment and its command line.

The table of `ollama_coordinator_common.settings` says which settings there are.
"""

import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path

import platformdirs
from msgspec import structs

from ollama_coordinator_common.error import ConfigError
from ollama_coordinator_common.join_token import JoinToken, certificate_in
from ollama_coordinator_common.network import coordinator_url, is_address
from ollama_coordinator_common.settings import AgentConfig

from .relay import parse_networks
from .schedule import Schedule
from .state import host_folder, host_id


def read(texts: Mapping[str, str]) -> AgentConfig:
    """The configuration as the operator gave it.

    Raises:
        ConfigError: one of the values cannot work.
    """
    config = AgentConfig.read(texts)
    try:
        urls = ",".join(map(coordinator_url, config.coordinator_urls))
    except ValueError as exc:
        raise ConfigError("COORDINATOR_URL", config.coordinator_url, str(exc)) from exc
    config = structs.replace(config, coordinator_url=urls)
    if config.ip_address and not is_address(config.ip_address):
        expected = "give an address such as 192.168.1.20, without scheme and port"
        raise ConfigError("AGENT_IP_ADDRESS", config.ip_address, expected)
    if config.ollama_binary and shutil.which(str(config.ollama_binary)) is None:
        expected = "give the path of an executable ollama program"
        raise ConfigError("OLLAMA_BINARY", config.ollama_binary, expected)
    _check_networks(config.relay_allow)
    schedule(config)
    models_address(config.models)
    secured = all(url.startswith("https:") for url in config.coordinator_urls)
    if certificate(config) and not secured:
        expected = "its coordinator has a certificate: give its URL with https://"
        raise ConfigError("COORDINATOR_URL", config.coordinator_url, expected)
    return config


def certificate(config: AgentConfig) -> str:
    """The SHA-256 of the only certificate that is believed; empty: one that the system trusts.

    Raises:
        ConfigError: the text is none.
    """
    token = join_token(config)
    try:
        given = certificate_in(config.certificate)
    except ValueError as exc:
        raise ConfigError("COORDINATOR_CERTIFICATE", config.certificate, str(exc)) from None
    return given or (token.certificate if token is not None else "")


def join_token(config: AgentConfig) -> JoinToken | None:
    """The join token, if there is one.

    Raises:
        ConfigError: the text is none.
    """
    if not config.join_token:
        return None
    try:
        return JoinToken.parse(config.join_token)
    except ValueError as exc:
        raise ConfigError("AGENT_JOIN_TOKEN", "a text that is none", str(exc)) from None


def schedule(config: AgentConfig) -> Schedule | None:
    """When this machine serves; `None`: always.

    Raises:
        ConfigError: the text is no schedule.
    """
    if not config.schedule:
        return None
    try:
        return Schedule.parse(config.schedule)
    except ValueError as exc:
        raise ConfigError("AGENT_SCHEDULE", config.schedule, str(exc)) from None


def _check_networks(entries: tuple[str, ...]) -> None:
    try:
        parse_networks(entries)
    except ValueError as exc:
        expected = f"{exc}; give addresses or networks such as 192.168.1.5,10.0.0.0/8"
        raise ConfigError("AGENT_RELAY_ALLOW", ",".join(entries), expected) from exc


def state_folder(config: AgentConfig, *, take_over: bool = False) -> Path:
    """Where the agent keeps its files; `take_over` as in `host_folder`."""
    if config.state_dir is not None:
        return config.state_dir
    base = platformdirs.user_state_path("ollama-coordinator-agent", appauthor=False)
    return host_folder(base, platform.node() or "unknown", host_id(), take_over=take_over)


def ollama_variables() -> dict[str, str]:
    """Ollama's own variables, as this program was given them."""
    return {name: text for name, text in os.environ.items() if name.startswith("OLLAMA_")}


def calling_user() -> str:
    """The user who runs this program by sudo; empty where nobody does."""
    return os.environ.get("SUDO_USER", "")


def machine_name(config: AgentConfig) -> str:
    """What people call this machine."""
    return config.machine_name or platform.node() or "unknown"


def models_address(text: str) -> tuple[str, str, int]:
    """`AGENT_MODELS` as a mode (auto, link, off, address), a host and a port.

    Raises:
        ConfigError: it is none.
    """
    word = text.strip()
    if word.lower() in ("auto", "link", "off"):
        return word.lower(), "", 0
    host, _, port = word.rpartition(":")
    if host and port.isdecimal() and 0 < int(port) < 65_536:
        return "address", host.strip("[]"), int(port)
    raise ConfigError("AGENT_MODELS", text, "give auto, link, off, or an address as HOST:PORT")
