"""Server-sent events with names, as Responses and Messages use them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from support.ollama.wire import encode

STREAM_HEADERS: Mapping[str, str] = {"Cache-Control": "no-cache", "Connection": "keep-alive"}


def event(kind: str, /, **data: Any) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), encode({"type": kind, **data}))
