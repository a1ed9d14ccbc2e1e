"""Errors in the three dialects, durations and times as Ollama prints them."""

from __future__ import annotations

import math
import re
import time
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

Dialect = Literal["native", "openai", "anthropic"]

BUSY = "server busy, please try again.  maximum pending requests exceeded"
RUNNER_DIED = "model runner has unexpectedly stopped, this may be due to resource limitations"
OUT_OF_MEMORY = "llama-server process has terminated: cudaMalloc failed: out of memory"

FOREVER_SECONDS = float(2**63 // 10**9)  # what a negative keep_alive comes to: 292 years

encode = msgspec.json.encode

_OPENAI_TYPES = {400: "invalid_request_error", 404: "not_found_error"}
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}
_GO_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_GO_PART = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|ms|s|m|h)")


class ApiError(Exception):
    """An answer that is a refusal: one status and one text, whatever the dialect.

    `native`: in the native shape also where the route speaks another. `early`: told by what reads
    the body on `/v1`, before the handler that all dialects share. `begun`: told by a handler that
    had already chosen the content type. The two differ from the rest by their content types.
    """

    def __init__(
        self,
        status: int,
        text: str,
        *,
        native: bool = False,
        early: bool = False,
        begun: bool = False,
        **extra: Any,
    ) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.native = native
        self.early = early
        self.begun = begun
        self.extra = extra


class StreamError(Exception):
    """What Ollama says when it fails while it generates; before the first byte with this status."""

    def __init__(self, text: str, status: int = 500) -> None:
        super().__init__(text)
        self.status = status


def dialect_of(path: str) -> Dialect:
    if path == "/v1/messages":
        return "anthropic"
    return "openai" if path.startswith("/v1/") else "native"


def error_body(dialect: Dialect, status: int, text: str, **extra: Any) -> dict[str, Any]:
    if dialect == "anthropic":
        kind = _ANTHROPIC_TYPES.get(status, "api_error")
        error = {"type": kind, "message": text}
        return {"type": "error", "error": error, "request_id": "req_0123456789abcdef"}
    if dialect == "openai":
        kind = _OPENAI_TYPES.get(status, "api_error")
        return {"error": {"message": text, "type": kind, "param": None, "code": None}}
    return {"error": text, **extra}


def keep_alive_seconds(value: Any) -> float | None:
    """Seconds of a `keep_alive` as sent: number, Go duration, or nothing at all."""
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return FOREVER_SECONDS if value < 0 else float(value)
    if isinstance(value, str):
        return _go_duration(value)
    kind = "[]interface {}" if isinstance(value, list) else "map[string]interface {}"
    raise ApiError(400, f"Unsupported type: '{kind}'")


def _go_duration(text: str) -> float:
    sign, digits = (-1, text[1:]) if text.startswith("-") else (1, text.removeprefix("+"))
    if digits == "0":
        return 0.0
    parts = _GO_PART.findall(digits)
    if not parts or "".join(a + b for a, b in parts) != digits:
        missing = "missing unit in" if re.fullmatch(r"[\d.]+", digits) else "invalid"
        if unit := re.fullmatch(r"[\d.]+([^\d.]+).*", digits):
            missing = f'unknown unit "{unit[1]}" in'
        raise ApiError(400, f'time: {missing} duration "{text}"')
    seconds = sum(float(number) * _GO_UNITS[unit] for number, unit in parts)
    return FOREVER_SECONDS if sign < 0 and seconds else seconds


def local_time(epoch: float) -> str:
    """RFC 3339 with nanoseconds and this machine's offset."""
    whole = math.floor(epoch)
    nanoseconds = int((epoch - whole) * 1e9)
    # Python's calendar ends in 9999, Go's does not; 292 years from now fits both.
    moment = datetime.fromtimestamp(whole, tz=UTC).astimezone()
    offset = moment.strftime("%z")
    zone = "Z" if offset == "+0000" else f"{offset[:3]}:{offset[3:]}"
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{nanoseconds:09d}{zone}"


class Stamp:
    """`created_at` for one stream: the second is formatted once, not per token."""

    def __init__(self) -> None:
        self._second = -1
        self._prefix = b""

    def __call__(self) -> bytes:
        second, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
        if second != self._second:
            self._second = second
            self._prefix = time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime(second)).encode()
        return self._prefix + b"%09dZ" % nanoseconds
