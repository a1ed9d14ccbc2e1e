"""`OLLAMA_AUTH=1`: an `ollama` program signs its requests with a key of its own."""

import base64
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from ollama_coordinator.access import signature
from support.coordinator import Running, running


@pytest.fixture
async def behind() -> AsyncIterator[Running]:
    """A coordinator behind a trusted proxy, which asks for strangers."""
    async with running(trusted_proxies=("127.0.0.1",)) as coordinator:
        yield coordinator


async def asked(
    coordinator: Running, path: str, method: str = "GET", **headers: str
) -> tuple[int, str]:
    sent = {"X-Forwarded-For": "203.0.113.9"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    async with coordinator.session.request(method, coordinator.url + path, headers=sent) as answer:
        return answer.status, await answer.text()


@pytest.mark.spec("ACCESS-19")
async def test_an_ollama_program_signs_with_its_own_key(behind: Running) -> None:
    coordinator = behind
    private = ed25519.Ed25519PrivateKey.generate()
    form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    public = private.public_key().public_bytes(*form).decode()
    await made_of(coordinator, public)
    now = int(time.time())

    async def signed(
        path: str, at: int, method: str = "GET", signs: str = "", by: Any = private, **more: str
    ) -> int:
        text = signs or f"{method},{path}?ts={at}"
        signature = base64.b64encode(by.sign(text.encode())).decode()
        headers = {"Authorization": f"{public.split()[1]}:{signature}", **more}
        return (await asked(coordinator, f"{path}?ts={at}", method, **headers))[0]

    assert await signed("/api/tags", now) == 200
    assert await signed("/api/version", now - 200) == 200
    assert await signed("/api/tags", now - 400) == 401
    assert await signed("/api/tags", now + 400) == 401
    assert await signed("/api/tags", now, signs=f"POST,/api/tags?ts={now}") == 401
    assert await signed("/api/tags", now, signs=f"GET,/api/ps?ts={now}") == 401
    assert await signed("/api/tags", now, signs=f"GET,/api/tags?ts={now - 1}") == 401
    other = ed25519.Ed25519PrivateKey.generate()
    assert await signed("/api/tags", now, by=other) == 401
    agent = {"User-Agent": "ollama/0.33.0"}
    assert await signed("/api/tags", now - 400, **agent) == 403
    for broken in ("AAAA:", "AAAA:x", f"{public.split()[1]}:", f"{public.split()[1]}:AAAA"):
        sent = {"Authorization": broken}
        assert (await asked(coordinator, f"/api/tags?ts={now}", **sent))[0] == 401
    coordinator.parts.access.keys.revoke("laptop")
    assert await signed("/api/tags", now) == 401


async def made_of(coordinator: Running, public: str) -> None:
    status, body = await coordinator.post("/api/keys", {"name": "laptop", "ssh": public})
    assert (status, body["key"]) == (201, "")


@pytest.mark.spec("ACCESS-19")
async def test_without_its_library_a_public_key_is_refused(
    coordinator: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signature, "CAN_VERIFY", False)
    ssh = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAA"
    status, body = await coordinator.post("/api/keys", {"name": "laptop", "ssh": ssh})
    assert status == 400
    assert "ollama-coordinator[tls]" in body["error"]
