"""Who may call which route: every caller, in every zone and mode, at every route of the list."""

from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any, cast

import pytest
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from ollama_coordinator.access import FREE, NewKey, Right
from ollama_coordinator.access.sessions import SESSION_SECONDS
from ollama_coordinator.api.http.routing import Guarded, Methods
from ollama_coordinator.api.routes import endpoints
from ollama_coordinator.app import create_app
from ollama_coordinator.parts import Parts
from ollama_coordinator_common.settings import CoordinatorConfig
from support.coordinator import running

ALL = {"use", "manage", "operate", "join", "watch"}
NONE: set[str] = set()

ZONES = {
    "loopback": "127.0.0.1",
    "private": "192.168.1.7",
    "trusted": "10.9.0.4",
    "public": "203.0.113.9",
    "forwarded": "127.0.0.1",
}
"""A peer of each zone; what comes forwarded has a header of a proxy that nobody trusts."""

TABLE = {
    "open": dict.fromkeys(ZONES, ALL),
    "auto without keys": {
        "loopback": ALL, "private": ALL, "trusted": ALL, "public": NONE, "forwarded": NONE,
    },
    "auto": {
        "loopback": ALL, "private": NONE, "trusted": {"use"}, "public": NONE, "forwarded": NONE,
    },
    "keys": {
        "loopback": NONE, "private": NONE, "trusted": {"use"}, "public": NONE, "forwarded": NONE,
    },
}  # fmt: skip
"""What each zone may do without a key: the table of the specification, written once more."""

INCLUDED = {
    "use": {"use"},
    "manage": {"use", "manage"},
    "operate": ALL,
    "join": {"join"},
    "watch": {"watch"},
}
ENDED = {
    *("wrong", "dummy", "expired", "revoked", "another cookie"),
    *("session of a revoked key", "session of an expired key", "ended session", "unused session"),
    *("hash of a session", "session as a key", "key as a cookie"),
    "session of operate from a page of another origin",
}
"""What nobody has any rights by."""

SOMEBODY_ELSES = {
    "use beside a session of operate": {"use"},
    "join beside a session of operate": {"join"},
    "operate beside a session of use": ALL,
    "wrong beside a session of operate": ALL,
}
"""A living session of another key comes along: the key decides alone, and a text that is none
does not undo the session."""
PASSED = 299
"""The status of a handler that was reached."""

FREE_ROUTES = {
    *(("GET", "/"), ("GET", "/healthz"), ("GET", "/readyz")),
    # The program and how to start it; a registration has its own gate.
    *(("GET", "/join"), ("GET", "/join/{file}")),
    # Of a model that moves: the namespace is a ticket; without one these ask for `use`.
    ("GET", "/v2/{namespace}/{model}/manifests/{tag}"),
    ("GET", "/v2/{namespace}/{model}/blobs/{digest}"),
    # The log-in itself, and its end.
    *(("POST", "/dashboard/session"), ("DELETE", "/dashboard/session")),
}


async def _reached(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": PASSED, "headers": []})
    await send({"type": "http.response.body", "body": b""})


class World:
    """A coordinator whose handlers only say that they were reached, and a key of each kind."""

    def __init__(self, mode: str) -> None:
        access = mode.partition(" ")[0]
        config = CoordinatorConfig(
            access=access, database_url="sqlite://:memory:", trusted_networks=("10.9.0.0/16",)
        )
        self.app: Any = create_app(config)
        self.parts: Parts = self.app.state.parts
        self.table = [(one.method, one.path, one.right) for one in endpoints(self.parts)]
        for route in cast(list[Route], self.app.router.routes):
            methods = cast(Methods, route.app)
            methods.by_method = {
                method: Guarded(one.right, _reached) for method, one in methods.by_method.items()
            }
        self.headers: dict[str, list[tuple[bytes, bytes]]] = {"nobody": []}
        self.headers["dummy"] = [(b"authorization", b"Bearer ollama")]
        self.headers["wrong"] = [(b"authorization", b"Bearer oc_" + b"x" * 43)]
        if mode != "auto without keys":
            self._make_keys()

    def _make_keys(self) -> None:
        keys, sessions = self.parts.access.keys, self.parts.access.sessions
        for right in INCLUDED:
            key, text = keys.create(NewKey(name=right, rights=(right,)))
            self.headers[right] = [(b"x-api-key", text.encode())]
            cookie = sessions.begin(key, 1e12)
            self.headers[f"session of {right}"] = [_cookie(cookie)]
        past = datetime.now(UTC) - timedelta(seconds=1)
        _, text = keys.create(NewKey(name="expired", rights=("operate",), expires_at=past))
        self.headers["expired"] = [(b"authorization", b"Bearer " + text.encode())]
        gone, text = keys.create(NewKey(name="gone", rights=("operate",)))
        self.headers["revoked"] = [(b"authorization", b"bearer " + text.encode())]
        self.headers["session of a revoked key"] = [_cookie(sessions.begin(gone, 1e12))]
        keys.revoke("gone")
        self.headers["another cookie"] = [_cookie("x" * 43)]
        self._make_sessions()

    def _make_sessions(self) -> None:
        """Sessions that come with another key, from another page, or in no form of a session."""
        access = self.parts.access
        operator, living = access.keys.find("operate"), self.headers["session of operate"]
        for who in SOMEBODY_ELSES:
            own, _, session = who.partition(" beside a ")
            self.headers[who] = [*self.headers[own], *self.headers[session]]
        self.headers["session of operate from a page of another origin"] = [
            *living,
            (b"origin", b"http://127.0.0.1:9999"),
        ]
        expired = access.keys.find("expired")
        self.headers["session of an expired key"] = [_cookie(access.sessions.begin(expired, 1e12))]
        ended = access.sessions.begin(operator, 1e12)
        access.sessions.end(ended)
        self.headers["ended session"] = [_cookie(ended)]
        unused = access.sessions.begin(operator, datetime.now(UTC).timestamp() - SESSION_SECONDS)
        self.headers["unused session"] = [_cookie(unused)]
        begun = access.sessions.begin(operator, 1e12)
        self.headers["hash of a session"] = [_cookie(sha256(begun.encode()).hexdigest())]
        self.headers["session as a key"] = [(b"authorization", b"Bearer " + begun.encode())]
        self.headers["key as a cookie"] = [_cookie(self.headers["operate"][0][1].decode())]

    async def ask(self, who: str, zone: str, method: str, path: str) -> tuple[int, bytes]:
        headers = [*self.headers[who], (b"host", b"127.0.0.1")]
        if zone == "forwarded":
            headers.append((b"x-forwarded-for", b"192.168.1.7"))
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": headers,
            "client": (ZONES[zone], 50_000),
            "server": ("127.0.0.1", 8080),
            "root_path": "",
            "state": {},
        }
        status, body = 0, b""
        self.parts.access.forget_guesses()

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            nonlocal status, body
            status = message.get("status", status)
            body += message.get("body", b"")

        await self.app(scope, receive, send)
        return status, body


