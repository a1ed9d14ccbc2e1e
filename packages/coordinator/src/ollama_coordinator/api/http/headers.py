"""Which headers pass between a client and an agent's Ollama, and which end here."""

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

NOT_FOR_CLIENTS = HOP_BY_HOP | {b"content-length", b"date", b"server"}


def to_ollama(headers: RawHeaders) -> list[tuple[str, str]]:
    """A client's headers as the agent's Ollama may see them."""
    received = [(name.lower(), name, value) for name, value in headers]
    dropped = NOT_FOR_OLLAMA
    if any(lowered == b"connection" for lowered, _, _ in received):
        dropped |= _named_by_connection((lowered, value) for lowered, _, value in received)
    return [
        (name.decode("latin-1"), value.decode() if value.isascii() else _text(value))
        for lowered, name, value in received
        if lowered not in dropped
    ]


def _text(value: bytes) -> str:
    """A header's value such that aiohttp, which sends UTF-8, sends the same bytes where it can."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def to_client(headers: RawHeaders) -> list[tuple[bytes, bytes]]:
    """Ollama's headers as the client may see them; CORS is answered here, not there."""
    received = [(name.lower(), value) for name, value in headers]
    dropped = NOT_FOR_CLIENTS
    if any(name == b"connection" for name, _ in received):
        dropped |= _named_by_connection(received)
    return [
        (name, value)
        for name, value in received
        if name not in dropped and not name.startswith(b"access-control-")
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
