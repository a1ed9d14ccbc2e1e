"""`/api/settings`: what the coordinator works with, where it comes from, and changing it."""

import logging
from typing import Any

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from ollama_coordinator.api.http.errors import HttpError, decode, reply
from ollama_coordinator.api.http.openapi import operation
from ollama_coordinator.tuning import SettingView, Tuning
from ollama_coordinator_common.error import ConfigError

log = logging.getLogger(__name__)

_patch = msgspec.json.Decoder(dict[str, Any])


class SettingsView(Struct, frozen=True):
    """`GET /api/settings`."""

    settings: list[SettingView]


class SettingsApi:
    """The handlers of the settings."""

    def __init__(self, tuning: Tuning) -> None:
        self._tuning = tuning

    @operation("The settings, and where each comes from", gives={200: SettingsView})
    async def list(self, request: Request) -> Response:
        """`GET /api/settings`."""
        return reply(SettingsView(self._tuning.views()))

    @operation(
        "Change settings, all or none; null goes back to the default",
        takes=dict[str, Any],
        gives={200: SettingsView},
        errors=(409,),
    )
    async def change(self, request: Request) -> Response:
        """`PATCH /api/settings`: names and new values; a null goes back to the default."""
        wanted = await decode(_patch, request)
        try:
            self._tuning.change(wanted)
        except ConfigError as exc:
            raise HttpError(400, str(exc)) from exc
        log.info("settings changed", extra=wanted)
        return await self.list(request)
