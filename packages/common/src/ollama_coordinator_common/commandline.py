"""What both command lines share: options made of the table of settings, log lines with facts.

Typer and Rich are the programs' dependencies, not this package's.
"""

import inspect
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import Enum
from functools import wraps
from typing import Annotated, Any, Protocol, TypeVar

import msgspec

from .error import ConfigError, OllamaCoordinatorError
from .printable import all_printable, printable
from .settings import Setting

Settings = TypeVar("Settings")

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def with_settings(
    read: Callable[[Mapping[str, str]], Settings],
    table: Sequence[Setting],
    make: Callable[..., Any],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of a table; its `settings` are what `read` makes of their texts.

    They are `None` where a command of its own follows, whose options count. The command's own
    parameters come first and are passed on. A `ConfigError` ends the program with its sentence and
    exit code 2. `make` is Typer's `Option`.
    """
    parameters = [_parameter(setting, make) for setting in table]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command).parameters.values() if p.name != "settings"]

        @wraps(command)
        def configured(**values: Any) -> None:
            mine = {parameter.name: values.pop(parameter.name) for parameter in own}
            follows = getattr(mine.get("context"), "invoked_subcommand", None) is not None
            try:
                settings = None if follows else read(values)
            except ConfigError as exc:
                last_words(str(exc), values.get("log_format", ""))
                raise SystemExit(2) from exc
            command(settings=settings, **mine)

        # Typer reads a command's options from its signature.
        signature = inspect.Signature([*own, *parameters])
        configured.__signature__ = signature  # type: ignore[attr-defined]
        configured.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        return configured

    return decorate


def _parameter(setting: Setting, make: Callable[..., Any]) -> inspect.Parameter:
    """The parameter of a command for one setting; its value is text, as the environment's is."""
    made = make(
        setting.flag,
        envvar=setting.variable,
        metavar=setting.placeholder,
        help=f"{setting.text}.",
        show_default=True,
        show_envvar=True,
    )
    return inspect.Parameter(
        setting.name,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=setting.default_text,
        annotation=Annotated[str, made],
    )


class _Context(Protocol):
    """The part of Typer's context that knows where a value came from."""

    def get_parameter_source(self, name: str) -> Enum | None: ...


def is_typed(context: _Context, name: str) -> bool:
    """Whether the command line gives an option, and not the environment."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def is_given(context: _Context, name: str) -> bool:
    """Whether the command line or the environment gives an option."""
    source = context.get_parameter_source(name)
    return source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")


class EventFormatter(logging.Formatter):
    """Appends what a call passed in `extra` as key=value; everything on one printable line."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        facts = [
            f"{key}={value}"
            for key, value in vars(record).items()
            if key not in _STANDARD and value is not None
        ]
        return printable(" ".join([super().formatMessage(record), *facts]))

    def formatException(self, ei: Any) -> str:  # noqa: N802 (logging's name)
        return str(all_printable(super().formatException(ei)))


def log_to(handler: logging.Handler, level: str, form: str) -> None:
    """Send the log to one handler in one form; of libraries, warnings and errors only."""
    handler.setFormatter(EventFormatter(form))
    handler.setLevel(level)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in ("aiohttp", "asyncio", "hypercorn"):
        logging.getLogger(name).setLevel(logging.WARNING)


JSON = "json"
"""Of `LOG_FORMATS`."""


class JsonFormatter(EventFormatter):
    """A record as one JSON object on one line: what a call passed in `extra` are its fields."""

    def format(self, record: logging.LogRecord) -> str:
        """`time` (RFC 3339, UTC), `level`, `logger`, `message`; a traceback is in `exception`."""
        shown: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        for key, value in vars(record).items():
            if key not in _STANDARD and value is not None:
                shown[key if key not in shown else f"{key}_"] = value
        if record.exc_info:
            shown["exception"] = super().formatException(record.exc_info)
        if record.stack_info:
            shown["stack"] = record.stack_info
        return msgspec.json.encode(all_printable(shown), enc_hook=str).decode()


def log_json(level: str) -> None:
    """Send the log to stderr as JSON: also warnings, and what ends the program or a thread."""
    handler = logging.StreamHandler()
    log_to(handler, level, PLAIN)
    handler.setFormatter(JsonFormatter())
    logging.captureWarnings(True)
    crash = logging.getLogger("crash")

    def crashed(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        crash.critical("%s", kind.__name__, exc_info=(kind, error, trace))

    def thread_crashed(about: threading.ExceptHookArgs) -> None:
        if about.exc_value is not None:
            crashed(about.exc_type, about.exc_value, about.exc_traceback)

    sys.excepthook, threading.excepthook = crashed, thread_crashed


def last_words(text: str, form: str) -> None:
    """Write why a program ends to stderr, as `form` (one of `LOG_FORMATS`) has its lines."""
    line = f"Error: {text}"
    if form == JSON:
        names = {"name": "exit", "levelname": "CRITICAL", "msg": text}
        line = JsonFormatter().format(logging.makeLogRecord(names))
    print(line, file=sys.stderr)  # noqa: T201 (a program's last words)


@contextmanager
def ending(form: str = "") -> Iterator[None]:
    """End the program with a sentence and exit code 1 where an error of ours leaves the block."""
    try:
        yield
    except OllamaCoordinatorError as exc:
        last_words(str(exc), form)
        raise SystemExit(1) from exc


PLAIN = "%(asctime)s %(levelname)-7s %(message)s"
"""The form of a log line in a file or a service manager's journal."""
