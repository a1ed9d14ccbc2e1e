"""Requests to the coordinator; aiohttp's errors about it become ours here and nowhere else.

CoordinatorError   no answer, an answer of another program, or one that says "not now": 5xx, 429, or
│                  403 with Retry-After
├── Rejected       the coordinator refuses what was sent: 4xx with its sentence
└── Forgotten      the coordinator does not know this agent: 404 or 401 to a heartbeat or a log
"""

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from ssl import SSLError
from typing import TypeVar
from urllib.parse import quote

import aiohttp
import msgspec

from ollama_coordinator_common.error import OllamaCoordinatorError
from ollama_coordinator_common.join_token import JoinToken
from ollama_coordinator_common.network import cause_of
from ollama_coordinator_common.protocol import (
    PROOF_HEADER,
    AgentView,
    HealthReply,
    HealthReport,
    Healthz,
    LogReport,
    RegisterReply,
    RegisterRequest,
)
from ollama_coordinator_common.types import AgentId

from .link.dial import Dialled, NotUpgraded, WrongCertificate, dial

TRANSPORT_ERRORS = (aiohttp.ClientError, TimeoutError, OSError, ValueError)
"""aiohttp raises bare TimeoutError and OSError beside its own tree; ValueError is how yarl and idna
refuse a host name that cannot be encoded."""

NO_LINKS = (404, 426, 501)
"""An older coordinator, a proxy that leaves the upgrade out, a server that cannot change over."""

HEALTHZ_BYTES = 64 * 1024
"""More than a coordinator answers."""

FILE_SECONDS = 20.0
"""How long nothing may come of a file of a model before another machine is asked for it."""

UNKNOWN = (401, 404)
"""No such agent, or its secret is of none: it registers again."""

NONE: Mapping[str, str] = {}

T = TypeVar("T")


class CoordinatorError(OllamaCoordinatorError):
    """A request to the coordinator failed."""


class Rejected(CoordinatorError):
    """The coordinator refuses what was sent."""


class Forgotten(CoordinatorError):
    """The coordinator does not know this agent."""


class ErrorReply(msgspec.Struct):
    """The body of every error the coordinator answers."""

    error: str


