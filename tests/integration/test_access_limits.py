"""Limits of keys: counted from leases, and kept over a restart."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from ollama_coordinator.access import (
    NOBODY,
    Caller,
    Denied,
    KeyLimits,
    KeyUsage,
    NewKey,
    limits_of_names,
)
from ollama_coordinator.db import Store, database_of
from support.coordinator import Running, running
from support.ollama import StandIn

CHAT = {"model": "llama3.2", "messages": [{"role": "user", "content": "hi"}], "stream": False}


def key_of(coordinator: Running, name: str = "anna", **limits: Any) -> dict[str, str]:
    wanted = NewKey(name=name, limits=KeyLimits(**limits))
    _, text = coordinator.parts.access.keys.create(wanted)
    return {"Authorization": f"Bearer {text}"}


async def chat(
    coordinator: Running, headers: dict[str, str], path: str = "/api/chat", **more: Any
) -> tuple[int, dict[str, str], Any]:
    async with coordinator.session.post(
        coordinator.url + path, json={**CHAT, **more}, headers=headers
    ) as answer:
        return answer.status, dict(answer.headers), await answer.json(content_type=None)


@pytest.mark.spec("ACCESS-20")
async def test_requests_a_minute(coordinator: Running, ollama: StandIn) -> None:
    headers = key_of(coordinator, requests_per_minute=2)
    assert [(await chat(coordinator, headers))[0] for _ in range(2)] == [200, 200]
    status, sent, body = await chat(coordinator, headers)
    assert status == 429
    assert 0 < int(sent["Retry-After"]) <= 60
    assert "2 requests a minute" in body["error"]
    for path in ("/v1/chat/completions", "/v1/messages"):
        status, _, body = await chat(coordinator, headers, path, max_tokens=5)
        assert (status, body["error"]["type"]) == (429, "rate_limit_error")
    assert (await chat(coordinator, key_of(coordinator, "ben")))[0] == 200
    last = coordinator.parts.observation.journal.recent[-2].request
    assert (last.http_status, last.client) == (429, "anna")


@pytest.mark.spec("ACCESS-20")
async def test_requests_at_a_time(coordinator: Running, ollama: StandIn) -> None:
    headers = key_of(coordinator, concurrent=1)
    async with coordinator.session.post(
        f"{coordinator.url}/api/chat",
        json={**CHAT, "stream": True, "options": {"num_predict": 100_000}},
        headers=headers,
    ) as streamed:
        await streamed.content.readany()
        assert (await chat(coordinator, headers))[0] == 429
        streamed.close()
    await coordinator.until(coordinator.at_rest)
    await coordinator.until(lambda: not coordinator.parts.observation.journal.live)
    assert (await chat(coordinator, headers))[0] == 200


@pytest.mark.spec("ACCESS-20")
@pytest.mark.parametrize("limits", [{"tokens_per_day": 5}, {"gpu_seconds_per_day": 1e-6}])
async def test_a_day_counts_over_restarts(tmp_path: Path, limits: dict[str, Any]) -> None:
    url = f"sqlite://{tmp_path}/a.db"
    async with StandIn() as ollama:
        async with running(database_url=url) as coordinator:
            await coordinator.register(ollama)
            headers = key_of(coordinator, **limits)
            assert (await chat(coordinator, headers))[0] == 200
            status, sent, _ = await chat(coordinator, headers)
            assert status == 429
            assert int(sent["Retry-After"]) >= 1
        async with running(database_url=url) as coordinator:
            assert (await chat(coordinator, headers))[0] == 429


@pytest.mark.spec("ACCESS-20")
async def test_many_at_once_do_not_pass_a_limit_together(
    coordinator: Running, ollama: StandIn
) -> None:
    headers = key_of(coordinator, tokens_per_day=300)
    statuses = await asyncio.gather(*(chat(coordinator, headers) for _ in range(12)))
    assert sorted({status for status, _, _ in statuses}) == [200, 429]
    assert sum(status == 200 for status, _, _ in statuses) <= 2


@pytest.mark.spec("ACCESS-20")
async def test_what_gets_nothing_pays_nothing(coordinator: Running, ollama: StandIn) -> None:
    headers = key_of(coordinator, tokens_per_day=1000)
    for _ in range(5):
        status, _, _ = await chat(coordinator, headers, model="none")
        assert status == 404
    key = coordinator.parts.access.keys.find("anna")
    assert coordinator.parts.access.usage.tokens_today(key) == 0
    assert (await chat(coordinator, headers))[0] == 200
    assert coordinator.parts.access.usage.tokens_today(key) > 0


@pytest.mark.spec("ACCESS-20")
async def test_each_name_that_a_pattern_means_has_its_own_limits(tmp_path: Path) -> None:
    limits = "*@School.example tokens_per_day=5, guest* requests_per_minute=1"
    url = f"sqlite://{tmp_path}/a.db"
    async with StandIn() as ollama:
        async with running(database_url=url, limits=limits) as coordinator:
            await coordinator.register(ollama)
            wanted = NewKey(name="chat page", names_users=True)
            _, text = coordinator.parts.access.keys.create(wanted)
            page = {"Authorization": f"Bearer {text}"}

            async def status(user: str) -> int:
                headers = {**page, "X-OpenWebUI-User-Email": user}
                return (await chat(coordinator, headers))[0]

            assert [await status("Anna@school.example") for _ in range(2)] == [200, 429]
            assert [await status("ben@school.example") for _ in range(2)] == [200, 429]
            assert [await status("carl@example.org") for _ in range(3)] == [200] * 3
            assert [await status("guest 7") for _ in range(2)] == [200, 429]
            headers = {**page, "X-OpenWebUI-User-Email": "guest 7"}
            _, sent, body = await chat(coordinator, headers)
            assert body["error"] == "'guest 7' has reached the limit of 1 requests a minute"
            assert int(sent["Retry-After"]) > 0
            url_of_settings = f"{coordinator.url}/api/settings"
            async with coordinator.session.patch(url_of_settings, json={"limits": "x"}) as answer:
                assert answer.status == 400
            async with coordinator.session.patch(url_of_settings, json={"limits": "g a=1"}) as bad:
                assert bad.status == 400
            wanted_limits = {"limits": "*@school.example tokens_per_day=5"}
            async with coordinator.session.patch(url_of_settings, json=wanted_limits) as answer:
                assert answer.status == 200
            assert await status("guest 7") == 200
            assert await status("anna@school.example") == 429
        async with running(database_url=url) as coordinator:
            assert await status("anna@school.example") == 429


def test_names_whose_use_is_counted_are_few() -> None:
    usage = KeyUsage(Store(database_of("sqlite://:memory:")))
    usage.of_names = limits_of_names("* concurrent=1")
    callers = [Caller(client=NOBODY.client, name=f"{n}") for n in range(5000)]
    with usage.admitted(callers[0], 1, 1):
        for caller in callers[1:]:
            with usage.admitted(caller, 1, 1):
                pass
        assert len(usage._used) <= 4096
        with pytest.raises(Denied), usage.admitted(callers[0], 1, 1):
            pass
