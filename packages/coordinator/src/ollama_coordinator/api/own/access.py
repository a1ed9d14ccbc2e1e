"""`/api/keys`: who has a key, and what each key allows; `/dashboard/session`: the log-in."""

import logging
import time
from datetime import datetime
from urllib.parse import parse_qs

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from ollama_coordinator.access import (
    COOKIE,
    SESSION_SECONDS,
    JoinRequest,
    Key,
    KeyLimits,
    NewKey,
    Right,
    caller_of,
    cookie_of,
)
from ollama_coordinator.access.sessions import utc
from ollama_coordinator.api.http.errors import decode, login_page, own_body, reply
from ollama_coordinator.api.http.openapi import Media, operation
from ollama_coordinator.api.http.routing import tell
from ollama_coordinator.parts import Parts
from ollama_coordinator_common.join_token import JoinToken

log = logging.getLogger(__name__)


class KeyView(Struct, frozen=True, kw_only=True):
    """One key, without its text. `hint` is how it begins; `sessions` are log-ins with it."""

    id: str
    name: str
    hint: str
    rights: tuple[str, ...]
    models: tuple[str, ...]
    weight: float
    lane: str
    in_path: bool
    names_users: bool
    continues: bool
    limits: KeyLimits
    once: bool
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None
    sessions: int


class MadeKey(KeyView, frozen=True, kw_only=True):
    """A key that was made just now: `key` is its text, shown this once; empty for a public key.

    `join_token`: what machines join with, where that is what it is for. `pin`: of the public key
    of a certificate that the coordinator has made, as curl's `--pinnedpubkey` takes it.
    """

    key: str
    join_token: str = ""
    pin: str = ""


class KeysView(Struct, frozen=True):
    """`GET /api/keys`."""

    keys: list[KeyView]


class KeysApi:
    """The handlers of keys."""

    def __init__(self, parts: Parts) -> None:
        self._access = parts.access
        self._keys = parts.access.keys
        self._tls = parts.tls
        self._store = parts.store

    @operation(gives={200: KeysView})
    async def list(self, request: Request) -> Response:
        """Every key, also those that were revoked or have expired; never their texts."""
        return reply(KeysView([self._view(key) for key in self._keys]))

    @operation(takes=NewKey, gives={201: MadeKey}, errors=(403,))
    async def create(self, request: Request) -> Response:
        """Make a key; its text is in this answer and nowhere else."""
        key, text = self._keys.create(await decode(NewKey, request))
        try:
            await self._store.commit()
        except BaseException:
            self._keys.forget(key)
            raise
        self._log("key made", key, request)
        token = JoinToken(text, self._tls.fingerprint).text if key.is_token and text else ""
        shown = {**msgspec.structs.asdict(self._view(key)), "key": text}
        answer = reply(MadeKey(**shown, join_token=token, pin=self._tls.pin), 201)
        answer.headers["cache-control"] = "no-store"
        return answer

    @operation(gives={200: KeyView}, errors=(404,))
    async def show(self, request: Request) -> Response:
        """One key, by its name or id."""
        return reply(self._view(self._keys.find(request.path_params["name"])))

    @operation(gives={200: KeyView}, errors=(404,))
    async def revoke(self, request: Request) -> Response:
        """End a key, by its name or id, and the sessions that were begun with it.

        Keys are asked for from then on as before, also when none is left.
        """
        key = self._keys.revoke(request.path_params["name"])
        self._access.sessions.end_all(key)
        self._log("key revoked", key, request)
        await self._store.commit()
        return reply(self._view(key))

    def _log(self, event: str, key: Key, request: Request) -> None:
        by = caller_of(request.scope).name
        tell(request.scope, key.name, rights=",".join(key.rights), models=",".join(key.models))
        log.info(event, extra={"key": key.name, "rights": ",".join(key.rights), "by": by})

    def _view(self, key: Key) -> KeyView:
        return KeyView(
            id=key.id,
            name=key.name,
            hint=key.hint,
            rights=key.rights,
            models=key.models,
            weight=key.weight,
            lane=key.lane,
            in_path=key.in_path,
            names_users=key.names_users,
            continues=key.continues,
            limits=key.limits,
            once=key.once,
            created_at=key.created_at,
            expires_at=key.expires_at,
            revoked_at=key.revoked_at,
            last_used_at=utc(key.last_used),
            sessions=self._access.sessions.of(key),
        )


