"""Serving with Hypercorn, and with our HTTP/1 where that can be."""

import logging
from collections.abc import Awaitable, Callable

import hypercorn.asyncio
from hypercorn.config import Config
from starlette.types import ASGIApp

log = logging.getLogger(__name__)

CHOICES = ("auto", "hypercorn")
"""Ours where it works, or Hypercorn's in any case."""


async def serve(
    app: ASGIApp, config: Config, asked_to_stop: Callable[[], Awaitable[object]], *, http: str
) -> None:
    """Serve until asked to stop; `http` is one of `CHOICES`."""
    if http == "hypercorn" or not _can_be_plugged():
        await hypercorn.asyncio.serve(app, config, shutdown_trigger=asked_to_stop)  # type: ignore[arg-type]
        return
    from .plug import plugged

    with plugged(app, config) as shared:

        async def asked() -> None:
            try:
                await asked_to_stop()
            finally:
                shared.close()

        await hypercorn.asyncio.serve(app, config, shutdown_trigger=asked)  # type: ignore[arg-type]


def _can_be_plugged() -> bool:
    try:
        from .plug import fits
    except ImportError as exc:
        reason = str(exc)
    else:
        if fits():
            return True
        reason = "this release of Hypercorn has no place for it"
    log.warning("serving with Hypercorn's own HTTP/1, which is slower", extra={"reason": reason})
    return False
