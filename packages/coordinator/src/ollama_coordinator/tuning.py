"""The settings an operator may change on the page: which, and in what bounds.

What the environment or the command line sets stays as it is set there. The rest counts at once, is
kept as a document in the database, and read before anything is built at the next start.
"""

import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import msgspec
from msgspec import Struct, structs

from ollama_coordinator_common.config import CoordinatorConfig, database_path
from ollama_coordinator_common.error import ConfigError, OllamaCoordinatorError

from .db import Store
from .operations import Placement, WrongPlacement
from .scheduler import POLICIES

DOCUMENT = "settings"


class NotEditable(OllamaCoordinatorError):
    """A setting that this page cannot change; says who can."""


class Setting(Struct, frozen=True):
    """One setting. `field` is its name in the configuration, `option` that of the command line.

    `fixed`: it cannot be changed while running.
    """

    field: str
    option: str
    variable: str
    text: str
    unit: str = ""
    fixed: bool = False
    choices: tuple[str, ...] = ()


SETTINGS = (
    Setting(
        "policy",
        "policy",
        "COORDINATOR_POLICY",
        "How an agent is chosen",
        fixed=True,
        choices=POLICIES,
    ),
    Setting("max_queue", "max_queue", "COORDINATOR_MAX_QUEUE", "Requests that may wait"),
    Setting("agent_timeout", "agent_timeout", "AGENT_TIMEOUT", "Silence until offline", "s"),
    Setting(
        "health_check_interval",
        "health_check_interval",
        "HEALTH_CHECK_INTERVAL",
        "How often bare Ollamas are asked for their models",
        "s",
    ),
    Setting(
        "max_body_mebibytes",
        "max_body",
        "COORDINATOR_MAX_BODY_MIB",
        "Largest request body",
        "MiB",
    ),
    Setting(
        "drain_timeout",
        "drain_timeout",
        "COORDINATOR_DRAIN_TIMEOUT",
        "How long answers may go on after a request to stop",
        "s",
    ),
    Setting(
        "stall_timeout",
        "stall_timeout",
        "COORDINATOR_STALL_TIMEOUT",
        "How long a client may take nothing of its answer",
        "s",
    ),
    Setting(
        "body_timeout",
        "body_timeout",
        "COORDINATOR_BODY_TIMEOUT",
        "How long nothing may come of a request's body",
        "s",
    ),
    Setting(
        "larger_context",
        "larger_context",
        "COORDINATOR_LARGER_CONTEXT",
        "Use a runner with a larger context rather than reload",
    ),
    Setting(
        "pull_placement",
        "pull_placement",
        "COORDINATOR_PULL_PLACEMENT",
        "Which agents get a pulled model",
    ),
    Setting(
        "history_rows",
        "history_rows",
        "COORDINATOR_HISTORY_ROWS",
        "Finished requests to remember",
    ),
    Setting(
        "history_days",
        "history_days",
        "COORDINATOR_HISTORY_DAYS",
        "How long to remember them",
        "days",
    ),
    Setting(
        "pull_patience",
        "pull_patience",
        "COORDINATOR_PULL_PATIENCE",
        "How long a pull waits for agents that are away",
        "s",
    ),
    Setting(
        "max_spool_gibibytes",
        "max_spool",
        "COORDINATOR_MAX_SPOOL_GIB",
        "Disk for uploaded model files",
        "GiB",
    ),
    Setting("http", "http", "COORDINATOR_HTTP", "HTTP implementation", fixed=True),
    Setting("host", "host", "COORDINATOR_HOST", "Listens on", fixed=True),
    Setting("port", "port", "COORDINATOR_PORT", "Port", fixed=True),
    Setting("database_url", "database_url", "DATABASE_URL", "Database", fixed=True),
    Setting("origins", "origins", "COORDINATOR_ORIGINS", "Web pages allowed", fixed=True),
)

_DEFAULTS = CoordinatorConfig(policy=POLICIES[0])


class SettingView(Struct, frozen=True):
    """One row of `GET /api/settings`.

    `source` is default, environment (or the command line) or dashboard; `live`: a change counts at
    once.
    """

    name: str
    value: Any
    default: Any
    source: str
    editable: bool
    live: bool
    variable: str
    text: str
    unit: str
    choices: tuple[str, ...]


