"""Tickets: what the coordinator gives to whoever may read one file of a model from an agent once.

The coordinator signs them (HMAC-SHA-256, RFC 2104) with the hash of the agent's own secret, which
the two know and nobody else. A ticket is for one purpose, one model and one digest. It ends by the
agent's clock, which the coordinator knows from the last heartbeat: the clocks need not agree.
"""

import hmac
import math
import re
import secrets
from hashlib import sha256
from urllib.parse import quote

TICKET_SECONDS = 60.0
"""How long a ticket may be used for the first and only time; its transfer may take longer."""

READ, WRITE = "read", "write"
"""The purposes: to read a file of a model, or to have the agent fetch and keep one."""

PREFIX = "/v2/"
"""The path below which an agent answers what needs a ticket; no Ollama has it."""

FLEET_HOST = "fleet.internal"
"""The host of the name under which an agent keeps what it fetched, until Ollama copies it."""

NAMESPACE = "transfer-"
"""How the namespace begins under which a model arrives on its new machine."""

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")

_TICKET = re.compile(r"([0-9a-f]{16})\.(\d{1,12})\.([0-9a-f]{64})")


class WrongTicket(Exception):
    """A ticket is none, was used, has ended, or is for something else."""


def key_of(secret: str) -> str:
    """The hash of an agent's secret: what its tickets are signed with."""
    return sha256(secret.encode()).hexdigest()


def issue(key: str, purpose: str, model: str, digest: str, ends_at: float) -> str:
    """A new ticket that ends at a time of the agent's clock, in seconds."""
    nonce, ends = secrets.token_hex(8), math.ceil(ends_at)
    return f"{nonce}.{ends}.{_signature(key, nonce, ends, purpose, model, digest)}"


def path_of(ticket: str, model: str, digest: str) -> str:
    """Where an agent takes a ticket: the path and the query of the URL."""
    return f"{PREFIX}{ticket}/{digest}?model={quote(model, safe='')}"


def _signature(key: str, nonce: str, ends: int, *about: str) -> str:
    text = "\n".join((nonce, str(ends), *about))
    return hmac.new(key.encode(), text.encode(), sha256).hexdigest()


class TicketBook:
    """An agent's own tickets: each is taken once."""

    def __init__(self, secret: str) -> None:
        self._key = key_of(secret)
        self._used: dict[str, int] = {}

    def take(self, ticket: str, purpose: str, model: str, digest: str, now: float) -> None:
        """Use a ticket up.

        Raises:
            WrongTicket: it cannot be used.
        """
        match = _TICKET.fullmatch(ticket)
        if match is None:
            raise WrongTicket("this is no ticket")
        nonce, ends = match[1], int(match[2])
        signature = _signature(self._key, nonce, ends, purpose, model, digest)
        if not hmac.compare_digest(signature, match[3]):
            raise WrongTicket("this ticket is not for that, or not of this agent's coordinator")
        if not now <= ends <= now + 2 * TICKET_SECONDS:
            raise WrongTicket("this ticket has ended; ask the coordinator for another one")
        self._used = {known: until for known, until in self._used.items() if until >= now}
        if nonce in self._used:
            raise WrongTicket("this ticket was used; ask the coordinator for another one")
        self._used[nonce] = ends


def is_passing(namespace: str) -> bool:
    """Whether a namespace is that of a model on its way: no list shows it."""
    return namespace.startswith(NAMESPACE)


def new_namespace() -> str:
    """A namespace for one transfer, which nobody guesses: what a stock Ollama has as a ticket."""
    return f"{NAMESPACE}{secrets.token_hex(16)}"


def other_name(host: str) -> str:
    """Another name of the same host, `NAME` or `NAME:PORT` as in a `Host` header.

    Ollama takes a file from the address of a redirect only if that has another host name: IPv4
    inside IPv6 is the same address, and letter case says nothing in a name (RFC 4343).
    """
    name, colon, port = host.rpartition(":")
    if not colon or not port.isdecimal():
        name, colon, port = host, "", ""
    if re.fullmatch(r"\d+\.\d+\.\d+\.\d+", name):
        return f"[::ffff:{name}]{colon}{port}"
    return f"{name.swapcase()}{colon}{port}"