def _cookie(value: str) -> tuple[bytes, bytes]:
    return b"cookie", f"a=b; ollama_coordinator_session={value}".encode()


def _expected(mode: str, zone: str, who: str, right: Right) -> int:
    """The status, by the tables above."""
    needed = {name for name in ALL if Right[name.upper()] & right}
    own = SOMEBODY_ELSES.get(who, INCLUDED.get(who.removeprefix("session of ")))
    assert own is not None or who in {"nobody", *ENDED}
    if right == FREE:
        return PASSED
    if own is not None:
        return PASSED if own & needed else 403
    if TABLE[mode][zone] & needed:
        return PASSED
    return 403 if mode == "auto without keys" else 401


@pytest.mark.spec("ACCESS-1")
@pytest.mark.spec("ACCESS-5")
@pytest.mark.spec("ACCESS-8")
@pytest.mark.spec("ACCESS-18")
@pytest.mark.parametrize("mode", TABLE)
async def test_every_caller_in_every_zone_at_every_route(mode: str) -> None:
    world = World(mode)
    wrong = []
    for zone in ZONES:
        for who in world.headers:
            for method, path, right in world.table:
                status, body = await world.ask(who, zone, method, path.replace("{", "").strip("}"))
                if status != _expected(mode, zone, who, right):
                    wrong.append((zone, who, method, path, status, body))
    assert wrong == []
    assert len(world.table) > 60


@pytest.mark.spec("ACCESS-4")
async def test_the_free_routes_are_these_and_no_others() -> None:
    world = World("keys")
    free = {(method, path) for method, path, right in world.table if right == FREE}
    assert free - FREE_ROUTES == set()
    for method, path in sorted({*FREE_ROUTES, ("HEAD", "/")}):
        for zone in ZONES:
            for who in world.headers:
                assert (await world.ask(who, zone, method, path))[0] == PASSED


@pytest.mark.spec("ACCESS-5")
async def test_an_unknown_path_and_a_wrong_method_reach_nothing() -> None:
    world = World("keys")
    assert (await world.ask("nobody", "public", "GET", "/api/nothing"))[0] == 404
    assert (await world.ask("nobody", "public", "PUT", "/api/chat"))[0] == 405


@pytest.mark.spec("ACCESS-1")
@pytest.mark.parametrize("mode", ["open", "auto", "keys"])
async def test_the_same_on_sockets(mode: str) -> None:
    forwarded = {
        "loopback": "127.0.0.1",
        "private": "8.8.8.8, 10.0.0.8",
        "public": "127.0.0.1, 198.51.100.7",
    }
    async with running(access=mode, trusted_proxies=("127.0.0.1",)) as coordinator:
        _, text = coordinator.parts.access.keys.create(NewKey(name="a", rights=("use",)))
        for zone, address in forwarded.items():
            for key in ("", text):
                headers = {"X-Forwarded-For": address}
                if key:
                    headers["Authorization"] = f"Bearer {key}"
                for path, right in (("/api/tags", "use"), ("/api/history", "watch")):
                    who = "use" if key else "nobody"
                    wanted = _expected(mode, zone, who, Right[right.upper()])
                    async with coordinator.session.get(
                        coordinator.url + path, headers=headers
                    ) as answer:
                        status = PASSED if answer.status == 200 else answer.status
                        assert status == wanted, (zone, key, path)
