"""The event stream and the page's files, without a browser."""

import asyncio
import re
import shutil
from pathlib import Path
from typing import Any

import aiohttp
import pytest

import ollama_coordinator
from ollama_coordinator.api.own.dashboard import all_files
from ollama_coordinator_common.types import AgentId
from support.coordinator import Running, running
from support.deadline import DEADLINE_SECONDS
from support.ollama import StandIn
from support.viewer import viewing

FOLDER = Path(ollama_coordinator.__file__).parent / "dashboard"


# ── the event stream ──────────────────────────────────────────────────────────────────────────


@pytest.mark.spec("DASH-18")
async def test_the_picture_equals_the_api(coordinator: Running, ollama: StandIn) -> None:
    async with viewing(coordinator.url) as viewer:
        assert viewer.events == ["snapshot"]
        ollama.hold(after=2)
        async with coordinator.stream() as answer:
            await answer.content.readline()
            await viewer.until(lambda s: [r["tokens"] for r in s["requests"].values()] == [2])
            (listed,) = await coordinator.get("/api/requests")
            (agent,) = await coordinator.get("/api/agents")
            shown = viewer.state["requests"][listed["id"]]
            for name in ("state", "model", "client", "agent", "arrived_at", "tokens"):
                assert shown[name] == listed[name], name
            row = viewer.state["agents"][agent["id"]]
            for name in ("status", "in_flight", "url", "last_seen", "ollama_version"):
                assert row[name] == agent[name], name
            assert viewer.state["fleet"]["in_flight"] == agent["in_flight"] == 1
            ollama.release()
            await answer.read()
        await viewer.until(lambda s: not s["requests"] and s["finished"])
        (row,) = (await coordinator.get("/api/history"))["requests"]
        assert viewer.state["finished"][row["id"]]["output_tokens"] == row["output_tokens"]


@pytest.mark.spec("DASH-18")
async def test_every_viewer_ends_with_the_same_picture(coordinator: Running) -> None:
    async with viewing(coordinator.url) as early, StandIn() as ollama:
        agent = await coordinator.register(ollama, "first")
        await early.until(lambda s: agent in s["agents"])
        async with viewing(coordinator.url) as late:
            url = f"{coordinator.url}/api/agents/{agent}"
            await coordinator.session.patch(url, json={"notes": "under the desk"})
            for viewer in (early, late):
                await viewer.until(lambda s: s["agents"][agent]["notes"] == "under the desk")
            await coordinator.session.delete(url)
            for viewer in (early, late):
                await viewer.until(lambda s: not s["agents"])
            assert early.events.count("snapshot") == late.events.count("snapshot") == 1


@pytest.mark.spec("DASH-19")
async def test_a_viewer_that_returns_gets_what_it_missed(coordinator: Running) -> None:
    async with viewing(coordinator.url) as viewer:
        seen, state = viewer.last_id, viewer.state
    async with StandIn() as ollama:
        agent = await coordinator.register(ollama, "meanwhile")
        async with viewing(coordinator.url, seen) as again:
            assert again.events == ["patch"]
            assert agent in again.state["agents"]
            assert agent not in state["agents"]


@pytest.mark.spec("DASH-19")
@pytest.mark.parametrize("last_id", ["0000abcd-3", "nonsense", "-1", "x-y"])
async def test_a_viewer_of_another_process_gets_a_snapshot(
    coordinator: Running, last_id: str
) -> None:
    async with viewing(coordinator.url, last_id) as viewer:
        assert viewer.events == ["snapshot"]


@pytest.mark.spec("DASH-21")
async def test_the_stream_ends_when_the_coordinator_begins_to_stop(coordinator: Running) -> None:
    async with viewing(coordinator.url) as viewer:
        coordinator.parts.begin_stopping()
        async with asyncio.timeout(DEADLINE_SECONDS):
            while await viewer.next():
                pass
        assert viewer.ended


@pytest.mark.spec("DASH-20")
async def test_a_viewer_that_left_is_forgotten(coordinator: Running) -> None:
    feed = coordinator.parts.feed
    async with viewing(coordinator.url), viewing(coordinator.url):
        assert feed.viewers == 2
    await coordinator.until(lambda: feed.viewers == 0)


async def test_an_event_stream_asked_for_its_head_ends(coordinator: Running) -> None:
    async with coordinator.session.head(f"{coordinator.url}/dashboard/events") as response:
        assert response.status == 200
        assert response.content_type == "text/event-stream"


# ── the page ──────────────────────────────────────────────────────────────────────────────────

BROWSER = {"accept": "text/html,application/xhtml+xml;q=0.9,*/*;q=0.8"}


