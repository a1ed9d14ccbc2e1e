"""Serving with Hypercorn, through our door, and with our HTTP/1 where that can be."""

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import hypercorn.asyncio
from hypercorn.config import Config
from starlette.types import ASGIApp

from .door import Door

if TYPE_CHECKING:
    from .ours import OurHttp

log = logging.getLogger(__name__)


async def serve(
    app: ASGIApp,
    config: Config,
    asked_to_stop: Callable[[], Awaitable[object]],
    *,
    http: str,
    door: Door | None = None,
) -> None:
    """Serve until asked to stop; `http` is the value of `COORDINATOR_HTTP`.

    Where a release of Hypercorn has no place for the door, everybody comes in without it.
    """
    if not _can_be_plugged():
        await hypercorn.asyncio.serve(app, config, shutdown_trigger=asked_to_stop)  # type: ignore[arg-type]
        return
    from .plug import plugged

    door = Door() if door is None else door
    ours = _our_http(app, config) if http == "auto" else None

    async def asked() -> None:
        try:
            await asked_to_stop()
        finally:
            door.close()
            if ours is not None:
                ours.close()

    with plugged(config, door, ours.serve if ours is not None else None):
        async with door.watched():
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
    _tell(reason)
    return False


def _our_http(app: ASGIApp, config: Config) -> "OurHttp | None":
    try:
        from .ours import OurHttp
    except ImportError as exc:
        _tell(str(exc))
        return None
    return OurHttp(app, config)


def _tell(reason: str) -> None:
    log.warning("serving with Hypercorn's own HTTP/1, which is slower", extra={"reason": reason})
