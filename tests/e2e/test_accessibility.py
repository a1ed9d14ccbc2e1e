"""Every page as axe-core judges it: light and dark, wide and on a phone.

`AXE_CORE` names axe-core's `axe.min.js`, from `npm pack axe-core`; without it there is nothing to
ask.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright")

from support.browser import Visit, chromium, visiting
from support.coordinator import Running, running
from support.ollama import StandIn

AXE = Path(os.environ.get("AXE_CORE", "axe.min.js"))
SIZES = {"wide": (1280, 900), "phone": (390, 844)}
GPU = {"name": "GeForce", "memory_total_bytes": 2**34, "memory_used_bytes": 2**33}

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(300),
    pytest.mark.skipif(chromium() is None, reason="no Chromium here"),
    pytest.mark.skipif(not AXE.exists(), reason="AXE_CORE names no axe.min.js"),
]


async def violations(visit: Visit) -> list[tuple[str, list[str]]]:
    """What axe-core finds on the page: the rule, and the elements."""
    # By the debugger: the page's own content policy lets no other script in.
    devtools = await visit.page.context.new_cdp_session(visit.page)
    await devtools.send("Runtime.evaluate", {"expression": AXE.read_text("utf-8")})
    run = "axe.run(document).then((found) => JSON.stringify(found.violations))"
    asked = {"expression": run, "awaitPromise": True, "returnByValue": True}
    answer: Any = await devtools.send("Runtime.evaluate", asked)
    found = json.loads(answer["result"]["value"])
    return [(one["id"], [node["html"] for node in one["nodes"]]) for one in found]


async def filled(coordinator: Running, ollama: StandIn) -> list[str]:
    """Something on every page; the pages' addresses."""
    agent = await coordinator.register(ollama, "first")
    await coordinator.heartbeat(agent, gpus=[GPU], disk_free_bytes=10**11)
    away = await coordinator.register(ollama, "away", ollama_port=9)
    await coordinator.heartbeat(away, leaving=True, gpus=[GPU])
    await coordinator.chat()
    await coordinator.chat("none")
    await coordinator.post("/api/aliases", {"name": "fast", "models": ["llama3.2"]})
    await coordinator.post("/api/keys", {"name": "anna"})
    return [
        "fleet", "now", "attention", "models", "model/llama3.2", "history", "usage", "try",
        "access", "audit", "settings", f"agents/{agent}",
    ]  # fmt: skip


@pytest.mark.spec("DASH-78")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
async def test_axe_core_has_nothing_to_say(scheme: str, size: str) -> None:
    width, height = SIZES[size]
    context = {"color_scheme": scheme, "viewport": {"width": width, "height": height}}
    async with running() as coordinator, StandIn() as ollama:
        views = await filled(coordinator, ollama)
        async with visiting(coordinator.url, **context) as visit:
            for view in views:
                await visit.open(view)
                await visit.page.wait_for_load_state("networkidle")
                assert await violations(visit) == [], view
                await visit.page.goto("about:blank")