class JoinRequestsView(Struct, frozen=True):
    """`GET /api/join-requests`."""

    join_requests: list[JoinRequest]


class JoiningApi:
    """The handlers of machines that want to join; a name is a machine's, or the request's id."""

    def __init__(self, parts: Parts) -> None:
        self._machines = parts.machines
        self._store = parts.store

    @operation(gives={200: JoinRequestsView})
    async def list(self, request: Request) -> Response:
        """The machines that registered without a join token where one is needed."""
        return reply(JoinRequestsView(self._machines.requests()))

    @operation(gives={200: JoinRequest}, errors=(404,))
    async def admit(self, request: Request) -> Response:
        """Let a machine join: it does when it asks again, some seconds later."""
        asked = self._machines.admit(request.path_params["name"])
        self._log("machine admitted", asked, request)
        await self._store.commit()
        return reply(asked)

    @operation(gives={200: JoinRequest}, errors=(404,))
    async def refuse(self, request: Request) -> Response:
        """Refuse a machine, now and when it asks again; with a join token it still comes in."""
        asked = self._machines.refuse(request.path_params["name"])
        self._log("machine refused", asked, request)
        await self._store.commit()
        return reply(asked)

    def _log(self, event: str, asked: JoinRequest, request: Request) -> None:
        facts = {"machine": asked.machine_name, "fingerprint": asked.fingerprint}
        tell(request.scope, asked.machine_name, fingerprint=asked.fingerprint, of=asked.address)
        log.info(event, extra={**facts, "by": caller_of(request.scope).name})


class SessionView(Struct, frozen=True):
    """Who is looking: the name and the rights, and whether a log-in can be ended.

    `join_token_needed`: a machine of the private network joins with a join token, or has to ask.
    """

    name: str
    rights: list[str]
    session: bool
    join_token_needed: bool


PAGE = Media("text/html")
"""The page that takes a key, again."""


LOGIN_BYTES = 4096
"""Of a form with a key; strangers may send it, and it is read in one piece."""


class SessionsApi:
    """The handlers of the dashboard's log-in."""

    def __init__(self, parts: Parts) -> None:
        self._access = parts.access
        self._store = parts.store

    @operation(gives={200: SessionView})
    async def show(self, request: Request) -> Response:
        """Who asks, and what it may do."""
        caller = caller_of(request.scope)
        rights = [right.name.lower() for right in Right if caller.rights & right and right.name]
        needed = self._access.needs_join_token
        return reply(SessionView(caller.name, rights, caller.by_session, needed))

    @operation(gives={303: None, 401: PAGE, 403: PAGE, 429: PAGE}, errors=(408, 413))
    async def begin(self, request: Request) -> Response:
        """Log a browser in with a key, which a form sends as `key`."""
        form = parse_qs((await own_body(request, LOGIN_BYTES)).decode("latin-1"))
        text = "".join(form.get("key", [])).strip().encode("latin-1", "replace")
        at = time.time()
        key = self._access.keys.by_secret(text, at)
        if key is None:
            denied = self._access.wrong_key(request.scope)
            return login_page(str(denied), denied.status, action="session")
        value = self._access.sessions.begin(key, at)
        await self._store.flush()
        tell(request.scope, key.name)
        log.info("log-in to the dashboard", extra={"key": key.name})
        # Relative: a proxy may serve us below another path.
        response = Response(status_code=303, headers={"location": "../dashboard"})
        _set_cookie(response, request, value, SESSION_SECONDS)
        return response

    @operation(gives={204: None})
    async def end(self, request: Request) -> Response:
        """Log a browser out."""
        value = cookie_of(request.headers.get("cookie", "").encode("latin-1"))
        if value:
            self._access.sessions.end(value)
            await self._store.flush()
        response = Response(status_code=204)
        _set_cookie(response, request, "", 0)
        return response


def _set_cookie(response: Response, request: Request, value: str, seconds: int) -> None:
    """For this site's own pages alone, and out of the reach of their scripts."""
    caller = caller_of(request.scope)
    secure = request.url.scheme == "https" or (
        caller.client.by_proxy and request.headers.get("x-forwarded-proto") == "https"
    )
    response.set_cookie(
        COOKIE, value, max_age=seconds, path="/", secure=secure, httponly=True, samesite="strict"
    )
