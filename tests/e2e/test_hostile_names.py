"""What strangers call things is text in every view of the dashboard, and never a part of a page."""

import asyncio
import json
from typing import Any
from urllib.parse import quote

import pytest

pytest.importorskip("playwright")

from ollama_coordinator.access import NOBODY
from ollama_coordinator_common.protocol import RegisterRequest
from support.browser import Visit, chromium, visiting
from support.coordinator import Running, running
from support.deadline import DEADLINE_SECONDS
from support.ollama import StandIn

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(chromium() is None, reason="no Chromium here"),
]

NAME = "<img src=x onerror='window.ran=1'><script>window.ran=2</script>"
GPU = {"name": NAME, "memory_total_bytes": 2**34, "memory_used_bytes": 2**33}
FINDING = {"check": NAME, "level": "failed", "text": NAME, "remedy": NAME}


async def called_so(coordinator: Running, ollama: StandIn) -> list[str]:
    """Something of this name on every page; the pages' addresses."""
    agent = await coordinator.register(
        ollama, NAME, ollama_version=NAME, platform=NAME, agent_version=NAME
    )
    settings = {"display_name": NAME, "labels": [NAME], "notes": NAME}
    url = f"{coordinator.url}/api/agents/{agent}"
    async with coordinator.session.patch(url, json=settings) as response:
        assert response.status == 200, await response.text()
    details = {
        "family": NAME,
        "families": [NAME],
        "parameter_size": NAME,
        "quantization_level": NAME,
    }
    models = [
        {"name": name, "model": name, "size": 1, "digest": NAME, "details": details}
        for name in ("llama3.2:latest", NAME)
    ]
    said: dict[str, Any] = {
        "gpus": [GPU], "findings": [FINDING], "left_behind": NAME, "broken_models": {NAME: NAME},
        "tags": {"models": models}, "ps": {"models": [{**one, "size_vram": 1} for one in models]},
    }  # fmt: skip
    assert await coordinator.heartbeat(agent, **said) == 200
    other = await coordinator.register(ollama, "well", ollama_port=9)
    assert await coordinator.heartbeat(other, gpus=[GPU], ollama_running=False, paused=NAME) == 200
    for asked in ("llama3.2", NAME):
        async with coordinator.session.post(
            f"{coordinator.url}/api/chat",
            json={"model": asked, "messages": [{"role": "user", "content": NAME}]},
            headers={"Remote-User": NAME},
        ) as response:
            assert (response.status == 200) is (asked != NAME), await response.text()
            await response.read()
    # These say that they take no such name.
    for path, body in (
        ("/api/keys", {"name": NAME}),
        ("/api/aliases", {"name": NAME, "models": ["llama3.2"]}),
        ("/api/pull", {"model": NAME, "stream": False}),
    ):
        assert (await coordinator.post(path, body))[0] == 400
    wanted = RegisterRequest(NAME, "192.168.1.7", NAME, 11434, platform=NAME, agent_version=NAME)
    coordinator.parts.machines.ask(wanted, "5" * 64, NOBODY)
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not (await coordinator.get("/api/usage"))["usage"]:  # it is written behind
            await asyncio.sleep(0.05)
    return [
        "fleet", "now", "attention", "models", "model/llama3.2", f"model/{quote(NAME, safe='')}",
        "history", "usage", "try", "access", "audit", "settings", f"agents/{agent}",
        f"agents/{other}",
    ]  # fmt: skip


async def ran(visit: Visit) -> Any:
    """What a name has become on the page, in place of a text."""
    found = "main img, main script, dialog img, dialog script, [onerror]"
    return await visit.page.evaluate(
        f"[window.ran ?? null, document.querySelectorAll({json.dumps(found)}).length]"
    )


@pytest.mark.spec("DASH-28")
async def test_a_hostile_name_is_text_in_every_view() -> None:
    proxied: dict[str, Any] = {"trusted_proxies": ("127.0.0.1",), "user_header": ("Remote-User",)}
    async with running(**proxied) as coordinator, StandIn() as ollama:
        views = await called_so(coordinator, ollama)
        async with visiting(coordinator.url) as visit:
            shown = set()
            for view in views:
                await visit.open(view)
                await visit.page.wait_for_load_state("networkidle")
                assert await ran(visit) == [None, 0], view
                if NAME in (await visit.page.inner_text("main")):
                    shown.add(view.partition("/")[0])
                rows = visit.page.locator("main tbody tr.clickable")
                if await rows.count():
                    await rows.first.click()
                    await visit.page.wait_for_selector("dialog[open]")
                    assert await ran(visit) == [None, 0], view
                    await visit.page.keyboard.press("Escape")
                    await visit.page.wait_for_selector("dialog[open]", state="detached")
            assert shown >= {"fleet", "agents", "history", "usage", "audit", "attention"}
            assert [one for one in visit.troubles if "Failed to load" not in one] == []