class CoordinatorClient:
    """Sends requests to one coordinator; `url` may have a base path.

    `secret` proves which machine speaks; `token` is what it may join with. `certificate`: the
    SHA-256 of the only one that is believed, where it is given. `skew_seconds` is how far this
    machine's clock was ahead of the coordinator's at the last answer.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str = "",
        *,
        secret: str = "",
        token: JoinToken | None = None,
        certificate: str = "",
        timeout_seconds: float = 5.0,
    ) -> None:
        self.url = url.rstrip("/")
        self._session = session
        self._gives_token = True
        self._headers = {PROOF_HEADER: secret} if secret else {}
        self._joining = {"X-Api-Key": token.secret} if token is not None else {}
        self._certificate = bytes.fromhex(certificate)
        self._ssl = aiohttp.Fingerprint(self._certificate) if certificate else True
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        self.skew_seconds: float | None = None

    def follow(self, url: str, *, gives_token: bool = True) -> None:
        """Speak to the coordinator at another URL; a join token is not for everybody."""
        self.url, self._gives_token = url.rstrip("/"), gives_token

    async def identity_at(self, url: str) -> str | None:
        """The id of the coordinator at a URL, empty where it tells none; `None`: none answers.

        Nothing of this machine is sent.
        """
        try:
            async with self._session.get(
                f"{url}/healthz", timeout=self._timeout, allow_redirects=False, ssl=self._ssl
            ) as response:
                body = await response.content.read(HEALTHZ_BYTES)
            return msgspec.json.decode(body, type=Healthz).id
        except (*TRANSPORT_ERRORS, msgspec.DecodeError):
            return None

    async def register(self, request: RegisterRequest) -> RegisterReply:
        """Register this machine; the reply has the agent's id.

        Raises:
            CoordinatorError: see the module's tree; never `Forgotten`.
        """
        content = msgspec.json.encode(request)
        joining = self._joining if self._gives_token else NONE
        status, body = await self._call("POST", "/api/agents", content, joining)
        if status == 404:
            raise self._not_a_coordinator("it answers 404 to a registration")
        self._check(status, body)
        return self._decode(body, RegisterReply)

    async def report(self, report: HealthReport) -> HealthReply:
        """Send one heartbeat.

        Raises:
            Forgotten: the coordinator does not know the agent; register again.
            CoordinatorError: see the module's tree.
        """
        body = await self._report("/api/health", report)
        try:
            return msgspec.json.decode(body, type=HealthReply)
        except msgspec.DecodeError:
            return HealthReply()  # the report was accepted: a reply of another kind is no error

    async def send_log(self, agent_id: AgentId, report: LogReport) -> None:
        """Send the lines of the logs that the coordinator asked for.

        Raises:
            Forgotten: the coordinator does not know the agent; register again.
            CoordinatorError: see the module's tree.
        """
        await self._report(f"/api/agents/{quote(agent_id, safe='')}/log", report)

    async def agents(self) -> list[AgentView]:
        """All agents that the coordinator knows.

        Raises:
            CoordinatorError: see the module's tree; never `Forgotten`.
        """
        joining = self._joining if self._gives_token else NONE
        status, body = await self._call("GET", "/api/agents", None, joining)
        if status == 404:
            raise self._not_a_coordinator("it answers 404 to GET /api/agents")
        self._check(status, body)
        return self._decode(body, list[AgentView])

    async def join_script(self, shell: str) -> bytes:
        """The script that installs the coordinator's version of the agent; for `sh` or PowerShell.

        Raises:
            CoordinatorError: see the module's tree; never `Forgotten`.
        """
        status, body = await self._call("GET", f"/join?shell={shell}", None)
        self._check(status, body)
        return body

    async def file(self, path: str, start: int, piece_bytes: int) -> AsyncIterator[bytes]:
        """A file of a model from byte `start` on, in pieces; from whichever machine gives it.

        Raises:
            CoordinatorError: it did not come, or not to its end.
        """
        timeout = aiohttp.ClientTimeout(total=None, connect=FILE_SECONDS, sock_read=FILE_SECONDS)
        headers = {**self._headers, "Range": f"bytes={start}-"}
        async with (
            self._translated(),
            self._session.get(
                self.url + path, headers=headers, timeout=timeout, ssl=self._ssl
            ) as response,
        ):
            if response.status not in (200, 206) or (start and response.status == 200):
                body = await response.content.read(HEALTHZ_BYTES)
                sentence = _sentence(body) or f"it answers {response.status} for a file"
                raise CoordinatorError(f"{response.url.host}: {sentence}")
            async for piece in response.content.iter_chunked(piece_bytes):
                yield piece

    async def upgrade(self, path: str) -> Dialled:
        """A connection of a link, at a path below the coordinator's URL.

        Raises:
            Forgotten: the coordinator does not know the agent; register again.
            Rejected: it has no links, or something on the way does not let them pass.
            CoordinatorError: see the module's tree.
        """
        try:
            headers = {str(name): value for name, value in self._session.headers.items()}
            sent = {**headers, **self._headers}
            return await dial(self.url, path, sent, self._certificate)
        except TRANSPORT_ERRORS as exc:
            raise CoordinatorError(f"no answer from {self.url}: {_reason(exc)}") from exc
        except NotUpgraded as exc:
            if exc.status in UNKNOWN and _sentence(exc.body) is not None:
                raise Forgotten("the coordinator does not know this agent (any more)") from exc
            if exc.status in NO_LINKS:
                raise Rejected(f"{self.url} takes no link: {_sentence(exc.body) or exc}") from exc
            self._check(exc.status, exc.body)
            raise self._not_a_coordinator(f"it answers {exc.status} to a WebSocket") from exc

    async def _report(self, path: str, report: msgspec.Struct) -> bytes:
        status, body = await self._call("POST", path, msgspec.json.encode(report))
        if status in UNKNOWN:
            raise Forgotten("the coordinator does not know this agent (any more)")
        self._check(status, body)
        return body

    async def _call(
        self, method: str, path: str, content: bytes | None, headers: Mapping[str, str] = NONE
    ) -> tuple[int, bytes]:
        headers = {**self._headers, **headers}
        if content is not None:
            headers["Content-Type"] = "application/json"
        async with (
            self._translated(),
            self._session.request(
                method,
                self.url + path,
                data=content,
                headers=headers,
                timeout=self._timeout,
                ssl=self._ssl,
                # A redirected POST becomes a GET; the operator should know the real URL instead.
                allow_redirects=False,
            ) as response,
        ):
            if 300 <= response.status < 400:
                target = response.headers.get("Location", "elsewhere")
                raise self._not_a_coordinator(f"it redirects to {target}")
            body = await response.read()
            self._note_date(response.headers.get("Date", ""))
            if response.status == 403 and "Retry-After" in response.headers:
                # This machine waits for an operator to admit it.
                raise CoordinatorError(f"{self.url} says: {_sentence(body) or 'try again'}")
            return response.status, body

    def _note_date(self, date: str) -> None:
        try:
            self.skew_seconds = time.time() - parsedate_to_datetime(date).timestamp()
        except ValueError:
            self.skew_seconds = None

    @asynccontextmanager
    async def _translated(self) -> AsyncIterator[None]:
        try:
            yield
        except TRANSPORT_ERRORS as exc:
            raise CoordinatorError(f"no answer from {self.url}: {_reason(exc)}") from exc

    def _check(self, status: int, body: bytes) -> None:
        if 200 <= status < 300:
            return
        sentence = _sentence(body)
        if sentence is None:
            if status >= 500:
                raise CoordinatorError(f"{self.url} answers {status}")
            raise self._not_a_coordinator(f"it answers {status} without a reason")
        if status >= 500 or status == 429:
            raise CoordinatorError(f"{self.url} answers {status}: {sentence}")
        raise Rejected(f"{self.url} refuses ({status}): {sentence}")

    def _decode(self, body: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(body, type=kind)
        except msgspec.DecodeError as exc:
            raise self._not_a_coordinator("its reply is not a coordinator's") from exc

    def _not_a_coordinator(self, finding: str) -> CoordinatorError:
        return CoordinatorError(
            f"{self.url} is no Ollama Coordinator: {finding}. "
            "Set COORDINATOR_URL to where `ollama-coordinator serve` listens"
        )


def _sentence(body: bytes) -> str | None:
    """The sentence of an error; `None` where the body is none of a coordinator's."""
    try:
        return msgspec.json.decode(body, type=ErrorReply).error
    except msgspec.DecodeError:
        return None


def _reason(exc: BaseException) -> str:
    """One short clause for the operator."""
    match exc:
        case aiohttp.ClientConnectorDNSError():
            return f"{cause_of(exc)}; check COORDINATOR_URL and the DNS"
        case aiohttp.ServerFingerprintMismatch() | WrongCertificate():
            return (
                "its certificate is not the one that this agent believes: give it a new join token "
                "(AGENT_JOIN_TOKEN) or its SHA-256 (COORDINATOR_CERTIFICATE), if it was replaced"
            )
        # An ssl.SSLCertVerificationError is a ValueError too.
        case aiohttp.ClientConnectorCertificateError() | aiohttp.ClientSSLError() | SSLError():
            return (
                f"{cause_of(exc)}; check http against https, and give a certificate of "
                "its own by AGENT_JOIN_TOKEN or COORDINATOR_CERTIFICATE"
            )
        case aiohttp.ServerDisconnectedError() | aiohttp.ClientPayloadError():
            return "it hung up; check http against https"
        case aiohttp.InvalidURL() | ValueError():
            return f"the URL cannot be used ({cause_of(exc)}); check COORDINATOR_URL"
        case _:
            cause = cause_of(exc)
            return f"{cause}; is the coordinator running?" if "refused" in cause else cause