@pytest.mark.spec("DASH-23")
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_browser_is_sent_to_the_dashboard_and_nobody_else(
    coordinator: Running, method: str
) -> None:
    ask = coordinator.session.request
    async with ask(method, coordinator.url, headers=BROWSER, allow_redirects=False) as response:
        assert response.status == 307
        assert response.headers["location"] == "dashboard"
        assert await response.text() == ("Ollama is running" if method == "GET" else "")
    for headers in ({}, {"accept": "*/*"}, {"accept": "application/json"}):
        async with ask(method, coordinator.url, headers=headers) as response:
            assert response.status == 200
            assert await response.text() == ("Ollama is running" if method == "GET" else "")


@pytest.mark.spec("DASH-48")
async def test_the_page_works_below_a_path_of_a_reverse_proxy(coordinator: Running) -> None:
    session, url = coordinator.session, coordinator.url
    for prefix, location in (("/gpu/ai/", "/gpu/ai/dashboard"), ("//evil.example", "dashboard")):
        headers = {**BROWSER, "x-forwarded-prefix": prefix}
        async with session.get(url, headers=headers, allow_redirects=False) as response:
            assert response.headers["location"] == location
    async with session.get(f"{url}/dashboard/", allow_redirects=False) as response:
        assert response.headers["location"] == "../dashboard"
    assert "Ollama is running" in read("index.html")
    absolute = re.compile(r"""(?:fetch|import|EventSource)\(["'`]/|(?:src|href)="/|VENDOR = "/""")
    for path, file in all_files().items():
        if not path.startswith("vendor/"):
            assert absolute.search(file.body.decode()) is None, path


async def fetch(coordinator: Running, path: str, **headers: str) -> aiohttp.ClientResponse:
    async with coordinator.session.get(f"{coordinator.url}{path}", headers=headers) as response:
        await response.read()
        return response


@pytest.mark.spec("DASH-24")
async def test_files_are_tagged_and_not_sent_twice(coordinator: Running) -> None:
    for path in ("/dashboard", "/dashboard/js/app.js", "/dashboard/vendor/uplot-1.6.32.js"):
        first = await fetch(coordinator, path)
        assert first.status == 200
        again = await fetch(coordinator, path, **{"if-none-match": first.headers["etag"]})
        assert again.status == 304
        plain = await fetch(coordinator, path, **{"accept-encoding": "identity"})
        assert plain.headers["etag"] != first.headers["etag"]
        assert ("immutable" in first.headers["cache-control"]) is ("vendor" in path)
    assert (await fetch(coordinator, "/dashboard/../app.py")).status == 404
    assert (await fetch(coordinator, "/dashboard/nonesuch.js")).status == 404


@pytest.mark.spec("DASH-25")
async def test_nothing_comes_from_elsewhere(coordinator: Running) -> None:
    page = await fetch(coordinator, "/dashboard")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["referrer-policy"] == "no-referrer"
    for path, file in all_files().items():
        if path.startswith("vendor/"):
            continue
        hosts = set(
            re.findall(rb"(?:src|href|url|from|import)[\s=(\"'`]+https?://([^/\"'`\s]+)", file.body)
        )
        assert hosts == set(), path


@pytest.mark.spec("DASH-25")
def test_the_page_has_no_script_or_style_in_it() -> None:
    html = (FOLDER / "index.html").read_text("utf-8")
    assert re.findall(r"<script(?![^>]*src=)", html) == []
    assert re.findall(r"<style|style=|\son\w+=", html) == []


def imports(path: str) -> set[str]:
    """A module and all it imports at once, by their paths."""
    found = {path}
    for target in re.findall(
        r'^import .*?"(\.[^"]+)"|^} from "(\.[^"]+)"', read(path), re.MULTILINE
    ):
        found |= imports(resolve(path, next(filter(None, target))))
    return found


def read(path: str) -> str:
    return all_files()[path].body.decode()


def resolve(path: str, target: str) -> str:
    return (FOLDER / path).parent.joinpath(target).resolve().relative_to(FOLDER).as_posix()


@pytest.mark.spec("DASH-26")
def test_the_first_view_is_small() -> None:
    first = {"index.html", "icon.svg", *imports("js/app.js"), *imports("js/views/fleet.js")}
    first |= {path for path in all_files() if path.startswith("css/")}
    sizes = {path: len(all_files()[path].packed or all_files()[path].body) for path in first}
    assert len(first) > 15
    assert sum(sizes.values()) < 100_000
    everything = {path for path in all_files() if not path.startswith("vendor/")}
    assert sum(len(all_files()[p].packed or all_files()[p].body) for p in everything) < 100_000


def test_the_first_views_modules_are_fetched_at_once() -> None:
    first = imports("js/app.js") | imports("js/views/fleet.js")
    named = re.findall(r'(?:src|modulepreload" href)="dashboard/([^"]+)"', read("index.html"))
    assert sorted(named) == sorted(first)


