"""Which headers pass between a client and an agent's Ollama, and which end here."""

import re
from collections.abc import Iterable
from urllib.parse import quote

RawHeaders = Iterable[tuple[bytes, bytes]]

HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
"""RFC 9110, section 7.6.1."""

NOT_FOR_OLLAMA = HOP_BY_HOP | {
    # Ollama checks Host and Origin against its own names; credentials are for us, and Ollama would
    # copy them to ollama.com for a cloud model.
    b"host",
    b"origin",
    b"referer",
    b"authorization",
    b"cookie",
    b"x-api-key",
    b"forwarded",
    b"x-forwarded-for",
    b"x-forwarded-host",
    b"x-forwarded-proto",
    b"x-forwarded-prefix",
    b"x-real-ip",
    b"x-ollama-coordinator-via",
    # Computed anew for the next hop.
    b"content-length",
    b"expect",
    b"accept-encoding",
}

RUNNER_HEADER = b"x-ollama-coordinator-runner"
"""Says to a client that a runner with a larger context than it asked for serves it."""

MODEL_HEADER = b"x-ollama-coordinator-model"
"""Says to a client which model served, where it asked for an alias."""

UNBUFFERED = (b"x-accel-buffering", b"no")
"""Says to reverse proxies that an answer is a stream, which is not to be collected."""

NOT_FOR_CLIENTS = HOP_BY_HOP | {
    b"content-length",
    b"date",
    b"server",
    # They speak for the whole site, which is ours, or send a browser or a proxy elsewhere.
    b"set-cookie",
    b"set-cookie2",
    b"clear-site-data",
    b"strict-transport-security",
    b"public-key-pins",
    b"www-authenticate",
    b"authentication-info",
    b"location",
    b"content-location",
    b"refresh",
    b"link",
    b"alt-svc",
    b"nel",
    b"report-to",
    b"reporting-endpoints",
    b"service-worker-allowed",
    b"x-sendfile",
}
KINDS_NOT_FOR_CLIENTS = (
    b"access-control-",  # CORS is answered here
    b"x-accel-",  # orders for nginx
    b"x-ollama-coordinator-",  # ours to say
)
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


def to_ollama(headers: RawHeaders) -> list[tuple[str, str]]:
    """A client's headers as the agent's Ollama may see them."""
    received = [(name.lower(), name, value) for name, value in headers]
    dropped = NOT_FOR_OLLAMA
    if any(lowered == b"connection" for lowered, _, _ in received):
        dropped |= _named_by_connection((lowered, value) for lowered, _, value in received)
    return [
        (name.decode("latin-1"), value.decode() if value.isascii() else as_text(value))
        for lowered, name, value in received
        if lowered not in dropped
    ]


def uncompressed(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The headers that go with a body which is not compressed any more."""
    return [header for header in headers if header[0].lower() != "content-encoding"]


def as_text(value: bytes) -> str:
    """A header's value such that aiohttp, which sends UTF-8, sends the same bytes where it can."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def to_client(headers: RawHeaders) -> list[tuple[bytes, bytes]]:
    """Ollama's headers as the client may see them."""
    received = [(name.lower(), value) for name, value in headers]
    dropped = NOT_FOR_CLIENTS
    if any(name == b"connection" for name, _ in received):
        dropped |= _named_by_connection(received)
    return [
        (name, value)
        for name, value in received
        if name not in dropped
        and not name.startswith(KINDS_NOT_FOR_CLIENTS)
        and _CONTROL.search(value) is None
    ]


def _named_by_connection(headers: RawHeaders) -> frozenset[bytes]:
    return frozenset(
        token.strip().lower()
        for name, value in headers
        if name == b"connection"
        for token in value.split(b",")
    )


def served_by(agent_name: str, request_id: str) -> list[tuple[bytes, bytes]]:
    """The headers that say which agent served a request, and the request's id."""
    return [
        (b"x-ollama-coordinator-agent", quote(agent_name).encode()),
        (b"x-ollama-coordinator-request", request_id.encode()),
    ]


def first(headers: RawHeaders, name: bytes) -> str | None:
    """The first value of a header."""
    return next((value.decode("latin-1") for key, value in headers if key == name), None)
