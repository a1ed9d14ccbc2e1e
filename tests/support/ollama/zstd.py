"""Request bodies compressed with zstd, where a library for it is installed."""

from __future__ import annotations

import importlib
from typing import Any

from .wire import ApiError

MAX_BYTES = 20 * 2**20


class ZstdError(ApiError):
    """Refused in the native shape, whatever the route: it happens before the route is reached."""


def _library() -> Any | None:
    try:
        return importlib.import_module("zstandard")
    except ImportError:
        return None


AVAILABLE = _library() is not None


def decompress(body: bytes) -> bytes:
    library = _library()
    if library is None:
        raise ZstdError(400, "this stand-in has no zstd library")
    try:
        reader = library.ZstdDecompressor(max_window_size=8 * 2**20).stream_reader(body)
        plain: bytes = reader.read(MAX_BYTES + 1)
    except library.ZstdError as exc:
        raise ZstdError(400, f"zstd: {exc}") from None
    if len(plain) > MAX_BYTES:
        raise ZstdError(413, "request body too large")
    return plain
