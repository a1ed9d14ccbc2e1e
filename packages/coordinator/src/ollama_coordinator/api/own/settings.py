"""`/api/settings`: the settings in force, where each comes from, and changes of them."""

import logging
from pathlib import Path
from typing import Any

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from ollama_coordinator.api.http.errors import HttpError, decode, reply
from ollama_coordinator.api.http.openapi import operation
from ollama_coordinator.api.http.routing import tell
from ollama_coordinator.db import without_password
from ollama_coordinator.parts import Parts
from ollama_coordinator.settings import TABLE
from ollama_coordinator_common.error import ConfigError
from ollama_coordinator_common.settings import Setting

log = logging.getLogger(__name__)

SET = "(set)"
"""In place of the value of a secret."""


class SettingView(Struct, frozen=True):
    """One row of `GET /api/settings`.

    `source` is default, environment (or the command line) or dashboard. `live`: a change counts at
    once. A number is from `minimum` to `maximum`; they are null for all others. The value of a
    secret is `(set)` or empty.
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
    minimum: float | None
    maximum: float | None


class SettingsView(Struct, frozen=True):
    """`GET /api/settings`."""

    settings: list[SettingView]


def _shown(name: str, value: object) -> object:
    """A setting's value as everybody may see it."""
    if name == "database_url":
        return without_password(str(value))
    if isinstance(value, Path):
        return str(value)
    return SET if TABLE[name].secret and value else value


class SettingsApi:
    """The handlers of the settings."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._settings = parts.settings

    @operation(gives={200: SettingsView})
    async def list(self, request: Request) -> Response:
        """The settings, and where each comes from."""
        return reply(SettingsView([self._view(setting) for setting in TABLE.values()]))

    @operation(takes=dict[str, Any], gives={200: SettingsView}, errors=(409,))
    async def change(self, request: Request) -> Response:
        """Change settings, all or none; null goes back to the default."""
        wanted = await decode(dict[str, Any], request)
        try:
            self._settings.change(wanted)
        except ConfigError as exc:
            raise HttpError(400, str(exc)) from exc
        self._parts.apply_settings()
        self._settings.keep()
        shown = {name: _shown(name, wanted[name]) for name in wanted}
        tell(request.scope, ", ".join(wanted), **shown)
        log.info("settings changed", extra=shown)
        await self._parts.store.commit()
        return await self.list(request)

    def _view(self, setting: Setting) -> SettingView:
        least, most = setting.bounds or (None, None)
        return SettingView(
            name=setting.name,
            value=_shown(setting.name, getattr(self._settings.config, setting.name)),
            default=setting.default,
            source=self._settings.source(setting),
            editable=self._settings.is_editable(setting),
            live=setting.live,
            variable=setting.variable,
            text=setting.text,
            unit=setting.unit,
            choices=setting.choices,
            minimum=0 if setting.zero else least,
            maximum=most,
        )
