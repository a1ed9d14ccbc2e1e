"""The dashboard's log-in: a key becomes a session, and ends with it."""

from http.cookies import SimpleCookie
from pathlib import Path

import aiohttp
import pytest

from ollama_coordinator.access import COOKIE, NewKey
from support.coordinator import Running, running

HTML = {"Accept": "text/html,application/xhtml+xml"}


async def log_in(coordinator: Running, key: str, **headers: str) -> tuple[int, SimpleCookie, str]:
    """Status, cookies and body of the form's answer."""
    async with coordinator.session.post(
        f"{coordinator.url}/dashboard/session",
        data={"key": key},
        headers=headers,
        allow_redirects=False,
    ) as answer:
        coordinator.session.cookie_jar.clear()
        return answer.status, answer.cookies, await answer.text()


async def status_of(
    coordinator: Running, path: str, cookie: str, method: str = "GET", **headers: str
) -> int:
    sent = {"Cookie": f"a=b; {COOKIE}={cookie}", **headers}
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session:
        async with session.request(method, coordinator.url + path, headers=sent) as answer:
            return answer.status


@pytest.mark.spec("ACCESS-18")
async def test_a_browser_logs_in_with_a_key_and_out_again() -> None:
    async with running(access="keys") as coordinator:
        _, key = coordinator.parts.access.keys.create(NewKey(name="anna", rights=("watch",)))
        async with coordinator.session.get(f"{coordinator.url}/dashboard", headers=HTML) as page:
            assert page.status == 401
            assert page.content_type == "text/html"
            text = await page.text()
            policy = page.headers["content-security-policy"]
        assert "<script" not in text
        assert 'action="dashboard/session"' in text
        assert "script-src" not in policy
        assert "unsafe-inline" not in policy
        assert "frame-ancestors 'none'" in policy
        status, cookies, text = await log_in(coordinator, "oc_wrong")
        assert (status, len(cookies)) == (401, 0)
        assert 'action="session"' in text
        status, cookies, _ = await log_in(coordinator, key)
        assert status == 303
        cookie = cookies[COOKIE]
        assert (cookie["httponly"], cookie["samesite"].lower()) == (True, "strict")
        assert not cookie["secure"]
        for path in ("/dashboard", "/dashboard/js/app.js", "/api/history", "/api/session"):
            assert await status_of(coordinator, path, cookie.value) == 200
        assert await status_of(coordinator, "/api/keys", cookie.value) == 403
        assert await status_of(coordinator, "/dashboard/session", cookie.value, "DELETE") == 204
        assert await status_of(coordinator, "/api/history", cookie.value) == 401


@pytest.mark.spec("ACCESS-18")
async def test_a_session_ends_with_its_key_and_outlives_a_restart(tmp_path: Path) -> None:
    url = f"sqlite://{tmp_path}/a.db"
    async with running(access="keys", database_url=url) as coordinator:
        _, key = coordinator.parts.access.keys.create(NewKey(name="anna", rights=("operate",)))
        values = [(await log_in(coordinator, key))[1][COOKIE].value for _ in range(2)]
        for value in values:
            assert value not in str(coordinator.parts.access.sessions.__dict__)
    async with running(access="keys", database_url=url) as coordinator:
        for value in values:
            assert await status_of(coordinator, "/api/keys", value) == 200
        assert coordinator.parts.access.sessions.of(coordinator.parts.access.keys.find("anna")) == 2
        assert await status_of(coordinator, "/api/keys/anna", values[0], "DELETE") == 200
        for value in values:
            assert await status_of(coordinator, "/api/keys", value) == 401


@pytest.mark.spec("ACCESS-18")
async def test_a_page_of_another_origin_has_no_session() -> None:
    async with running(access="keys") as coordinator:
        _, key = coordinator.parts.access.keys.create(NewKey(name="anna", rights=("operate",)))
        value = (await log_in(coordinator, key))[1][COOKIE].value
        own = {"Origin": coordinator.url}
        # Another port of the same host is the same site to a browser: it sends the cookie.
        other = {"Origin": "http://127.0.0.1:1"}
        assert await status_of(coordinator, "/api/keys", value, **own) == 200
        assert await status_of(coordinator, "/api/keys", value, **other) == 401


@pytest.mark.spec("ACCESS-18")
async def test_the_cookie_is_for_tls_alone_where_there_is_tls() -> None:
    async with running(access="keys", trusted_proxies=("127.0.0.1",)) as coordinator:
        _, key = coordinator.parts.access.keys.create(NewKey(name="anna"))
        proxied = {"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "https"}
        status, cookies, _ = await log_in(coordinator, key, **proxied)
        assert status == 303
        assert cookies[COOKIE]["secure"]


@pytest.mark.spec("ACCESS-14")
async def test_guessing_at_the_log_in_is_slowed_down() -> None:
    async with running(access="keys") as coordinator:
        statuses = [(await log_in(coordinator, f"oc_{number}"))[0] for number in range(40)]
        assert statuses[0] == 401
        assert statuses[-1] == 429


@pytest.mark.spec("ACCESS-3")
async def test_without_keys_a_stranger_gets_no_log_in() -> None:
    async with running(trusted_proxies=("127.0.0.1",)) as coordinator:
        stranger = {"X-Forwarded-For": "203.0.113.9", **HTML}
        async with coordinator.session.get(
            f"{coordinator.url}/dashboard", headers=stranger
        ) as page:
            assert page.status == 403
            assert page.content_type == "application/json"
        status, _, text = await log_in(coordinator, "oc_x", **stranger)
        assert status == 403
        assert "keys create" in text
