"""What both command lines do alike: options read in one place, log lines with facts.

The programs bring Typer and Rich themselves.
"""

import inspect
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from functools import wraps
from typing import Annotated, Any, Protocol, TypeVar

from msgspec import Struct

from .error import ConfigError

Settings = TypeVar("Settings")

TRUE = frozenset({"true", "yes", "on", "1"})
FALSE = frozenset({"false", "no", "off", "0"})
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class Option(Struct, frozen=True):
    """A setting: its environment variable, its name as an option, and what a person reads of it.

    `default` and every given value are text; what it means is read in one place of each program.
    """

    variable: str
    name: str
    default: str
    metavar: str
    help: str

    def parameter(self, make: Callable[..., Any]) -> inspect.Parameter:
        """The parameter of a command; `make` is Typer's `Option`."""
        flag = f"--{self.name.replace('_', '-')}"
        made = make(
            flag,
            envvar=self.variable,
            metavar=self.metavar,
            help=self.help,
            show_default=True,
            show_envvar=True,
        )
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        annotation = Annotated[str, made]
        return inspect.Parameter(self.name, kind, default=self.default, annotation=annotation)


def with_settings(
    read: Callable[..., Settings], options: Sequence[Option], make: Callable[..., Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command options; it is called with the `settings` that `read` makes of their texts.

    The command's own parameters come first and are passed on. A `ConfigError` ends the program
    with its sentence and exit code 2. `make` is Typer's `Option`.
    """
    parameters = [option.parameter(make) for option in options]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command).parameters.values() if p.name != "settings"]

        @wraps(command)
        def configured(**values: Any) -> None:
            mine = {parameter.name: values.pop(parameter.name) for parameter in own}
            try:
                settings = read(**values)
            except ConfigError as exc:
                print(f"Error: {exc}", file=sys.stderr)  # noqa: T201 (a program's last words)
                raise SystemExit(2) from exc
            command(settings=settings, **mine)

        # Typer reads a command's options from its signature.
        signature = inspect.Signature([*own, *parameters])
        configured.__signature__ = signature  # type: ignore[attr-defined]
        configured.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        return configured

    return decorate


def texts(options: Sequence[Option], given: Mapping[str, str]) -> dict[str, str]:
    """The text of every option: what is given, else its default."""
    return {option.name: option.default for option in options} | dict(given)


class _Context(Protocol):
    """The part of Typer's context that tells where a value came from."""

    def get_parameter_source(self, name: str) -> Enum | None: ...


def is_typed(context: _Context, name: str) -> bool:
    """Whether an option stands on the command line, and not in the environment."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def is_given(context: _Context, name: str) -> bool:
    """Whether an option stands on the command line or in the environment."""
    source = context.get_parameter_source(name)
    return source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")


def whole_number(variable: str, text: str) -> int:
    """A setting as a whole number.

    Raises:
        ConfigError: it is none.
    """
    try:
        return int(text)
    except ValueError:
        raise ConfigError(variable, text, "give a whole number") from None


def number(variable: str, text: str) -> float:
    """A setting as a number.

    Raises:
        ConfigError: it is none.
    """
    try:
        return float(text)
    except ValueError:
        raise ConfigError(variable, text, "give a number") from None


def truth(variable: str, text: str) -> bool:
    """A setting as true or false.

    Raises:
        ConfigError: it is neither.
    """
    word = text.strip().lower()
    if word not in TRUE | FALSE:
        raise ConfigError(variable, text, "give true or false")
    return word in TRUE


def one_of(variable: str, text: str, choices: tuple[str, ...]) -> str:
    """A setting as one of some words, which are compared without case.

    Raises:
        ConfigError: it is none of them.
    """
    for choice in choices:
        if text.strip().lower() == choice.lower():
            return choice
    raise ConfigError(variable, text, f"give one of {', '.join(choices)}")


class EventFormatter(logging.Formatter):
    """Appends what a call passed in `extra` as key=value."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        facts = [
            f"{key}={value}"
            for key, value in vars(record).items()
            if key not in _STANDARD and value is not None
        ]
        return " ".join([super().formatMessage(record), *facts])


def log_to(handler: logging.Handler, level: str, form: str) -> None:
    """Send the log to one handler in one form; libraries speak up from warnings on."""
    handler.setFormatter(EventFormatter(form))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in ("aiohttp", "asyncio", "hypercorn"):
        logging.getLogger(name).setLevel(logging.WARNING)


PLAIN = "%(asctime)s %(levelname)-7s %(message)s"
"""The form of a log line in a file or a service manager's journal."""
