"""Who sends a request, and whether it may: every request passes here, once.

`identify` looks at a request before its route is known: its client's zone, its key. `admit` is
asked by the route, which names the right that it needs. What zones allow is one table,
`granted`.
"""

import base64
import binascii
import logging
import re
import socket
import time
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes

from starlette.types import Scope

from ollama_coordinator_common.network import client_network, parse_address
from ollama_coordinator_common.settings import CoordinatorConfig

from . import signature
from .caller import Caller, Denied, caller_of, granted
from .keys import (
    EVERYTHING,
    FREE,
    FROM_FILE,
    FROM_SETTING,
    OF_TOKENS,
    Key,
    KeyRing,
    Right,
    key_made_in,
    token_in,
)
from .limits import KeyUsage
from .machines import KnownMachines, secret_in
from .sessions import SecretFile, Sessions, cookie_of
from .zones import FORWARDING, ClientAddress, Zone, Zones

log = logging.getLogger(__name__)

PATH_KEY = "/k/"
"""How a path begins that has a key in it."""

OPENWEBUI_USERS = (b"x-openwebui-user-email", b"x-openwebui-user-name", b"x-openwebui-user-id")
"""What Open WebUI sends with ENABLE_FORWARD_USER_INFO_HEADERS, the most telling first."""

NAME_CHARACTERS = 128
"""Of a user's name that a header gives."""

CREDENTIALS = frozenset({b"authorization", b"x-api-key", b"cookie"})
SIGNS_OF_A_BROWSER = frozenset(
    {b"origin", b"referer", b"sec-fetch-site", b"sec-fetch-mode", b"sec-fetch-dest"}
)
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

LOCAL_ENDS = (".localhost", ".local", ".internal", ".lan", ".home.arpa")
"""Names below these are of no public domain (RFC 6761, 6762, 8375; ICANN's .internal)."""

LOG_SECONDS = 60.0
"""Between two lines on refused requests of one kind."""

NOTICE_SECONDS = 86_400.0
"""How long the dashboard shows what strangers did."""

WRONG_KEYS_A_MINUTE = 30
"""Of one address, or one network of 64 bits in IPv6; the right key is taken also after more. A page
with a wrong key asks some ten times a minute."""

MOST_GUESSERS = 4096
"""Addresses whose wrong keys are counted; the counts begin anew where there are more."""

MOST_OPERATORS = 64
"""Addresses of operators that are remembered: the one that was silent for longest is forgotten."""

_HOST = re.compile(r"(?:\[([^\]]*)\]|([^:]*))(?::\d*)?")


