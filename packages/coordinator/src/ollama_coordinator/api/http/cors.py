"""Web pages and the coordinator: which origins may use it, decided as Ollama does (and gin's CORS).

An origin that may not gets 403 with no body, whatever it asks for. A page that the coordinator
itself serves is not a foreign origin.
"""

import logging
import time
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import send_whole
from .headers import first

log = logging.getLogger(__name__)

Headers = list[tuple[bytes, bytes]]

LOCAL_NAMES = ("localhost", "127.0.0.1", "0.0.0.0")
APP_SCHEMES = ("app", "file", "tauri", "vscode-webview", "vscode-file")

_STAINLESS = (
    *("Arch", "Async", "Custom-Poll-Interval", "Helper-Method", "Lang", "Os", "Package-Version"),
    *("Poll-Helper", "Retry-Count", "Runtime", "Runtime-Version", "Timeout"),
)
ALLOWED_HEADERS = (
    *("Authorization", "Content-Type", "User-Agent", "Accept", "X-Requested-With", "Openai-Beta"),
    *(f"X-Stainless-{name}" for name in _STAINLESS),
)
ALLOWED_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")
MAX_AGE_SECONDS = 12 * 3600
"""How long a browser may remember a preflight: as gin's CORS, which Ollama uses, has it."""

LOG_SECONDS = 60.0
"""Between two lines on refused origins."""

ASKED_BY_PREFLIGHTS = b"Access-Control-Request-Method, Access-Control-Request-Headers"
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
    scheme, separator, rest = origin.partition("://")
    if scheme in ("http", "https"):
        return rest.partition(":")[0] in LOCAL_NAMES
    return bool(separator) and scheme in APP_SCHEMES


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
            answer = [*self._headers(origin, b"Origin, " + ASKED_BY_PREFLIGHTS), *_PREFLIGHT]
            await self._app(scope, receive, _preflight(answer, send))
        else:
            await self._app(scope, receive, _adding(self._headers(origin), send))

    def adding(self, scope: Scope, send: Send) -> Send:
        """`send` for an answer that does not pass here, with the headers that it would get here."""
        origin = first(scope["headers"], b"origin")
        if not origin or not self._origins.allow(origin):
            return send
        return _adding(self._headers(origin), send)

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

    def _headers(self, origin: str, vary: bytes = b"Origin") -> Headers:
        if self._origins.all:
            return [(b"access-control-allow-origin", b"*")]
        return [
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (b"vary", vary),
        ]


def _is_own(origin: str, host: str) -> bool:
    return origin in (f"http://{host}", f"https://{host}")


def _preflight(headers: Headers, send: Send) -> Send:
    """Of the answer to OPTIONS, a 405, only the methods that the path has go on."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            allow = [header for header in message["headers"] if header[0] == b"allow"]
            await send({**message, "status": 204, "headers": [*allow, *headers]})
        elif not message.get("more_body", False):
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    return sending


def _adding(headers: Headers, send: Send) -> Send:
    async def adding(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *headers]}
        await send(message)

    return adding
