"""The dashboard in Chromium: one browser a test session, a page that tells of every trouble."""

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from playwright.async_api import Page, Request, async_playwright

from support.deadline import DEADLINE_SECONDS

SWITCHES = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip


def chromium() -> str | None:
    """The browser's path, if this machine has one."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for path in map(shutil.which, names) if path), None)


class Visit:
    """A page, what it complained about, and what it asked for."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.troubles: list[str] = []
        self.asked: list[str] = []
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.troubles.append(str(error)))
        page.on("request", self._request)

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.troubles.append(f"{message.type}: {message.text}")

    def _request(self, request: Request) -> None:
        self.asked.append(request.url)

    @property
    def foreign(self) -> list[str]:
        """Requests that left the coordinator."""
        own = (self.url, "data:", "blob:")
        return [url for url in self.asked if not url.startswith(own)]

    async def open(self, view: str) -> None:
        """Show a view by its address."""
        await self.page.goto(f"{self.url}/dashboard#/{view}")
        await self.page.wait_for_selector("main h1")


@asynccontextmanager
async def visiting(url: str, **context: Any) -> AsyncIterator[Visit]:
    """A fresh browser at the coordinator's dashboard; `context` is Playwright's."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium(), args=SWITCHES)
        try:
            opened = await browser.new_context(**context)
            opened.set_default_timeout(DEADLINE_SECONDS * 1000)
            yield Visit(await opened.new_page(), url)
        finally:
            await browser.close()