class Access:
    """The gate of one coordinator.

    Raises:
        ConfigError: a setting names no network.
    """

    def __init__(
        self,
        config: CoordinatorConfig,
        keys: KeyRing,
        sessions: Sessions,
        secret: SecretFile,
        machines: KnownMachines,
        usage: KeyUsage,
    ) -> None:
        self.mode = config.access
        self.keys = keys
        self.sessions = sessions
        self.secret = secret
        self.usage = usage
        self.machines = machines
        self._zones = Zones(config.trusted_proxies, config.trusted_networks)
        self._hosts = frozenset(name.lower() for name in (*config.hosts, *_own_names()))
        self._user_headers = tuple(name.lower().encode() for name in config.user_header)
        self._read = (
            FORWARDING
            | CREDENTIALS
            | SIGNS_OF_A_BROWSER
            | {b"user-agent", *OPENWEBUI_USERS, *self._user_headers}
        )
        self._operators: dict[str, None] = {}
        self._guesses: dict[str, int] = {}
        self._guesses_since = 0.0
        self._log_again: dict[str, float] = {}
        self._strangers = 0
        self._notice, self._noticed_at = "", 0.0

    @property
    def notice(self) -> str:
        """What the operator should know of who came in, or did not, within the last day."""
        return self._notice if time.monotonic() - self._noticed_at < NOTICE_SECONDS else ""

    @property
    def needs_join_token(self) -> bool:
        """Whether a machine of the private network joins with a token, or has to ask."""
        machine = ClientAddress("", Zone.PRIVATE)
        return not granted(self.mode, machine, any_key=self.keys.any_made) & Right.JOIN

    async def restore(self, key_file: Path | None, join_token: str) -> None:
        """Take keys and sessions over from the database; the first ones, from the settings.

        Raises:
            DatabaseError: the database cannot be read.
            ConfigError: the file has no key, and cannot be made.
        """
        await self.keys.restore()
        await self.sessions.restore()
        await self.usage.restore()
        if key_file is not None:
            self.keys.adopt(key_made_in(key_file), FROM_FILE, "operate")
        if join_token:
            self.keys.adopt(token_in(join_token).secret, FROM_SETTING, *OF_TOKENS)
        self.secret.write()

    # ── who ───────────────────────────────────────────────────────────────────────────────────

    def identify(self, scope: Scope) -> None:
        """Find out who sends a request: `scope["caller"]`. A key leaves the path here."""
        read = self._read
        headers = {name: value for name, value in scope["headers"] if name in read}
        peer = scope["client"]
        address = str(peer[0]) if peer else ""
        if FORWARDING.isdisjoint(headers):
            client = self._zones.direct(address)
        else:
            client = self._zones.forwarded(address, scope["headers"])
        in_path = scope["path"].startswith(PATH_KEY)
        if in_path or not CREDENTIALS.isdisjoint(headers):
            scope["caller"] = self._with_proof(scope, headers, client, in_path=in_path)
        else:
            scope["caller"] = self._without(headers, client)

    def _without(
        self, headers: dict[bytes, bytes], client: ClientAddress, *, was_wrong: bool = False
    ) -> Caller:
        agent = headers.get(b"user-agent", b"")
        name = client.address
        if client.by_proxy:
            name = self._user(headers, self._user_headers) or name
        return Caller(
            client=client,
            name=name,
            rights=granted(self.mode, client, any_key=self.keys.any_made),
            is_browser=agent.startswith(b"Mozilla/") or not SIGNS_OF_A_BROWSER.isdisjoint(headers),
            was_wrong=was_wrong,
            crosses_sites=_crosses_sites(headers),
        )

    def _with_proof(
        self,
        scope: Scope,
        headers: dict[bytes, bytes],
        client: ClientAddress,
        *,
        in_path: bool,
    ) -> Caller:
        at, authorization = time.time(), headers.get(b"authorization", b"")
        given = [_secret_of(authorization), headers.get(b"x-api-key", b"")]
        texts = [text for text in given if text]
        key = None
        if in_path:
            key = self.keys.by_secret(_taken_from_path(scope), at)
            key = key if key is not None and key.in_path else None
        for text in texts:
            key = key or self.keys.by_secret(text, at)
        key = key or self._signed(scope, authorization, at)
        if key is not None:
            return self._of_key(key, headers, client)
        if client.zone is Zone.LOOPBACK and any(map(self.secret.is_secret, texts)):
            return Caller(client=client, name=client.address, rights=EVERYTHING, is_proven=True)
        cookie = cookie_of(headers.get(b"cookie", b""))
        if cookie and not _is_foreign(scope, headers):
            key = self.sessions.find(cookie, at)
            if key is not None:
                return self._of_key(key, headers, client, by_session=True)
        return self._without(headers, client, was_wrong=in_path or bool(texts))

    def _signed(self, scope: Scope, authorization: bytes, at: float) -> Key | None:
        """The key of an `ollama` program that has signed the request."""
        given = signature.split(authorization)
        key = None if given is None else self.keys.by_public_key(given[0], at)
        return key if given is not None and key and signature.is_true(*given, scope, at) else None

    def _of_key(
        self,
        key: Key,
        headers: dict[bytes, bytes],
        client: ClientAddress,
        *,
        by_session: bool = False,
    ) -> Caller:
        if key.allowed.meets(Right.OPERATE):
            self._remember_operator(client.address)
        name = key.name
        if key.names_users:
            name = self._user(headers, self._user_headers or OPENWEBUI_USERS) or name
        elif client.by_proxy:
            name = self._user(headers, self._user_headers) or name
        return Caller(
            client=client,
            name=name,
            rights=key.allowed,
            key=key,
            counts=self.usage.counts_of(key),
            is_proven=True,
            by_session=by_session,
            crosses_sites=_crosses_sites(headers),
        )

    def _user(self, headers: dict[bytes, bytes], names: tuple[bytes, ...]) -> str:
        """The user whom one of these headers names; empty where none does."""
        for name in names:
            user = unquote(headers.get(name, b"").decode("utf-8", "replace")).strip()
            if user and user.isprintable():
                return user[:NAME_CHARACTERS]
        return ""

    # ── which addresses have places among the connections ─────────────────────────────────────

    def _remember_operator(self, address: str) -> None:
        self._operators.pop(address, None)
        self._operators[address] = None
        if len(self._operators) > MOST_OPERATORS:
            del self._operators[next(iter(self._operators))]

    def is_shared(self, address: str) -> bool:
        """Whether many clients may come from an address: this machine, or a trusted proxy."""
        client = self._zones.direct(address)
        return client.zone is Zone.LOOPBACK or client.by_proxy

    def is_known(self, address: str) -> bool:
        """Whether an agent or an operator has been there, or it is this machine."""
        client = self._zones.direct(address)
        if client.zone is Zone.LOOPBACK or client.address in self._operators:
            return True
        return self.machines.has_one_at(client.address)

    # ── whether it may ────────────────────────────────────────────────────────────────────────

    def admit(self, scope: Scope, right: Right) -> None:
        """Let a request in to a route that needs a right.

        Raises:
            Denied: with a sentence that says what to do.
        """
        caller = caller_of(scope)
        if caller.crosses_sites and scope["method"] not in SAFE_METHODS:
            raise Denied(403, "a page of another site may not change anything here")
        if right == FREE:
            return
        if not caller.rights.meets(right) and not self._is_machine(scope, caller, right):
            raise self._denied(scope, caller, right)
        if caller.is_browser and not caller.is_proven:
            self._check_host(scope)
        if caller.client.zone is Zone.PUBLIC and not caller.is_proven and self.mode == "open":
            self._note(
                f"Anyone may use, manage and operate this fleet: {caller.client.address}, which is "
                "no address of a private network, was served without a key "
                "(COORDINATOR_ACCESS=open)."
            )

    def _is_machine(self, scope: Scope, caller: Caller, right: Right) -> bool:
        """Whether a machine of the fleet asks, or one that may join: the route finds out which."""
        if not right & Right.JOIN:
            return False
        secret = secret_in(scope)
        if self.machines.vouches(secret):
            return True
        if secret and right & Right.ASK and not self._is_closed_to(caller.client):
            return True
        # Who is in the fleet stays in it when the first key is made.
        return not caller.is_proven and self.machines.knows(caller.client.address)

    def _note(self, text: str) -> None:
        self._notice, self._noticed_at = text, time.monotonic()

    def forget_guesses(self) -> None:
        """Count wrong keys anew."""
        self._guesses = {}

    def _check_host(self, scope: Scope) -> None:
        """A page of another site may reach this machine under a name of its own (DNS rebinding)."""
        host = next((value for name, value in scope["headers"] if name == b"host"), b"")
        if not self._is_own_name(host.decode("latin-1")):
            raise Denied(
                403,
                "a browser may not use this coordinator by the name "
                f"{_shown(host)}: open it by its address or by this machine's name, add the name "
                "to COORDINATOR_HOSTS, or log in with a key",
            )

    def _is_own_name(self, host: str) -> bool:
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = (match[1] or match[2] or "").lower().removesuffix(".")
        if not name:
            return False
        if "." not in name or parse_address(name) is not None:
            return True
        return name.endswith(LOCAL_ENDS) or name in self._hosts

    def _denied(self, scope: Scope, caller: Caller, right: Right) -> Denied:
        if caller.key is not None:
            return caller.needs(right)
        if caller.was_wrong or self._is_closed_to(caller.client):
            return self.wrong_key(scope)
        denied = caller.needs(right)
        return Denied(self._status(scope), str(denied))

    def _is_closed_to(self, client: ClientAddress) -> bool:
        """Whether nobody could come in from there, with no key at all being made yet."""
        any_key = self.keys.any_made
        return self.mode == "auto" and not any_key and not granted("auto", client, any_key=False)

    def wrong_key(self, scope: Scope) -> Denied:
        """The refusal of a caller whose key is none, which is counted."""
        caller = caller_of(scope)
        if self._is_closed_to(caller.client):
            return self._closed(caller.client)
        address, now = client_network(caller.client.address), time.monotonic()
        if now - self._guesses_since >= LOG_SECONDS or len(self._guesses) >= MOST_GUESSERS:
            self._guesses, self._guesses_since = {}, now
        count = self._guesses[address] = self._guesses.get(address, 0) + 1
        if count > WRONG_KEYS_A_MINUTE:
            self._log("guess", "wrong keys, many of one address", client=address, count=count)
            text = "too many wrong keys from this address; try again in a minute"
            return Denied(429, text, retry_after=LOG_SECONDS)
        self._log("wrong", "a wrong key", client=address)
        return Denied(
            self._status(scope),
            "this key is none that is in force here: it may be mistyped, expired or revoked",
        )

    def _closed(self, client: ClientAddress) -> Denied:
        self._strangers += 1
        if client.forwarded:
            why = f"{client.address} passed it on, which is no trusted proxy"
            what = f"set COORDINATOR_TRUSTED_PROXIES={client.address} where that is your proxy, "
        else:
            why, what = f"it comes from {client.address}", ""
        what += "make a key (`ollama-coordinator keys create NAME` on the coordinator's machine), "
        text = (
            f"without keys this coordinator serves its private network alone, and {why}: {what}"
            "or set COORDINATOR_ACCESS=open"
        )
        self._log("stranger", text, requests=self._strangers)
        self._note(
            f"{self._strangers} requests from outside the private network were refused, the last "
            f"one from {client.address}. To let them in, make a key or name your proxy: see "
            "COORDINATOR_TRUSTED_PROXIES."
        )
        return Denied(403, text)

    def _status(self, scope: Scope) -> int:
        """401, but 403 for the `ollama` program: it shows a sentence of its own for 401."""
        agent = next((value for name, value in scope["headers"] if name == b"user-agent"), b"")
        return 403 if agent.startswith(b"ollama/") else 401

    def _log(self, kind: str, text: str, **facts: object) -> None:
        """One line a minute at most of each kind."""
        now = time.monotonic()
        if now >= self._log_again.get(kind, 0.0):
            self._log_again[kind] = now + LOG_SECONDS
            log.warning(text, extra=facts)


