"""Every page fits its window, whatever machines and models are called, and says nothing odd."""

import re
from urllib.parse import quote

import pytest

pytest.importorskip("playwright")

from playwright.async_api import expect

from support.browser import chromium, visiting
from support.coordinator import Running, running
from support.ollama import StandIn

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(300),
    pytest.mark.skipif(chromium() is None, reason="no Chromium here"),
]

NAME = "a-workstation-with-a-very-long-name.physics.example.edu"
MODEL = "hf.co/somebody/A-Model-With-A-Very-Long-Name-24B-Instruct-2506-GGUF:Q4_K_M"
KEY = "a-service-with-a-long-name@data-center.example.org"
GPU = {"name": "NVIDIA GeForce RTX 4090 Laptop GPU", "memory_total_bytes": 2**34}
SIZES = {"desktop": (1440, 900), "small": (1280, 720), "phone": (390, 844)}

TOO_WIDE = """() => [document.documentElement, ...document.querySelectorAll(".table-box, main")]
  .filter((one) => one.scrollWidth > one.clientWidth + 1)
  .map((one) => `${one.tagName} ${one.querySelector("caption")?.textContent ?? ""}`)"""
"""What has to be scrolled sideways."""

TOO_TALL = "() => document.documentElement.scrollHeight - innerHeight"
"""The page itself is as tall as the window: its main part scrolls."""


async def filled(coordinator: Running, ollama: StandIn) -> dict[str, str]:
    """A fleet with long names; the pages' addresses, and what each shows once it has come."""
    agent = await coordinator.register(ollama, NAME, platform="Linux 6.1 x86_64")
    for number in range(2):
        away = await coordinator.register_at(9 + number, f"{NAME}-{number}")
        await coordinator.heartbeat(away, leaving=True, gpus=[GPU])
    facts = {"gpus": [GPU, GPU], "disk_free_bytes": 10**9, "memory_total_bytes": 2**36}
    await coordinator.heartbeat(agent, **facts)
    change = {"labels": ["a-label-that-is-rather-long"], "notes": NAME}
    await coordinator.session.patch(f"{coordinator.url}/api/agents/{agent}", json=change)
    for _ in range(3):
        assert (await coordinator.chat(MODEL))[0] == 200
    await coordinator.chat("none")
    await coordinator.post("/api/aliases", {"name": "fast", "models": [MODEL, "llama3.2"]})
    await coordinator.post("/api/operations", {"kind": "pull", "model": MODEL, "placement": "all"})
    await coordinator.post("/api/keys", {"name": KEY})
    return {
        "fleet": NAME, "now": "/api/chat", "attention": "Its disk has 1.0 GB left",
        "models": "fast", f"models/{quote(MODEL, safe='')}": "127.0.0.1", "history": "/api/chat",
        "history?show=charts": "tokens per second", "usage": "127.0.0.1", "try": "Ask a model",
        "access": KEY, "audit": NAME, "settings": "COORDINATOR_WEBHOOK",
        f"agents/{agent}": "/api/chat",
    }  # fmt: skip


@pytest.mark.spec("DASH-79")
@pytest.mark.parametrize("size", SIZES)
async def test_no_page_is_wider_or_taller_than_its_window_or_shows_a_value_that_is_none(
    size: str,
) -> None:
    width, height = SIZES[size]
    async with running() as coordinator, StandIn((MODEL, "llama3.2:latest")) as ollama:
        views = await filled(coordinator, ollama)
        async with visiting(coordinator.url, viewport={"width": width, "height": height}) as visit:
            for view, text in views.items():
                await visit.open(view)
                await expect(visit.page.locator("main")).to_contain_text(text)
                assert await visit.page.evaluate(TOO_WIDE) == [], view
                assert await visit.page.evaluate(TOO_TALL) <= 0, view
                shown = await visit.page.locator("body").inner_text()
                assert not re.search(r"\b(null|undefined|NaN|Infinity)\b|\[object", shown), view
            assert visit.troubles == []


@pytest.mark.spec("DASH-79")
async def test_what_is_cut_is_told_whole_to_who_points_at_it(coordinator: Running) -> None:
    async with StandIn((MODEL,)) as ollama:
        await coordinator.register(ollama, NAME)
        assert (await coordinator.chat(MODEL))[0] == 200
        async with visiting(coordinator.url, viewport={"width": 1280, "height": 720}) as visit:
            await visit.open("history")
            cell = visit.page.locator("td.clip").get_by_text(NAME)
            await cell.hover()
            await expect(cell).to_have_attribute("title", NAME)


async def test_each_view_has_its_digit_and_the_help_says_which(coordinator: Running) -> None:
    async with visiting(coordinator.url) as visit:
        await visit.open("fleet")
        await visit.page.keyboard.press("?")
        digits = visit.page.get_by_role("dialog").locator("tr", has_text="Settings").locator("kbd")
        await expect(digits).to_have_text("0")
        await visit.page.keyboard.press("Escape")
        await visit.page.keyboard.press("0")
        await expect(visit.page.locator("h1")).to_have_text("Settings")
