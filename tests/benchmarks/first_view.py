"""How long the dashboard takes to show the fleet, and where the time goes.

A coordinator as a process of its own with so many agents, the page opened anew by a fresh browser
context each time. Medians in milliseconds since the navigation began:
`python tests/benchmarks/first_view.py --agents 3 200 --runs 7`.
"""

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
from playwright.async_api import Browser, async_playwright
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from support import programs
from support.browser import SWITCHES, chromium
from support.ollama import StandIn

GIB = 1024**3
MODELS = ("llama3.2", "qwen3:8b", "gemma3:12b", "nomic-embed-text")

# What the page itself does not tell: when the picture came, and when agents were on the screen.
WATCH = """
window.seen = {};
const Real = window.EventSource;
window.EventSource = class extends Real {
  constructor(...rest) {
    super(...rest);
    seen.stream = performance.now();
    this.addEventListener("snapshot", (event) => {
      seen.snapshot ??= performance.now();
      seen.bytes ??= event.data.length;
    });
  }
};
const look = () => {
  if (!document.querySelector("article.agent, tr.agent-row")) return requestAnimationFrame(look);
  seen.drawn = performance.now();
  setTimeout(() => { seen.painted = performance.now(); });
};
requestAnimationFrame(look);
"""
TOLD = """() => {
  const files = performance.getEntriesByType("resource").filter((one) => one.name.endsWith(".js"));
  return {
    ...seen,
    page: performance.getEntriesByType("navigation")[0].responseEnd,
    modules: Math.max(...files.map((one) => one.responseEnd)),
    nodes: document.querySelectorAll("*").length,
  };
}"""
COLUMNS = ("page", "modules", "stream", "snapshot", "drawn", "painted", "bytes", "nodes")


async def fill(url: str, ollama: StandIn, agents: int) -> None:
    """Register so many agents, each with something loaded."""
    async with aiohttp.ClientSession() as session:
        for number in range(agents):
            facts = {
                "machine_name": f"machine-{number:03}", "ollama_version": "0.33.0",
                "ip_address": f"127.0.{number // 250}.{number % 250 + 1}",
                "ollama_port": ollama.port, "machine_id": f"m{number}",
            }  # fmt: skip
            async with session.post(f"{url}/api/agents", json=facts) as response:
                agent_id = (await response.json())["agent_id"]
            async with session.post(f"{url}/api/health", json=report(agent_id, number)) as response:
                assert response.status == 200, await response.text()


def report(agent_id: str, number: int) -> dict[str, Any]:
    """A heartbeat of one of many unlike machines."""
    rows = [{"name": name, "digest": name, "size": 2 * 10**9} for name in MODELS]
    loaded = [{**row, "size_vram": row["size"]} for row in rows[: number % 4]]
    gpu = {
        "name": "GeForce RTX 4090", "memory_total_bytes": 24 * GIB,
        "memory_used_bytes": (number % 20 + 1) * GIB, "utilization_percent": number % 100,
        "temperature_celsius": 40 + number % 50,
    }  # fmt: skip
    return {
        "agent_id": agent_id, "cpu_usage": number % 100, "memory_usage": 30 + number % 60,
        "active_requests": 0, "memory_total_bytes": 64 * GIB, "gpus": [gpu] if number % 5 else [],
        "tags": {"models": rows}, "ps": {"models": loaded}, "disk_free_bytes": 10**11,
    }  # fmt: skip


async def visit(browser: Browser, url: str) -> dict[str, float]:
    """One cold visit."""
    context = await browser.new_context(viewport={"width": 1440, "height": 900})
    try:
        page = await context.new_page()
        await page.add_init_script(WATCH)
        await page.goto(f"{url}/dashboard", wait_until="commit")
        while not await page.evaluate("window.seen.painted"):
            await asyncio.sleep(0.05)
        return dict(await page.evaluate(TOLD))
    finally:
        await context.close()


async def main(counts: list[int], runs: int) -> None:
    """Print a line for each size of the fleet."""
    table = Table("agents", *COLUMNS, title=f"medians of {runs}, ms since the navigation began")
    async with async_playwright() as playwright, StandIn(list(MODELS), host="0.0.0.0") as ollama:
        browser = await playwright.chromium.launch(executable_path=chromium(), args=SWITCHES)
        for agents in counts:
            with tempfile.TemporaryDirectory(prefix="ollama-coordinator-") as folder:
                started = programs.coordinator(Path(folder), programs.free_port())
                async with started as (url, _):
                    await fill(url, ollama, agents)
                    await visit(browser, url)
                    told = [await visit(browser, url) for _ in range(runs)]
            medians = [median(one.get(name, 0) for one in told) for name in COLUMNS]
            table.add_row(str(agents), *(f"{value:.0f}" for value in medians))
        await browser.close()
    Console().print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--agents", type=int, nargs="+", default=[3, 50, 200])
    parser.add_argument("--runs", type=int, default=7)
    arguments = parser.parse_args()
    asyncio.run(main(arguments.agents, arguments.runs))
