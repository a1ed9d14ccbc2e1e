"""The command line's options, each with its environment variable, and what they mean.

Options are taken as text and read here, so that a wrong value is answered in one way: which
variable, which value, what would be right.
"""

from typing import Annotated, Any

import typer
from msgspec import Struct

from ollama_coordinator_common.commandline import LOG_LEVELS, number, one_of, whole_number
from ollama_coordinator_common.config import CoordinatorConfig

from .scheduler import POLICIES


class Settings(Struct, frozen=True):
    """What a command gets: the coordinator's configuration and how much to log."""

    config: CoordinatorConfig
    log_level: str


def option(name: str, variable: str, metavar: str, text: str) -> Any:
    """An option with its environment variable."""
    return typer.Option(
        name, envvar=variable, metavar=metavar, help=text, show_default=True, show_envvar=True
    )


def read(
    host: Annotated[
        str, option("--host", "COORDINATOR_HOST", "ADDRESS", "Where to listen.")
    ] = "0.0.0.0",
    port: Annotated[str, option("--port", "COORDINATOR_PORT", "PORT", "On which port.")] = "8080",
    database_url: Annotated[
        str,
        option(
            "--database-url",
            "DATABASE_URL",
            "URL",
            "The SQLite file that keeps the agents and what was learned of them.",
        ),
    ] = "sqlite://coordinator.db",
    health_check_interval: Annotated[
        str,
        option(
            "--health-check-interval",
            "HEALTH_CHECK_INTERVAL",
            "SECONDS",
            "How often to ask agents that do not report their models by themselves.",
        ),
    ] = "30",
    agent_timeout: Annotated[
        str,
        option(
            "--agent-timeout",
            "AGENT_TIMEOUT",
            "SECONDS",
            "How long an agent may be silent before it counts as offline.",
        ),
    ] = "60",
    policy: Annotated[
        str,
        option(
            "--policy", "COORDINATOR_POLICY", "|".join(POLICIES), "How to choose among the agents."
        ),
    ] = POLICIES[0],
    max_queue: Annotated[
        str,
        option(
            "--max-queue",
            "COORDINATOR_MAX_QUEUE",
            "REQUESTS",
            "How many requests may wait for a place; one more is answered 503.",
        ),
    ] = "512",
    max_body: Annotated[
        str,
        option(
            "--max-body",
            "COORDINATOR_MAX_BODY_MIB",
            "MEBIBYTES",
            "The largest request body; a longer one is answered 413.",
        ),
    ] = "64",
    drain_timeout: Annotated[
        str,
        option(
            "--drain-timeout",
            "COORDINATOR_DRAIN_TIMEOUT",
            "SECONDS",
            "How long running answers may go on after a request to stop.",
        ),
    ] = "300",
    log_level: Annotated[
        str,
        option("--log-level", "COORDINATOR_LOG_LEVEL", "|".join(LOG_LEVELS), "How much to log."),
    ] = "INFO",
) -> Settings:
    """The settings as the operator gave them.

    Raises:
        ConfigError: one of them cannot work.
    """
    config = CoordinatorConfig(
        host=host.strip(),
        port=whole_number("COORDINATOR_PORT", port),
        database_url=database_url,
        health_check_interval=number("HEALTH_CHECK_INTERVAL", health_check_interval),
        agent_timeout=number("AGENT_TIMEOUT", agent_timeout),
        policy=one_of("COORDINATOR_POLICY", policy, POLICIES),
        max_queue=whole_number("COORDINATOR_MAX_QUEUE", max_queue),
        max_body_mebibytes=whole_number("COORDINATOR_MAX_BODY_MIB", max_body),
        drain_timeout=number("COORDINATOR_DRAIN_TIMEOUT", drain_timeout),
    )
    return Settings(config, one_of("COORDINATOR_LOG_LEVEL", log_level, LOG_LEVELS))
