"""The command line's options, each with its environment variable, and what they mean.

Options are taken as text and read here, so that a wrong value is answered in one way: which
variable, which value, what would be right.
"""

from asyncio import AbstractEventLoop
from collections.abc import Callable
from typing import Annotated, Any

import typer
from msgspec import Struct

from ollama_coordinator_common.commandline import LOG_LEVELS, number, one_of, truth, whole_number
from ollama_coordinator_common.config import CoordinatorConfig
from ollama_coordinator_common.error import ConfigError

from .http1 import CHOICES as HTTP_CHOICES
from .loops import LOOPS, loop_of
from .operations import Placement, WrongPlacement
from .scheduler import POLICIES


class Settings(Struct, frozen=True):
    """What a command gets: the configuration, how much to log, whose event loop to run on."""

    config: CoordinatorConfig
    log_level: str
    new_loop: Callable[[], AbstractEventLoop] | None = None


def placement(text: str) -> str:
    """The setting of where pulled models go, checked.

    Raises:
        ConfigError: it means nothing.
    """
    try:
        Placement.parse(text)
    except WrongPlacement as exc:
        raise ConfigError("COORDINATOR_PULL_PLACEMENT", text, str(exc)) from exc
    return text


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
    history_rows: Annotated[
        str,
        option(
            "--history-rows",
            "COORDINATOR_HISTORY_ROWS",
            "REQUESTS",
            "How many finished requests to remember (never their texts).",
        ),
    ] = "100000",
    history_days: Annotated[
        str,
        option(
            "--history-days",
            "COORDINATOR_HISTORY_DAYS",
            "DAYS",
            "How long to remember them.",
        ),
    ] = "30",
    larger_context: Annotated[
        str,
        option(
            "--larger-context",
            "COORDINATOR_LARGER_CONTEXT",
            "true|false",
            "Serve a request on a runner with a larger context than it asks for, not by a reload.",
        ),
    ] = "true",
    origins: Annotated[
        str,
        option(
            "--origins",
            "COORDINATOR_ORIGINS",
            "ORIGIN,...",
            "Web pages that may use the coordinator, beside those of this machine; * is any text.",
        ),
    ] = "",
    pull_placement: Annotated[
        str,
        option(
            "--pull-placement",
            "COORDINATOR_PULL_PLACEMENT",
            "all|NUMBER|label:NAME|agents:NAME,...",
            "Which agents get a model that is pulled or created.",
        ),
    ] = "all",
    pull_patience: Annotated[
        str,
        option(
            "--pull-patience",
            "COORDINATOR_PULL_PATIENCE",
            "SECONDS",
            "How long a pull waits for a lost agent when all others are done; it goes on later.",
        ),
    ] = "15",
    max_spool: Annotated[
        str,
        option(
            "--max-spool",
            "COORDINATOR_MAX_SPOOL_GIB",
            "GIBIBYTES",
            "How much disk uploaded model files may take until their model is created.",
        ),
    ] = "64",
    http: Annotated[
        str,
        option(
            "--http",
            "COORDINATOR_HTTP",
            "|".join(HTTP_CHOICES),
            "Which HTTP/1 serves clients: the fastest that works here, or Hypercorn's own.",
        ),
    ] = "auto",
    loop: Annotated[
        str,
        option(
            "--loop",
            "COORDINATOR_LOOP",
            "|".join(LOOPS),
            "Which event loop runs it: uvloop where it is installed, or asyncio's.",
        ),
    ] = "auto",
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
        history_rows=whole_number("COORDINATOR_HISTORY_ROWS", history_rows),
        history_days=number("COORDINATOR_HISTORY_DAYS", history_days),
        larger_context=truth("COORDINATOR_LARGER_CONTEXT", larger_context),
        origins=tuple(origin.strip() for origin in origins.split(",") if origin.strip()),
        pull_placement=placement(pull_placement),
        pull_patience=number("COORDINATOR_PULL_PATIENCE", pull_patience),
        max_spool_gibibytes=number("COORDINATOR_MAX_SPOOL_GIB", max_spool),
        http=one_of("COORDINATOR_HTTP", http, HTTP_CHOICES),
    )
    return Settings(
        config,
        one_of("COORDINATOR_LOG_LEVEL", log_level, LOG_LEVELS),
        loop_of(one_of("COORDINATOR_LOOP", loop, LOOPS)),
    )