class Tuning:
    """The settings in force, and which were set here. `apply` carries a change out."""

    def __init__(self, started: "Started", store: Store) -> None:
        self.config = started.config
        self._stored = dict(started.stored)
        self._store = store
        self.apply: Callable[[CoordinatorConfig], None] = lambda config: None

    def views(self) -> list[SettingView]:
        """Every setting."""
        return [self._view(setting) for setting in SETTINGS]

    def change(self, wanted: Mapping[str, Any]) -> None:
        """Change settings, all or none; a null goes back to the default.

        Raises:
            NotEditable: one of them is unknown, or set elsewhere.
            ConfigError: one of them cannot work.
        """
        known = {setting.field: setting for setting in SETTINGS}
        for name in wanted:
            self._check(known.get(name), name)
        stored = {**self._stored, **wanted}
        stored = {name: value for name, value in stored.items() if value is not None}
        new = with_values(self.config, {**_defaults_of(wanted), **stored})
        self._stored = {name: getattr(new, name) for name in stored}
        self._store.note_document(DOCUMENT, msgspec.json.encode(self._stored))
        self.config = new
        self.apply(new)

    def _check(self, setting: Setting | None, name: str) -> None:
        if setting is None:
            known = ", ".join(setting.field for setting in SETTINGS if not setting.fixed)
            raise NotEditable(f"there is no setting '{name}'; there are {known}")
        if not self._is_editable(setting):
            text = f"'{name}' is set by {setting.variable} or its option; change it there"
            raise NotEditable(text)

    def _is_editable(self, setting: Setting) -> bool:
        return not setting.fixed and setting.option not in self.config.given

    def _view(self, setting: Setting) -> SettingView:
        value, default = getattr(self.config, setting.field), getattr(_DEFAULTS, setting.field)
        editable = self._is_editable(setting)
        source = "environment" if setting.option in self.config.given else "default"
        return SettingView(
            name=setting.field,
            value=value,
            default=default,
            source="dashboard" if editable and setting.field in self._stored else source,
            editable=editable,
            live=not setting.fixed,
            variable=setting.variable,
            text=setting.text,
            unit=setting.unit,
            choices=setting.choices,
        )


class Started(Struct, frozen=True):
    """The configuration a coordinator starts with, and what of it the operator set on the page."""

    config: CoordinatorConfig
    stored: dict[str, Any] = {}


def started(config: CoordinatorConfig) -> Started:
    """The configuration with what is kept in the database, where nothing else sets it.

    A database that cannot be read changes nothing here: opening it will say what is wrong.
    """
    stored = _read(config)
    fixed = {s.field for s in SETTINGS if s.fixed or s.option in config.given}
    known = {s.field for s in SETTINGS} - fixed
    usable = {name: value for name, value in stored.items() if name in known}
    try:
        return Started(with_values(config, usable), usable)
    except ConfigError:
        return Started(config)


def with_values(config: CoordinatorConfig, values: Mapping[str, Any]) -> CoordinatorConfig:
    """The configuration with other values, checked as those of the environment are.

    Raises:
        ConfigError: one of them cannot work.
    """
    for setting in SETTINGS:
        if setting.choices and values.get(setting.field, setting.choices[0]) not in setting.choices:
            expected = f"give one of {', '.join(setting.choices)}"
            raise ConfigError(setting.variable, values[setting.field], expected)
    try:
        Placement.parse(str(values.get("pull_placement", "all")))
        fields = {**structs.asdict(config), **values}
        return msgspec.convert(fields, CoordinatorConfig)
    except WrongPlacement as exc:
        raise ConfigError("pull_placement", values["pull_placement"], str(exc)) from exc
    except msgspec.ValidationError as exc:
        if isinstance(exc.__cause__, ConfigError):
            raise exc.__cause__ from exc
        told = ", ".join(f"{name}={value}" for name, value in values.items())
        raise ConfigError("settings", told, str(exc)) from exc


def _defaults_of(names: Mapping[str, Any]) -> dict[str, Any]:
    return {name: getattr(_DEFAULTS, name) for name in names}


def _read(config: CoordinatorConfig) -> dict[str, Any]:
    path = database_path(config.database_url)
    if path is None or not path.is_file():
        return {}
    try:
        with closing(sqlite3.connect(path, timeout=0.2)) as connection:
            sql = "SELECT body FROM documents WHERE name = ?"
            row = connection.execute(sql, [DOCUMENT]).fetchone()
        return msgspec.json.decode(row[0], type=dict[str, Any]) if row else {}
    except (sqlite3.Error, msgspec.DecodeError):
        return {}