def _own_names() -> tuple[str, ...]:
    try:
        name = socket.gethostname().lower()
    except OSError:
        return ()
    return (name, name.partition(".")[0])


def _shown(host: bytes) -> str:
    text = host.decode("latin-1")[:100]
    return f"'{text}'" if text.isprintable() else "that it gave"


def _crosses_sites(headers: dict[bytes, bytes]) -> bool:
    """Whether a browser sends it for another site; one that names its origin is judged by that."""
    return headers.get(b"sec-fetch-site") == b"cross-site" and b"origin" not in headers


def _is_foreign(scope: Scope, headers: dict[bytes, bytes]) -> bool:
    """Whether a page of another origin sends it, perhaps of another port of this machine."""
    origin = headers.get(b"origin")
    if origin is None:
        return False
    host = next((value for name, value in scope["headers"] if name == b"host"), b"")
    return origin not in (b"http://" + host, b"https://" + host)


def _secret_of(authorization: bytes) -> bytes:
    """The key in an `Authorization` header: as Bearer, or as the password of Basic."""
    scheme, _, rest = authorization.partition(b" ")
    rest = rest.strip()
    if scheme.lower() == b"bearer":
        return rest
    if scheme.lower() == b"basic":
        try:
            user, _, password = base64.b64decode(rest, validate=True).partition(b":")
        except (binascii.Error, ValueError):
            return rest
        return password or user
    return authorization


def _taken_from_path(scope: Scope) -> bytes:
    """The key in a path; the path is without it from now on, wherever it is read.

    A redirect alone has it again, from `scope["key_prefix"]`.
    """
    raw: bytes = scope["raw_path"]
    text, _, rest = raw.removeprefix(PATH_KEY.encode()).partition(b"/")
    scope["key_prefix"] = PATH_KEY + text.decode("latin-1")
    raw = b"/" + rest.lstrip(b"/")
    scope["raw_path"], scope["path"] = raw, unquote(raw.decode("latin-1"))
    return unquote_to_bytes(text)
