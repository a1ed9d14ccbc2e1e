"""The settings in force: read at the start, changed by the operator, kept over restarts.

Which settings there are, and what their values may be, is in the table of
`ollama_coordinator_common.settings`. What the environment or the command line gives stays as it is
given there.
"""

import logging
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import msgspec
from msgspec import structs

from ollama_coordinator_common.error import ConfigError, OllamaCoordinatorError
from ollama_coordinator_common.network import is_address
from ollama_coordinator_common.settings import CoordinatorConfig, Setting

from .access import limits_of_names, networks, token_in
from .aio import loop_of
from .db import Store, database_of
from .operations import Placement, WrongPlacement
from .tls import files_of
from .wake import place_of

log = logging.getLogger(__name__)

DOCUMENT = "settings"
"""Under which name the changed settings are in the database: a JSON object of names and values."""

TABLE = {setting.name: setting for setting in CoordinatorConfig.settings()}


class UnknownSetting(OllamaCoordinatorError):
    """There is no setting of this name."""


class NotEditable(OllamaCoordinatorError):
    """A setting that cannot be changed while the coordinator runs; says where it can."""


def read(texts: Mapping[str, str]) -> CoordinatorConfig:
    """The configuration of the environment and the command line.

    Raises:
        ConfigError: one of the values cannot work.
    """
    config = CoordinatorConfig.read(texts)
    for name, check in CHECKS.items():
        check(getattr(config, name))
    return config


def _check_url(name: str, example: str, url: str) -> None:
    parts = urlsplit(url)
    if url and (parts.scheme not in ("http", "https") or not parts.hostname):
        shown = "a text that is no URL" if TABLE[name].secret else url
        raise ConfigError(TABLE[name].variable, shown, f"give a URL such as {example}")


_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^\s/]+|[^\s/]*\*[^\s]*")
"""As browsers send it (RFC 6454, section 6.2), and with `*` for any text as Ollama takes it."""

_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
"""A header's name (RFC 9110, section 5.6.2)."""


def _check_each(name: str, is_right: Callable[[str], object], expected: str) -> Callable[..., None]:
    """A check of a list: the first text that is not right is refused."""

    def check(texts: tuple[str, ...]) -> None:
        wrong = next((text for text in texts if not is_right(text)), None)
        if wrong is not None:
            raise ConfigError(TABLE[name].variable, wrong, expected)

    return check


def _check_placement(text: str) -> None:
    try:
        Placement.parse(text)
    except WrongPlacement as exc:
        raise ConfigError(TABLE["pull_placement"].variable, text, str(exc)) from exc


def _is_place(text: str) -> bool:
    try:
        place_of(text)
    except ValueError:
        return False
    return True


CHECKS: Mapping[str, Callable[[Any], object]] = {
    "database_url": database_of,
    "pull_placement": _check_placement,
    "limits": limits_of_names,
    "webhook": partial(_check_url, "webhook", "https://example.org/hook"),
    "advertise": partial(_check_url, "advertise", "http://10.0.0.5:8080"),
    "otlp_endpoint": partial(_check_url, "otlp_endpoint", "http://localhost:4318"),
    "loop": loop_of,
    "origins": _check_each(
        "origins",
        _ORIGIN.fullmatch,
        "give origins such as https://chat.example.org, without a path and split by commas; "
        "* is any text",
    ),
    "hosts": _check_each(
        "hosts", is_address, "give names such as coordinator.example.org, split by commas"
    ),
    "user_header": _check_each(
        "user_header", _HEADER.fullmatch, "give names of headers such as X-User, split by commas"
    ),
    "tls": files_of,
    "wake_to": _check_each(
        "wake_to", _is_place, "give IP addresses such as 192.168.1.255 or 192.168.1.255:9"
    ),
    "join_token": lambda text: token_in(text) if text else None,
    "trusted_proxies": partial(networks, "COORDINATOR_TRUSTED_PROXIES"),
    "trusted_networks": partial(networks, "COORDINATOR_TRUSTED_NETWORKS"),
}
"""What the table cannot know of a value; each raises a `ConfigError`."""


def _taken(setting: Setting, value: object) -> Any:
    """The value of a setting that JSON gives, checked as one of the environment is.

    Raises:
        ConfigError: it cannot work.
    """
    taken = setting.take(value)
    check = CHECKS.get(setting.name)
    if check is not None:
        check(taken)
    return taken


class Settings:
    """The settings in force: `config` is what everything reads."""

    def __init__(self, config: CoordinatorConfig, store: Store) -> None:
        self._store = store
        self._kept = _kept(config, store)
        self.config = structs.replace(config, **self._kept)

    def is_editable(self, setting: Setting) -> bool:
        """Whether `change` can change it."""
        return setting.live and setting.name not in self.config.given

    def source(self, setting: Setting) -> str:
        """Where its value comes from: `default`, `environment` (or an option) or `dashboard`."""
        if setting.name in self.config.given:
            return "environment"
        return "dashboard" if setting.name in self._kept else "default"

    def change(self, wanted: Mapping[str, object]) -> None:
        """Change settings in force, all or none; `None` goes back to the default. See `keep`.

        Raises:
            UnknownSetting: there is none of a name.
            NotEditable: one of them is given elsewhere, or read at the start only.
            ConfigError: one of them cannot work.
        """
        unknown = ", ".join(repr(name) for name in wanted if name not in TABLE)
        if unknown:
            known = ", ".join(setting.name for setting in TABLE.values() if setting.live)
            raise UnknownSetting(f"there is no setting {unknown}; there are {known}")
        settings = {name: self._editable(name) for name in wanted}
        given = {name: value for name, value in wanted.items() if value is not None}
        changed = {name: _taken(settings[name], value) for name, value in given.items()}
        defaults = {name: setting.default for name, setting in settings.items()}
        config = structs.replace(self.config, **defaults | changed)
        kept = {name: value for name, value in self._kept.items() if name not in wanted} | changed
        self.config, self._kept = config, kept

    def keep(self) -> None:
        """Write the changed settings behind, for the next start; once they are known to work."""
        self._store.note_document(DOCUMENT, msgspec.json.encode(self._kept))

    def _editable(self, name: str) -> Setting:
        setting = TABLE[name]
        if not self.is_editable(setting):
            text = f"'{name}' is set by {setting.variable} or its option; change it there"
            raise NotEditable(text)
        return setting


def _kept(config: CoordinatorConfig, store: Store) -> dict[str, Any]:
    """The values in the database that can be used; the log names those that cannot."""
    body = store.look(DOCUMENT)
    try:
        stored = msgspec.json.decode(body, type=dict[str, Any]) if body else {}
    except msgspec.DecodeError as exc:
        log.warning("the kept settings are unreadable; left out", extra={"reason": str(exc)})
        return {}
    usable = {}
    for name, value in stored.items():
        setting = TABLE.get(name)
        if name in config.given:
            continue
        try:
            if setting is None or not setting.live:
                raise NotEditable(f"'{name}' is no setting that is kept")
            usable[name] = _taken(setting, value)
        except (ConfigError, NotEditable) as exc:
            log.warning("a kept setting is left out", extra={"setting": name, "reason": str(exc)})
    return usable
