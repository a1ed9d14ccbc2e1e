"""The settings of both programs, their defaults, and what makes a value impossible.

Every problem is a `ConfigError` that names the environment variable, the value and what would be
right. Nothing here reads the environment; the command lines do.
"""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from msgspec import Struct

from .error import ConfigError

MEBIBYTE = 1024 * 1024


class CoordinatorConfig(Struct, frozen=True, kw_only=True):
    """How a coordinator runs; durations in seconds.

    `given` names the options that the environment or the command line sets.
    """

    host: str = "0.0.0.0"
    port: int = 8080
    database_url: str = "sqlite://coordinator.db"
    health_check_interval: float = 30.0
    agent_timeout: float = 60.0
    policy: str = "predicted"
    max_queue: int = 512
    max_body_mebibytes: int = 64
    drain_timeout: float = 300.0
    stall_timeout: float = 300.0
    body_timeout: float = 60.0
    history_rows: int = 100_000
    history_days: float = 30.0
    larger_context: bool = True
    origins: tuple[str, ...] = ()
    pull_placement: str = "all"
    pull_patience: float = 15.0
    max_spool_gibibytes: float = 64.0
    http: str = "auto"
    given: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        database_path(self.database_url)
        for variable, value in (
            ("HEALTH_CHECK_INTERVAL", self.health_check_interval),
            ("AGENT_TIMEOUT", self.agent_timeout),
            ("COORDINATOR_MAX_BODY_MIB", self.max_body_mebibytes),
            ("COORDINATOR_HISTORY_ROWS", self.history_rows),
            ("COORDINATOR_HISTORY_DAYS", self.history_days),
            ("COORDINATOR_MAX_SPOOL_GIB", self.max_spool_gibibytes),
        ):
            if not 0 < value < float("inf"):
                raise ConfigError(variable, value, "give a number greater than 0")
        for variable, value in (
            ("COORDINATOR_MAX_QUEUE", self.max_queue),
            ("COORDINATOR_DRAIN_TIMEOUT", self.drain_timeout),
            ("COORDINATOR_STALL_TIMEOUT", self.stall_timeout),
            ("COORDINATOR_BODY_TIMEOUT", self.body_timeout),
            ("COORDINATOR_PULL_PATIENCE", self.pull_patience),
        ):
            if not 0 <= value < float("inf"):
                raise ConfigError(variable, value, "give 0 or a number greater than 0")
        if not 0 <= self.port <= 65535:
            expected = "give a port from 1 to 65535, or 0 for any"
            raise ConfigError("COORDINATOR_PORT", self.port, expected)

    @property
    def max_body_bytes(self) -> int:
        """The largest request body that is accepted; a longer one is answered 413."""
        return self.max_body_mebibytes * MEBIBYTE


class AgentConfig(Struct, frozen=True, kw_only=True):
    """How an agent runs."""

    coordinator_url: str = "http://localhost:8080"
    ollama_port: int = 11434
    machine_name: str | None = None
    ip_address: str | None = None
    state_dir: Path | None = None
    manage_ollama: bool = True
    keep_ollama: bool = False
    ollama_binary: Path | None = None
    relay: str = "auto"
    relay_port: int = 0
    relay_allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        parts = urlsplit(self.coordinator_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                "COORDINATOR_URL",
                self.coordinator_url,
                "give a URL such as http://coordinator:8080",
            )
        if not 1 <= self.ollama_port <= 65535:
            raise ConfigError("OLLAMA_PORT", self.ollama_port, "give a port from 1 to 65535")
        if not 0 <= self.relay_port <= 65535:
            expected = "give a port from 1 to 65535, or 0 for any"
            raise ConfigError("AGENT_RELAY_PORT", self.relay_port, expected)
        if self.relay not in ("auto", "always", "never"):
            raise ConfigError("AGENT_RELAY", self.relay, "give auto, always or never")


def database_path(url: str) -> Path | None:
    """The file that a `DATABASE_URL` names; `None` for a database in memory.

    `sqlite://name.db` and `sqlite:///name.db` are files in the working directory,
    `sqlite:///var/lib/name.db` (or with a fourth slash) and `sqlite:///C:/name.db` are absolute,
    `sqlite://:memory:` is in memory.

    Raises:
        ConfigError: another scheme, or no file name.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme != "sqlite":
        expected = "only SQLite is supported; give sqlite://FILE or sqlite:///ABSOLUTE/FILE"
        raise ConfigError("DATABASE_URL", url, expected)
    name = unquote(rest.partition("?")[0])
    if name.strip("/") == ":memory:":
        return None
    if not name.strip("/") or name.endswith("/"):
        raise ConfigError("DATABASE_URL", url, "the file name is missing; give sqlite://FILE")
    if name.startswith("/"):
        inner = name.lstrip("/")
        is_drive = inner[1:2] == ":"
        # Nobody keeps a database in the root folder: three slashes and a bare name mean "here".
        name = inner if is_drive or "/" not in inner else f"/{inner}"
    return Path(name)
