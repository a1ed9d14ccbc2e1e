"""Opens one connection to the coordinator and makes a WebSocket of it (RFC 6455, section 4.1)."""

import asyncio
import re
import ssl
from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from typing import cast
from urllib.parse import urlsplit

from msgspec import Struct

from ollama_coordinator_common.network import netloc
from ollama_coordinator_common.websocket import accept_of, new_key

DIAL_SECONDS = 5.0
"""For the connection and the answer: as long as for any request to the coordinator."""

ANSWER_BYTES = 64 * 1024
"""The longest answer that is read: a head, or an error with its sentence."""

_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})")


class NotUpgraded(Exception):
    """The server answers something else than an upgrade; `body` is the start of that."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"it answers {status}")
        self.status = status
        self.body = body


class Dialled(Struct, frozen=True):
    """A connection that is a WebSocket now; `rest` came right after the answer.

    Reading is paused, so that nothing is lost until it has its protocol.
    """

    transport: asyncio.Transport
    rest: bytes


class WrongCertificate(OSError):
    """The server shows another certificate than the one that is believed."""


async def dial(
    url: str, path: str, headers: Mapping[str, str], certificate: bytes = b""
) -> Dialled:
    """Open a WebSocket at `path` below the coordinator's URL.

    `certificate`: the SHA-256 of the only one that is believed; empty: any that the system trusts.

    Raises:
        NotUpgraded: the server answers, and not with an upgrade.
        OSError: there is no connection, or it ended; a TimeoutError is one, and an ssl.SSLError.
        UnicodeError: the host's name cannot be looked up.
    """
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    host, port = parts.hostname or "", parts.port or (443 if secure else 80)
    key = new_key()
    sent = {
        **headers,
        "Host": netloc(host, port) if parts.port else host,
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": key,
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in sent.items())
    request = f"GET {parts.path.rstrip('/')}{path} HTTP/1.1\r\n{lines}\r\n".encode("latin-1")
    context = tls_context(bool(certificate)) if secure else None
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(DIAL_SECONDS):
        transport, answering = await loop.create_connection(_Answering, host, port, ssl=context)
        try:
            if certificate and shown_certificate(transport) != certificate:
                raise WrongCertificate("the certificate is another one")
            transport.write(request)
            head, rest = await answering.answer
            _check(head, rest, key)
        except BaseException:
            transport.abort()
            raise
    return Dialled(transport, rest)


@cache
def tls_context(is_pinned: bool) -> ssl.SSLContext:
    """What connections are secured with; the caller compares a pinned certificate itself."""
    if not is_pinned:
        return ssl.create_default_context()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def shown_certificate(transport: asyncio.BaseTransport) -> bytes:
    """The SHA-256 of the server's certificate; empty without TLS."""
    secured = transport.get_extra_info("ssl_object")
    shown = None if secured is None else secured.getpeercert(binary_form=True)
    return sha256(shown).digest() if shown else b""


def _check(head: bytes, rest: bytes, key: str) -> None:
    found = _STATUS.match(head)
    status = int(found[1]) if found else 0
    if status != 101:
        raise NotUpgraded(status, rest)
    fields = [line.partition(b":") for line in head.split(b"\r\n")[1:]]
    accepted = [value.strip() for name, _, value in fields if name.lower() == _ACCEPT]
    if accepted != [accept_of(key).encode()]:
        raise NotUpgraded(status, b"")


_ACCEPT = b"sec-websocket-accept"


class _Answering(asyncio.Protocol):
    """Gathers the head of the answer, and the body of one that is no upgrade."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.answer: asyncio.Future[tuple[bytes, bytes]] = loop.create_future()
        self._transport: asyncio.Transport | None = None
        self._came = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's has another base

    def data_received(self, data: bytes) -> None:
        self._came += data
        head, end, rest = self._came.partition(b"\r\n\r\n")
        upgraded = _STATUS.match(head) is not None and head[9:12] == b"101"
        length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
        whole = length is not None and len(rest) >= int(length[1])
        if (end and (upgraded or whole)) or len(self._came) > ANSWER_BYTES:
            self._done(head, rest)

    def eof_received(self) -> None:
        head, end, rest = self._came.partition(b"\r\n\r\n")
        if end:
            self._done(head, rest)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.answer.done():
            self.answer.set_exception(exc or ConnectionResetError("it hung up"))
            self.answer.exception()  # nobody may wait for it any more

    def _done(self, head: bytes, rest: bytes) -> None:
        if not self.answer.done() and self._transport is not None:
            self._transport.pause_reading()
            self.answer.set_result((head, rest))
