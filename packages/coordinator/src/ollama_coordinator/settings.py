"""The command line's options, each with its environment variable, and what they mean.

Options are taken as text and read here, so that a wrong value is answered in one way: which
variable, which value, what would be right.
"""

from asyncio import AbstractEventLoop
from collections.abc import Callable

from msgspec import Struct

from ollama_coordinator_common.commandline import (
    LOG_LEVELS,
    Option,
    number,
    one_of,
    texts,
    truth,
    whole_number,
)
from ollama_coordinator_common.config import CoordinatorConfig
from ollama_coordinator_common.error import ConfigError

from .aio import LOOPS, loop_of
from .http1 import CHOICES as HTTP_CHOICES
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


OPTIONS = (
    Option(
        "COORDINATOR_HOST",
        "host",
        "0.0.0.0",
        "ADDRESS",
        "Where to listen.",
    ),
    Option(
        "COORDINATOR_PORT",
        "port",
        "8080",
        "PORT",
        "On which port.",
    ),
    Option(
        "DATABASE_URL",
        "database_url",
        "sqlite://coordinator.db",
        "URL",
        "The SQLite file for agents and what was learned; sqlite://FILE is in the working folder.",
    ),
    Option(
        "HEALTH_CHECK_INTERVAL",
        "health_check_interval",
        "30",
        "SECONDS",
        "How often to ask agents that do not report their models by themselves.",
    ),
    Option(
        "AGENT_TIMEOUT",
        "agent_timeout",
        "60",
        "SECONDS",
        "How long an agent may be silent before it counts as offline.",
    ),
    Option(
        "COORDINATOR_POLICY",
        "policy",
        POLICIES[0],
        "|".join(POLICIES),
        "How to choose among the agents.",
    ),
    Option(
        "COORDINATOR_MAX_QUEUE",
        "max_queue",
        "512",
        "REQUESTS",
        "How many requests may wait for a place; one more is answered 503.",
    ),
    Option(
        "COORDINATOR_MAX_BODY_MIB",
        "max_body",
        "64",
        "MEBIBYTES",
        "The largest request body; a longer one is answered 413.",
    ),
    Option(
        "COORDINATOR_DRAIN_TIMEOUT",
        "drain_timeout",
        "300",
        "SECONDS",
        "How long running answers may go on after a request to stop.",
    ),
    Option(
        "COORDINATOR_STALL_TIMEOUT",
        "stall_timeout",
        "300",
        "SECONDS",
        "How long a client may take nothing of its answer; 0 for ever.",
    ),
    Option(
        "COORDINATOR_BODY_TIMEOUT",
        "body_timeout",
        "60",
        "SECONDS",
        "How long nothing may come of a request's body; 0 for ever.",
    ),
    Option(
        "COORDINATOR_HISTORY_ROWS",
        "history_rows",
        "100000",
        "REQUESTS",
        "How many finished requests to remember (never their texts).",
    ),
    Option(
        "COORDINATOR_HISTORY_DAYS",
        "history_days",
        "30",
        "DAYS",
        "How long to remember them.",
    ),
    Option(
        "COORDINATOR_LARGER_CONTEXT",
        "larger_context",
        "true",
        "true|false",
        "Serve a request on a runner with a larger context than it asks for, not by a reload.",
    ),
    Option(
        "COORDINATOR_ORIGINS",
        "origins",
        "",
        "ORIGIN,...",
        "Web pages that may use the coordinator, beside those of this machine; * is any text.",
    ),
    Option(
        "COORDINATOR_PULL_PLACEMENT",
        "pull_placement",
        "all",
        "all|NUMBER|label:NAME|agents:NAME,...",
        "Which agents get a model that is pulled or created.",
    ),
    Option(
        "COORDINATOR_PULL_PATIENCE",
        "pull_patience",
        "15",
        "SECONDS",
        "How long a pull waits for a lost agent when all others are done; it goes on later.",
    ),
    Option(
        "COORDINATOR_MAX_SPOOL_GIB",
        "max_spool",
        "64",
        "GIBIBYTES",
        "How much disk uploaded model files may take until their model is created.",
    ),
    Option(
        "COORDINATOR_HTTP",
        "http",
        "auto",
        "|".join(HTTP_CHOICES),
        "Which HTTP/1 serves clients: the fastest that works here, or Hypercorn's own.",
    ),
    Option(
        "COORDINATOR_LOOP",
        "loop",
        "auto",
        "|".join(LOOPS),
        "Which event loop runs it: uvloop where it is installed, or asyncio's.",
    ),
    Option(
        "COORDINATOR_LOG_LEVEL",
        "log_level",
        "INFO",
        "|".join(LOG_LEVELS),
        "How much to log.",
    ),
)


def read(**given: str) -> Settings:
    """The settings as the operator gave them.

    Raises:
        ConfigError: one of them cannot work.
    """
    text = texts(OPTIONS, given)
    config = CoordinatorConfig(
        host=text["host"].strip(),
        port=whole_number("COORDINATOR_PORT", text["port"]),
        database_url=text["database_url"],
        health_check_interval=number("HEALTH_CHECK_INTERVAL", text["health_check_interval"]),
        agent_timeout=number("AGENT_TIMEOUT", text["agent_timeout"]),
        policy=one_of("COORDINATOR_POLICY", text["policy"], POLICIES),
        max_queue=whole_number("COORDINATOR_MAX_QUEUE", text["max_queue"]),
        max_body_mebibytes=whole_number("COORDINATOR_MAX_BODY_MIB", text["max_body"]),
        drain_timeout=number("COORDINATOR_DRAIN_TIMEOUT", text["drain_timeout"]),
        stall_timeout=number("COORDINATOR_STALL_TIMEOUT", text["stall_timeout"]),
        body_timeout=number("COORDINATOR_BODY_TIMEOUT", text["body_timeout"]),
        history_rows=whole_number("COORDINATOR_HISTORY_ROWS", text["history_rows"]),
        history_days=number("COORDINATOR_HISTORY_DAYS", text["history_days"]),
        larger_context=truth("COORDINATOR_LARGER_CONTEXT", text["larger_context"]),
        origins=tuple(origin.strip() for origin in text["origins"].split(",") if origin.strip()),
        pull_placement=placement(text["pull_placement"]),
        pull_patience=number("COORDINATOR_PULL_PATIENCE", text["pull_patience"]),
        max_spool_gibibytes=number("COORDINATOR_MAX_SPOOL_GIB", text["max_spool"]),
        http=one_of("COORDINATOR_HTTP", text["http"], HTTP_CHOICES),
    )
    return Settings(
        config,
        one_of("COORDINATOR_LOG_LEVEL", text["log_level"], LOG_LEVELS),
        loop_of(one_of("COORDINATOR_LOOP", text["loop"], LOOPS)),
    )