URLS = """
for (const [page, address] of [
  ["http://localhost:8080/", "192.0.2.7"],
  ["http://127.0.0.1:8080/dashboard", "192.0.2.7"],
  ["http://[::1]:8080/", "[2001:db8::7]"],
  ["http://localhost/", "192.0.2.7"],
  ["http://localhost:8080/", undefined],
  ["http://gpu-1:8080/", "192.0.2.7"],
  ["https://coordinator.example/", undefined],
  ["https://example/gpu/dashboard", undefined],
]) console.log(urlForOthers(new URL(page), address))
"""


@pytest.mark.spec("DASH-35")
async def test_a_page_on_loopback_shows_the_address_that_others_need() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no Node.js here")
    process = await asyncio.create_subprocess_exec(
        *(node, "--input-type=module", "-"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(DEADLINE_SECONDS):
        said, _ = await process.communicate((read("js/parts/address.js") + URLS).encode())
    assert said.decode().split() == [
        "http://192.0.2.7:8080",
        "http://192.0.2.7:8080",
        "http://[2001:db8::7]:8080",
        "http://192.0.2.7",
        "http://THIS-HOST:8080",
        "http://gpu-1:8080",
        "https://coordinator.example",
        "https://example/gpu",
    ]


@pytest.mark.spec("DASH-35")
@pytest.mark.parametrize(("bound", "told"), [("127.0.0.1", None), ("192.0.2.7", "192.0.2.7")])
async def test_the_page_gets_the_address_where_others_reach_the_coordinator(
    bound: str, told: str | None
) -> None:
    async with running(host=bound) as coordinator, viewing(coordinator.url) as viewer:
        assert viewer.state["coordinator"].get("address") == told


@pytest.mark.spec("DASH-27")
def test_vendored_libraries_have_their_licence() -> None:
    vendored = [path for path in (FOLDER / "vendor").iterdir() if path.suffix == ".js"]
    assert vendored
    for library in vendored:
        assert re.search(r"-\d+\.\d+\.\d+$", library.stem), "the version is in the name"
        assert "MIT" in library.with_name(f"{library.stem}-LICENSE.txt").read_text("utf-8")


@pytest.mark.spec("DASH-28")
def test_no_module_parses_markup() -> None:
    for path, file in all_files().items():
        if path.endswith(".js") and not path.startswith("vendor/"):
            sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function"
            assert re.findall(sinks, file.body.decode()) == [], path


@pytest.mark.spec("DASH-30")
async def test_an_agents_details(coordinator: Running, ollama: StandIn) -> None:
    await coordinator.chat()
    with ollama.faults.fin():
        await coordinator.chat()
    (agent,) = await coordinator.get("/api/agents")
    details = await coordinator.get(f"/api/agents/{agent['id']}/details")
    assert details["agent"]["name"] == "first"
    (model,) = details["models"]
    assert (model["name"], model["loaded"]) == ("llama3.2:latest", True)
    events: list[dict[str, Any]] = details["events"]
    assert "agent out of rotation" in [event["event"] for event in events]
    async with coordinator.session.get(f"{coordinator.url}/api/agents/nobody/details") as response:
        assert response.status == 404


@pytest.mark.spec("DASH-18")
async def test_operations_on_models_are_in_the_snapshot() -> None:
    async with running() as coordinator, StandIn() as ollama:
        await coordinator.register(ollama, "first")
        async with viewing(coordinator.url) as viewer:
            status, _ = await coordinator.post(
                "/api/operations", {"kind": "load", "model": "llama3.2"}
            )
            assert status == 202
            await viewer.until(lambda s: [o["state"] for o in s["operations"].values()] == ["done"])


@pytest.mark.spec("DASH-33")
async def test_sparklines_go_on_after_a_restart(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/fleet.db"
    async with StandIn() as ollama:
        async with running(database_url=database) as coordinator:
            agent = await coordinator.register(ollama, "first")
            assert (await coordinator.chat())[0] == 200
            observation = coordinator.parts.observation
            observation.sampler.sparklines.number = 0
            observation.sampler.sample(observation.journal.live)
            before = observation.sampler.sparklines.agents[AgentId(agent)][-1]
            assert before > 0
        async with running(database_url=database) as coordinator:
            async with viewing(coordinator.url) as viewer:
                assert round(before, 1) in viewer.extra["sparks"]["agents"][agent]
                assert round(before, 1) in viewer.extra["sparks"]["fleet"]


def luminance(colour: str) -> float:
    """WCAG 2.1's relative luminance of `#rrggbb`."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_models_name_can_be_read_on_each_of_the_colours() -> None:
    css = (FOLDER / "css" / "views.css").read_text("utf-8")
    pairs = re.findall(r"--series-\d: light-dark\((#\w+), (#\w+)\)", css)
    assert len(pairs) == 8
    for light, dark in pairs:
        assert 1.05 / (luminance(light) + 0.05) >= 4.5, light
        assert (luminance(dark) + 0.05) / (luminance("#0c0f13") + 0.05) >= 4.5, dark
