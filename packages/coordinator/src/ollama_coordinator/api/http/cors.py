"""Web pages and the coordinator: which origins may use it, decided as Ollama does (and gin's CORS).

An origin that may not gets 403 with no body, whatever it asks for. A page that the coordinator
itself serves is not a foreign origin.
"""

import logging
import time
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import send_whole
from .headers import first

log = logging.getLogger(__name__)

Headers = list[tuple[bytes, bytes]]

LOCAL_NAMES = ("localhost", "127.0.0.1", "0.0.0.0")
APP_SCHEMES = ("app", "file", "tauri", "vscode-webview", "vscode-file")

_STAINLESS = (
    *("lang", "package-version", "os", "arch", "retry-count", "runtime", "runtime-version"),
    *("async", "helper-method", "poll-helper", "custom-poll-interval", "timeout"),
)
ALLOWED_HEADERS = (
    *("Authorization", "Content-Type", "User-Agent", "Accept", "X-Requested-With", "OpenAI-Beta"),
    *(f"x-stainless-{name}" for name in _STAINLESS),
)
ALLOWED_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")
MAX_AGE_SECONDS = 12 * 3600
"""How long a browser may remember a preflight: as gin's CORS, which Ollama uses, has it."""

LOG_SECONDS = 60.0
"""Between two lines on refused origins."""

_PREFLIGHT: Headers = [
    (b"access-control-allow-methods", ",".join(ALLOWED_METHODS).encode()),
    (b"access-control-allow-headers", ",".join(ALLOWED_HEADERS).encode()),
    (b"access-control-max-age", str(MAX_AGE_SECONDS).encode()),
]


class Origins:
    """The origins that may; `extra` is the operator's, with `*` for any text."""

    def __init__(self, extra: Iterable[str]) -> None:
        self._exact = frozenset(extra)
        self._patterns = [origin.split("*") for origin in self._exact if "*" in origin]
        self.all = "*" in self._exact

    def allow(self, origin: str) -> bool:
        """Whether a page of this origin may use the coordinator."""
        if self.all or origin in self._exact or _is_local(origin):
            return True
        return any(_matches(origin, parts) for parts in self._patterns)


def _is_local(origin: str) -> bool:
    scheme, separator, _ = origin.partition("://")
    if not separator:
        return False
    if scheme in APP_SCHEMES:
        return True
    try:
        return scheme in ("http", "https") and urlsplit(origin).hostname in LOCAL_NAMES
    except ValueError:
        return False  # such as a bracket that is never closed


def _matches(origin: str, parts: list[str]) -> bool:
    """Whether the fixed parts of a pattern follow each other in the origin, from end to end."""
    start, *middle, end = parts
    if not origin.startswith(start) or not origin.endswith(end):
        return False
    at, limit = len(start), len(origin) - len(end)
    for part in middle:
        found = origin.find(part, at, limit)
        if found < 0:
            return False
        at = found + len(part)
    return at <= limit


class Cors:
    """ASGI middleware that touches nothing but headers, and only where a browser asks."""

    def __init__(self, app: ASGIApp, origins: Iterable[str]) -> None:
        self._app = app
        self._origins = Origins(origins)
        self._refused = 0
        self._log_again = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        origin = first(scope["headers"], b"origin") if scope["type"] == "http" else None
        if not origin or _is_own(origin, first(scope["headers"], b"host") or ""):
            await self._app(scope, receive, send)
        elif not self._origins.allow(origin):
            self._log(origin)
            await send_whole(send, 403, [], b"")
        elif scope["method"] == "OPTIONS":
            await _send_nothing(send, [*self._headers(origin), *_PREFLIGHT])
        else:
            await self._app(scope, receive, _adding(self._headers(origin), send))

    def _log(self, origin: str) -> None:
        """One line a minute at most: a page may try again each second."""
        self._refused += 1
        now = time.monotonic()
        if now >= self._log_again:
            log.warning(
                "a web page may not use the coordinator; to allow it, add its origin to"
                " COORDINATOR_ORIGINS",
                extra={"origin": repr(origin), "refused": self._refused},
            )
            self._log_again, self._refused = now + LOG_SECONDS, 0

    def _headers(self, origin: str) -> Headers:
        if self._origins.all:
            return [(b"access-control-allow-origin", b"*")]
        return [
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (b"vary", b"Origin"),
        ]


def _is_own(origin: str, host: str) -> bool:
    return origin in (f"http://{host}", f"https://{host}")


async def _send_nothing(send: Send, headers: Headers) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _adding(headers: Headers, send: Send) -> Send:
    async def adding(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *headers]}
        await send(message)

    return adding
