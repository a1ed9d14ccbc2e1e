"""The dashboard in a real browser: every view, every action, against a real coordinator."""

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

pytest.importorskip("playwright")

from playwright.async_api import Route, expect

from ollama_coordinator import model_probes
from ollama_coordinator.access import NewKey
from ollama_coordinator.attention import watch
from ollama_coordinator_common.join_token import JoinToken
from ollama_coordinator_common.names import model_key
from ollama_coordinator_common.network import public_address
from support.browser import Visit, chromium, visiting
from support.coordinator import Running, running
from support.deadline import DEADLINE_SECONDS
from support.demo import free_port
from support.ollama import Hardware, Model, StandIn
from support.past import crowd

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(300),
    pytest.mark.skipif(chromium() is None, reason="no Chromium here"),
]

GPU = {
    "name": "GeForce", "memory_total_bytes": 24 * 2**30, "memory_used_bytes": 3 * 10**9,
    "utilization_percent": 40, "temperature_celsius": 66,
}  # fmt: skip


@pytest.fixture
async def visit(coordinator: Running) -> AsyncIterator[Visit]:
    """A browser at an empty coordinator; whatever happens, nothing complains or leaves."""
    async with visiting(coordinator.url, viewport={"width": 1440, "height": 900}) as visit:
        yield visit
        assert visit.troubles == []
        assert visit.foreign == []


async def beat(coordinator: Running, agent: str, **more: Any) -> None:
    assert await coordinator.heartbeat(agent, gpus=[GPU], disk_free_bytes=10**11, **more) == 200


async def test_an_empty_fleet_says_what_to_type(coordinator: Running, visit: Visit) -> None:
    await visit.page.goto(coordinator.url)
    await expect(visit.page).to_have_url(f"{coordinator.url}/dashboard")
    # The page's own address, 127.0.0.1, would lead another machine to itself.
    host = public_address(coordinator.parts.settings.config.host) or "THIS-HOST"
    url = f"http://{host}:{coordinator.url.rpartition(':')[2]}"
    command = f"curl -fsSL {url}/join | sh"
    await expect(visit.page.locator("main pre").first).to_have_text(command)
    await visit.open("settings")
    shown = visit.page.locator("main pre")
    await expect(shown.first).to_have_text(command)
    await expect(shown.last).to_contain_text(f"OLLAMA_HOST={url}")


@pytest.mark.spec("JOIN-4")
async def test_a_machine_is_added_from_any_view_and_appears_while_one_looks(
    coordinator: Running, ollama: StandIn, visit: Visit
) -> None:
    page = visit.page
    for view in ("fleet", "now", "attention", "models", "history", "try", "access", "settings"):
        await visit.open(view)
        await page.get_by_role("button", name="Add a machine").click()
        dialog = page.get_by_role("dialog")
        await expect(dialog.locator("pre").first).to_contain_text("/join | sh")
        await expect(dialog.locator("pre").last).to_contain_text(re.compile(r"^irm .*/join | iex$"))
        await page.keyboard.press("Escape")
    await page.get_by_role("button", name="Add a machine").click()
    come = dialog.locator(".come li")
    await expect(dialog).to_contain_text("Waiting for the machine")
    await expect(come).to_have_count(0)  # what is in the fleet already is none that has come
    # A page without TLS, as most are, has no clipboard of its own.
    await page.evaluate(
        "Object.defineProperty(navigator, 'clipboard', {value: undefined});"
        "addEventListener('copy', () => { window.copied = String(getSelection()); })"
    )
    await dialog.get_by_role("button", name="Copy the command").first.click()
    assert await page.evaluate("window.copied") == await dialog.locator("pre").first.inner_text()
    async with StandIn() as second:
        await coordinator.register(second, "second")
        await expect(come).to_contain_text("second")
        await expect(come.locator(".pill")).to_have_text("Online")
        # For a machine of another network, a token without being asked for one.
        await dialog.get_by_role("button", name="Make a join token").click()
        await expect(dialog.locator("pre").first).to_contain_text("| AGENT_JOIN_TOKEN=oc1.")
        await come.get_by_role("link").click()
        await expect(page.locator("h1")).to_have_text("second")
        await expect(dialog).to_have_count(0)


@pytest.mark.spec("JOIN-7")
async def test_ollamas_are_added_by_their_urls(coordinator: Running, visit: Visit) -> None:
    page = visit.page
    async with StandIn() as one, StandIn() as two:
        await visit.open("fleet")
        await page.locator("main").get_by_role("button", name="Add a machine").click()
        dialog = page.get_by_role("dialog")
        await dialog.get_by_text("An Ollama without an agent").click()
        urls = dialog.get_by_label("Its URL")
        await urls.fill(f"{one.url}\nhttp://127.0.0.1:1\n{two.url}/")
        # What is refused stays in the list, and says why.
        visit.page.remove_listener("console", visit._console)  # the browser reports the 400
        await dialog.get_by_role("button", name="Add", exact=True).click()
        await expect(dialog.get_by_role("alert")).to_contain_text("cannot connect")
        await expect(urls).to_have_value("http://127.0.0.1:1")
        await expect(dialog.locator(".come li")).to_have_count(2)
        await page.keyboard.press("Escape")
        await expect(page.locator("article.agent").first).to_contain_text("Online")
    assert len(await coordinator.get("/api/agents")) == 2


@pytest.mark.spec("JOIN-5")
async def test_an_agent_that_is_older_than_the_coordinator_says_so_on_its_card(
    coordinator: Running, visit: Visit
) -> None:
    async with StandIn() as ollama:
        agent = await coordinator.register(ollama, "old", agent_version="0.0.9")
        say = re.compile(r"agent 0\.0\.9 is older than this coordinator.*-agent upgrade there")
        await visit.open("fleet")
        await expect(visit.page.locator("article.agent")).to_contain_text(say)
        await visit.open(f"agents/{agent}")
        await expect(visit.page.locator("main .notice:not(.bad)")).to_contain_text(say)
        version = visit.page.locator("main").get_by_text("is older than")
        await coordinator.register(ollama, "old", agent_version="99.0.0")
        await expect(version).to_be_hidden()


@pytest.mark.spec("FLEET-77")
@pytest.mark.spec("FLEET-78")
async def test_what_the_doctor_found_and_which_of_two_machines_it_is_are_shown(
    coordinator: Running, visit: Visit
) -> None:
    async with StandIn() as one, StandIn() as two:
        for node, machine_id in ((one, "disk-one"), (two, "disk-two")):
            agent = await coordinator.register(
                node, "a-workstation-with-a-long-name", machine_id=machine_id, agent_version="1"
            )
        clock = {"check": "clock", "level": "warning", "text": "it is wrong", "remedy": "set it"}
        await coordinator.heartbeat(agent, findings=[clock], owned=True)
        await visit.open("fleet")
        mark = visit.page.locator(".agent-name").get_by_text(f"(127.0.0.1:{two.port})")
        await expect(mark).to_be_visible()
        await visit.open(f"agents/{agent}")
        await expect(visit.page.locator(".findings li")).to_have_text("clockit is wrong→ set it")
        await expect(visit.page.locator("main h1")).to_contain_text(f"127.0.0.1:{two.port}")
        await visit.page.click("text=Restart Ollama")
        await visit.page.click("dialog button:has-text('Restart')")
        await expect(visit.page.get_by_text("at its next heartbeat")).to_be_visible()
        assert coordinator.agent(agent).restart_until is not None


@pytest.mark.spec("LINK-9")
async def test_a_card_says_that_a_machine_is_reached_by_its_link(
    coordinator: Running, visit: Visit
) -> None:
    async with StandIn() as ollama:
        agent = await coordinator.register(ollama, "far", link=True)
        await visit.open("fleet")
        card = visit.page.locator("article.agent")
        # Its own port is nobody's matter.
        await expect(card).to_contain_text("127.0.0.1 by its link")
        await expect(card).to_contain_text("its link is not open")
        await expect(card).not_to_contain_text(str(ollama.port))
        await visit.open(f"agents/{agent}")
        await expect(visit.page.locator("main")).to_contain_text("the link that its agent opens")


@pytest.mark.spec("JOIN-4")
async def test_where_keys_are_asked_for_the_line_has_a_join_token() -> None:
    async with running(access="keys") as coordinator, StandIn() as ollama:
        keys = coordinator.parts.access.keys
        _, key = keys.create(NewKey(name="anna", rights=("operate",)))
        _, watcher = keys.create(NewKey(name="ben", rights=("watch",)))
        async with visiting(coordinator.url) as visit:
            page = visit.page
            await page.goto(f"{coordinator.url}/dashboard")
            await page.get_by_label("Key").fill(key)
            await page.get_by_role("button", name="Log in").click()
            dialog = page.get_by_role("dialog")
            for _ in range(2):  # a page makes one token
                await page.locator(".add-machine").click()
                shown = dialog.locator("pre")
                await expect(shown.first).to_contain_text("AGENT_JOIN_TOKEN=oc1.")
                await expect(shown.last).to_contain_text("$env:AGENT_JOIN_TOKEN='oc1.")
                line = await shown.first.inner_text()
                await page.keyboard.press("Escape")
            assert len([one for one in keys if one.is_token]) == 1
            await page.locator(".add-machine").click()
            secret = JoinToken.parse(line.partition("TOKEN=")[2].split()[0]).secret
            facts = {
                "machine_name": "new", "ip_address": "127.0.0.1", "ollama_version": "0.33.0",
                "ollama_port": ollama.port,
            }  # fmt: skip
            async with coordinator.session.post(
                f"{coordinator.url}/api/agents", json=facts, headers={"X-Api-Key": secret}
            ) as answer:
                assert answer.status == 201
            await expect(dialog.locator(".come li")).to_contain_text("new")
        async with visiting(coordinator.url) as visit:
            page = visit.page
            await page.goto(f"{coordinator.url}/dashboard")
            await page.get_by_label("Key").fill(watcher)
            await page.get_by_role("button", name="Log in").click()
            await page.locator(".add-machine").click()
            await expect(page.locator("dialog pre").first).to_contain_text("/join | sh")
            await page.get_by_role("button", name="Make a join token").click()
            await expect(page.locator(".toast.bad")).to_contain_text("'operate'")


async def test_every_view_shows_without_complaint(
    coordinator: Running, ollama: StandIn, visit: Visit
) -> None:
    await coordinator.chat()
    for view in ("fleet", "now", "attention", "models", "history", "try", "settings"):
        await visit.open(view)
        await expect(visit.page.locator(f".nav [data-view={view}]")).to_have_attribute(
            "aria-current", "page"
        )
    await visit.page.keyboard.press("1")
    await expect(visit.page.locator("h1")).to_have_text("Fleet")
    await visit.page.click("article.agent .agent-name")
    await expect(visit.page.locator("h1")).to_have_text("first")
    await expect(visit.page.locator("oc-chart canvas").first).to_be_visible()


@pytest.mark.spec("DASH-28")
async def test_a_machine_called_script_stays_a_name(coordinator: Running, visit: Visit) -> None:
    name = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    async with StandIn() as ollama:
        agent = await coordinator.register(ollama, name)
        url = f"{coordinator.url}/api/agents/{agent}"
        await coordinator.session.patch(url, json={"labels": ["<b>bold</b>"], "notes": name})
        await visit.open("fleet")
        await expect(visit.page.locator(".agent-name")).to_have_text(name)
        await expect(visit.page.locator(".labels .tag")).to_have_text("<b>bold</b>")
        for view in ("models", f"agents/{agent}", "try"):
            await visit.open(view)
        assert await visit.page.locator("main script, main img").count() == 0


async def test_agents_are_drained_renamed_and_removed(
    coordinator: Running, ollama: StandIn, visit: Visit
) -> None:
    page = visit.page
    await visit.open("fleet")
    card = page.locator("article.agent")
    await card.locator("button[aria-haspopup]").click()
    await page.get_by_role("menuitem", name="Drain").click()
    await expect(card.locator(".pill").first).to_have_text("Draining")
    await card.locator("button[aria-haspopup]").click()
    await page.get_by_role("menuitem", name="Edit").click()
    await page.get_by_label("Display name").fill("the big one")
    await page.get_by_label("Labels").fill("gpu, upstairs")
    await page.get_by_role("button", name="Save").click()
    await expect(card.locator(".agent-name")).to_have_text("the big one")
    (agent,) = await coordinator.get("/api/agents")
    assert agent["labels"] == ["gpu", "upstairs"]
    await card.locator("button[aria-haspopup]").click()
    await page.get_by_role("menuitem", name="Remove").click()
    await page.get_by_role("dialog").get_by_role("button", name="Remove").click()
    await expect(page.locator(".empty h2")).to_have_text("No machine yet")


async def test_a_running_request_is_shown_explained_and_cancelled(
    coordinator: Running, ollama: StandIn, visit: Visit
) -> None:
    page = visit.page
    ollama.hold(after=3)
    async with coordinator.stream() as answer:
        await answer.content.readline()
        await visit.open("now")
        row = page.locator("tbody tr.clickable").first
        await expect(row).to_contain_text("Writing")
        await expect(row).to_contain_text("first")
        await row.click()
        await expect(page.locator("dialog.panel")).to_contain_text("Why this agent")
        await page.keyboard.press("Escape")
        await row.get_by_role("button", name="Cancel").click()
        asks = page.get_by_role("dialog")
        await expect(asks.get_by_role("button", name="Keep")).to_be_focused()
        await asks.get_by_role("button", name="Cancel it").click()
        assert "cancelled by the operator" in (await answer.read()).decode()
    await page.mouse.move(0, 0)  # what is under the pointer stays
    await expect(page.locator("tbody tr", has_text="Cancelled")).to_be_visible()
    await expect(page.locator(".empty h2")).to_have_text("Nothing runs and nothing waits")


@pytest.mark.spec("DASH-70")
async def test_the_keyboard_alone_opens_closes_and_keeps_what_is_running(
    coordinator: Running, ollama: StandIn, visit: Visit
) -> None:
    page = visit.page
    ollama.hold(after=3)
    async with coordinator.stream() as answer:
        await answer.content.readline()
        await visit.open("now")
        row = page.locator("tbody tr.clickable").first
        await expect(row).to_contain_text("Writing")
        await row.focus()
        await page.keyboard.press("Enter")
        panel = page.locator("dialog.panel")
        await expect(panel).to_contain_text("Decided by the only agent that can serve it")
        await page.keyboard.press("Escape")
        await expect(panel).to_have_count(0)
        await row.get_by_role("button", name="Cancel").focus()
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("dialog")).to_contain_text("Cancel the request of 127.0.0.1?")
        # What has the focus is harmless: a second Enter ends nothing.
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("dialog")).to_have_count(0)
        assert len(await coordinator.get("/api/requests")) == 1
        ollama.release()


@pytest.mark.spec("DASH-70")
async def test_rows_stay_where_they_are_under_the_pointer(
    coordinator: Running, ollama: StandIn, visit: Visit
) -> None:
    page = visit.page
    ollama.hold(after=2)
    async with coordinator.stream() as first:
        await first.content.readline()
        await visit.open("now")
        rows = page.locator("tbody").first.locator("tr.clickable")
        await expect(rows).to_have_count(1)
        await rows.first.hover()
        second = asyncio.create_task(coordinator.chat(options={"seed": 1}))
        await expect(rows).to_have_count(2)
        ollama.release()
        await first.read()
        await second
        # Both have ended, and still nothing else is under the pointer.
        await expect(page.locator("tr.gone")).to_have_count(2)
        await page.mouse.move(0, 0)
        await expect(rows).to_have_count(0)


@pytest.mark.spec("DASH-71")
async def test_an_unstreamed_answer_is_shown_as_written_with_its_expected_end(
    coordinator: Running, visit: Visit
) -> None:
    page = visit.page
    hardware = Hardware(decode_tokens_per_second=20, reference_bytes=2_000_000_000)
    async with StandIn(hardware=hardware) as ollama:
        await coordinator.register(ollama, "first")
        await coordinator.chat(options={"num_predict": 20})
        ollama.hold(after=1)
        chat = asyncio.create_task(coordinator.chat(options={"num_predict": 400}))
        await visit.open("now")
        row = page.locator("tbody tr.clickable").first
        await expect(row).to_contain_text("Writing")
        await expect(row).to_contain_text("ends ")
        (request,) = await coordinator.get("/api/requests")
        assert request["ends_at"] > request["granted_at"]
        ollama.release()
        await chat


@pytest.mark.spec("DASH-72")
async def test_one_error_of_several_machines_is_said_once_and_can_be_tried_again(
    coordinator: Running, visit: Visit
) -> None:
    page, registry = visit.page, [Model("tiny")]
    async with (
        StandIn([], registry=registry) as one,
        StandIn([], registry=registry) as two,
        StandIn([], registry=registry) as three,
    ):
        for name, node in (("one", one), ("two", two), ("three", three)):
            await beat(coordinator, await coordinator.register(node, name))
        for node in (two, three):
            node.faults.error_line("no space left on device", after=1, paths=["/api/pull"], times=1)
        await coordinator.post("/api/operations", {"kind": "pull", "model": "tiny"})
        await visit.open("models")
        targets = page.locator(".operation .targets li")
        await expect(page.locator(".operation")).to_contain_text("Done in part")
        await expect(targets).to_have_count(1)
        await expect(targets).to_contain_text("2 machines")
        await expect(targets).to_contain_text("two, three")
        await page.get_by_role("button", name="Try again").click()
        await expect(page.locator(".operation")).to_have_count(2)
        again = page.locator(".operation", has_not_text="Done in part")
        await expect(again).to_contain_text("Done")
        assert "tiny:latest" in [model.name for model in three.models]
        await page.locator(".operation").last.get_by_role("button", name="Dismiss").click()
        await expect(page.locator(".operation")).to_have_count(1)


@pytest.mark.spec("DASH-75")
async def test_a_models_page_has_its_machines_users_history_and_where_it_would_fit(
    coordinator: Running, visit: Visit
) -> None:
    page = visit.page
    registry = [Model("llama3.2", 2 * 10**9)]
    async with StandIn() as one, StandIn([], registry=registry) as two, StandIn([]) as small:
        await beat(coordinator, await coordinator.register(one, "one"))
        await beat(coordinator, await coordinator.register(two, "two"))
        agent = await coordinator.register(small, "small")
        await coordinator.heartbeat(agent, gpus=[GPU], disk_free_bytes=10**9)
        await coordinator.chat()
        # Its context is known once it is listed; that is asked for at some time by itself.
        for listed in coordinator.parts.registry:
            await coordinator.parts.monitor.look_at(listed, seconds=5)
        await visit.open("models")
        await page.locator("a.model-name").click()
        await expect(page.locator("h1")).to_have_text("llama3.2")
        tables = [page.locator("table", has_text=text) for text in (
            "Machines that have it", "Where else it would fit", "Who asks for it", "Last requests",
        )]  # fmt: skip
        await expect(tables[0]).to_contain_text("one")
        await expect(tables[0]).to_contain_text("context ")
        await expect(tables[1].locator("tr", has_text="two")).to_contain_text("fits")
        await expect(tables[1].locator("tr", has_text="small")).to_contain_text(
            "no room on its disk"
        )
        await expect(tables[2]).to_contain_text("127.0.0.1")
        await expect(tables[3]).to_contain_text("Served")
        await page.get_by_role("button", name="Pull it there: two").click()
        dialog = page.get_by_role("dialog")
        await expect(dialog).to_contain_text("1 of 3 machines has it")
        await expect(dialog.locator("li", has_text="two").get_by_role("checkbox")).to_be_checked()
        await dialog.get_by_role("button", name="Pull", exact=True).click()
        await expect(tables[0]).to_contain_text("two")
        assert [model.name for model in small.models] == []


@pytest.mark.spec("DASH-76")
async def test_a_chat_is_tried_with_a_system_prompt_and_parameters(
    coordinator: Running, ollama: StandIn, visit: Visit
) -> None:
    page = visit.page
    await visit.open("try")
    await page.get_by_text("System prompt and parameters").click()
    await page.get_by_label("System prompt").fill("Answer in verse.")
    await page.get_by_label("Temperature").fill("0.2")
    await page.get_by_label("Tokens at most").fill("5")
    await expect(page.locator(".lines .command")).to_contain_text('"temperature": 0.2')
    await page.get_by_label("Message").fill("hello")
    await page.keyboard.press("Enter")
    await expect(page.locator(".said.assistant .meta")).to_contain_text("written 5 tokens")
    sent = json.loads(ollama.seen.of("/api/chat")[-1].body)
    assert sent["messages"][0] == {"role": "system", "content": "Answer in verse."}
    assert sent["options"] == {"temperature": 0.2, "num_predict": 5}


@pytest.mark.spec("DASH-73")
async def test_filters_are_in_the_address_and_come_back_with_it(
    coordinator: Running, ollama: StandIn, visit: Visit
) -> None:
    page = visit.page
    await coordinator.chat()
    await visit.open("history")
    await page.get_by_label("Result").select_option("failed")
    await expect(page.locator(".empty h2")).to_have_text("No request matches")
    await expect(page).to_have_url(f"{coordinator.url}/dashboard#/history?status=failed")
    await page.reload()
    await expect(page.locator(".empty h2")).to_have_text("No request matches")
    await visit.open("fleet?search=nobody")
    await expect(page.locator(".empty h2")).to_have_text("No agent matches")
    await expect(page.get_by_label("Search agents")).to_have_value("nobody")


async def test_a_pull_that_failed_on_some_agents_shows_where_and_why(
    coordinator: Running, visit: Visit
) -> None:
    page, registry = visit.page, [Model("tiny")]
    async with StandIn([], registry=registry) as one, StandIn([], registry=registry) as full:
        await beat(coordinator, await coordinator.register(one, "one"))
        await beat(coordinator, await coordinator.register(full, "full"))
        full.faults.error_line("no space left on device", after=1, paths=["/api/pull"])
        assert (await coordinator.post("/api/pull", {"model": "tiny", "stream": False}))[0] == 200
        await visit.open("models")
        targets = page.locator(".operation .targets li")
        await expect(targets).to_have_count(1)
        await expect(targets).to_contain_text("full")
        await expect(targets).to_contain_text("no space left on device")


async def test_models_are_pulled_loaded_and_deleted(coordinator: Running, visit: Visit) -> None:
    page = visit.page
    async with StandIn(registry=[Model("qwen3:8b", 5_200_000_000)]) as ollama:
        await beat(coordinator, await coordinator.register(ollama, "first"))
        await visit.open("models")
        await page.get_by_role("button", name="Pull a model").click()
        await page.get_by_label("Name, as in").fill("qwen3:8b")
        await page.get_by_role("dialog").get_by_role("button", name="Pull").click()
        await expect(page.locator(".operation")).to_contain_text("Done")
        row = page.locator("tbody tr", has_text="qwen3:8b")
        await row.get_by_role("button", name="Load", exact=True).click()
        await page.get_by_role("dialog").get_by_role("button", name="Load").click()
        await expect(row.get_by_role("button", name="Unload")).to_be_visible()
        await expect(row).to_contain_text("first · context ")
        await row.get_by_role("button", name="Delete").click()
        await page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        await expect(row).to_have_count(0)
        assert ollama.models.find("qwen3:8b") is None


async def test_a_chat_shows_who_served_it_and_can_be_stopped(
    coordinator: Running, visit: Visit
) -> None:
    page = visit.page
    text = "# Plan\n\n- **one** `two`\n\n```python\nprint('<b>')\n```\n<script>alert(1)</script>"
    async with StandIn(answer=lambda request: text) as ollama:
        await coordinator.register(ollama, "first")
        await visit.open("try")
        await page.get_by_label("Message").fill("Write markdown")
        await page.keyboard.press("Enter")
        said = page.locator(".said.assistant")
        await expect(said.locator(".meta")).to_contain_text("Served by first")
        await expect(said.locator("h3")).to_have_text("Plan")
        await expect(said.locator("li strong")).to_have_text("one")
        await expect(said.locator("pre code")).to_have_text("print('<b>')")
        await expect(said).to_contain_text("<script>alert(1)</script>")
        await expect(page.locator(".lines pre")).to_contain_text(f"curl {coordinator.url}/api/chat")
        await page.get_by_role("button", name="Python").click()
        await expect(page.locator(".lines pre")).to_contain_text("from ollama import Client")
        ollama.hold(after=2)
        await page.get_by_label("Message").fill("Again")
        await page.keyboard.press("Enter")
        await ollama.seen.wait_for(lambda seen: seen.held == 1)
        await page.get_by_role("button", name="Stop").click()
        await expect(said.last).to_contain_text("Stopped.")
        await ollama.seen.wait_for(lambda seen: seen.held == 0)


PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
    "0000000c49444154789c63f8cfc0000003010100c9fe92ef0000000049454e44ae426082"
)


async def test_a_model_that_sees_is_sent_images(coordinator: Running, visit: Visit) -> None:
    page = visit.page
    sees = Model("gemma3:12b", capabilities=("completion", "vision"))
    async with StandIn([sees, "llama3.2"]) as ollama:
        await coordinator.register(ollama, "first")
        await visit.open("try")
        await page.get_by_label("Model").select_option("llama3.2:latest")
        await expect(page.get_by_label("Add an image")).to_be_hidden()
        await page.get_by_label("Model").select_option("gemma3:12b")
        await expect(page.get_by_label("Add an image")).to_be_visible()
        file = {"name": "pixel.png", "mimeType": "image/png", "buffer": PIXEL}
        await page.locator("input[type=file]").set_input_files(file)  # type: ignore[arg-type]
        await expect(page.locator(".thumb img")).to_be_visible()
        await page.get_by_label("Message").fill("What is this?")
        await page.get_by_role("button", name="Send").click()
        await expect(page.locator(".said.user img")).to_be_visible()
        # The stand-in counts an image as 256 tokens.
        await expect(page.locator(".said.assistant .meta")).to_contain_text("prompt 2")


async def test_history_is_filtered_paged_and_exported(
    coordinator: Running, ollama: StandIn, visit: Visit
) -> None:
    page = visit.page
    for number in range(60):
        await coordinator.chat(model="llama3.2" if number % 6 else "nonesuch")
    await visit.open("history")
    rows = page.locator("history-view .table-box tbody tr")
    await expect(rows).to_have_count(50)
    await page.get_by_role("button", name="Older").click()
    await expect(rows).to_have_count(10)
    await page.get_by_label("Result").select_option("refused")
    await expect(rows).to_have_count(10)
    await expect(rows.first).to_contain_text("nonesuch")
    async with page.expect_download() as started:
        await page.get_by_role("link", name="CSV").click()
    exported = Path(await (await started.value).path()).read_text("utf-8")
    assert len(exported.splitlines()) == 11


async def test_settings_are_changed(coordinator: Running, visit: Visit) -> None:
    page = visit.page
    await visit.open("settings")
    await page.get_by_label("How long an agent may be silent").fill("42")
    await page.get_by_role("button", name="Save").click()
    await expect(page.locator("[data-name=agent_timeout]")).to_contain_text("set here")
    assert coordinator.parts.registry.agent_timeout == 42
    await page.locator("[data-name=agent_timeout]").get_by_role("button", name="Reset").click()
    await expect(page.locator("[data-name=agent_timeout]")).to_contain_text("default")


@asynccontextmanager
async def program(port: int, database: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """The coordinator as a process of its own, killed at the end if it still runs."""
    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).with_name("ollama-coordinator")),
        "serve",
        env={
            **os.environ,
            "COORDINATOR_HOST": "127.0.0.1",
            "COORDINATOR_PORT": str(port),
            "DATABASE_URL": f"sqlite:///{database.as_posix()}",
        },
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def answers(url: str) -> None:
    """Wait until a coordinator answers."""
    async with aiohttp.ClientSession() as session, asyncio.timeout(DEADLINE_SECONDS):
        while True:
            try:
                async with session.get(f"{url}/healthz"):
                    return
            except aiohttp.ClientError:
                await asyncio.sleep(0.05)


async def register(url: str, ollama: StandIn, name: str) -> None:
    """One agent more."""
    facts = {
        "machine_name": name, "ip_address": "127.0.0.1", "ollama_version": "0.33.0",
        "ollama_port": ollama.port,
    }  # fmt: skip
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/api/agents", json=facts) as response,
    ):
        assert response.status == 201


@pytest.mark.spec("DASH-29")
async def test_the_page_recovers_when_the_coordinator_is_killed(tmp_path: Path) -> None:
    port, database = free_port(), tmp_path / "fleet.db"
    url = f"http://127.0.0.1:{port}"
    async with StandIn() as first, StandIn() as second, visiting(url) as visit:
        page = visit.page
        async with program(port, database) as process:
            await answers(url)
            await register(url, first, "before")
            await visit.open("fleet")
            await expect(page.locator(".agent-name")).to_have_text("before")
            process.kill()
            await process.wait()
            await expect(page.locator(".link-state")).to_have_text("Reconnecting")
            await expect(page.locator(".lost")).to_contain_text("Reconnecting")
        async with program(port, database):
            await answers(url)
            await register(url, second, "after")
            await expect(page.locator(".link-state")).to_have_text("Live")
            await expect(page.locator(".agent-name")).to_have_text(["after", "before"])
            await expect(page.locator(".lost")).to_be_hidden()
    complaints = [trouble for trouble in visit.troubles if "ERR_CONNECTION_REFUSED" not in trouble]
    assert [one for one in complaints if "ERR_" not in one] == []


@pytest.mark.spec("DASH-34")
@pytest.mark.spec("DASH-28")
@pytest.mark.spec("DASH-36")
async def test_an_agents_log_is_read_on_its_page(coordinator: Running, visit: Visit) -> None:
    async with StandIn() as ollama:
        agent = await coordinator.register(ollama, "ours", agent_version="0.1.0")
        await visit.open(f"agents/{agent}")
        log = visit.page.locator("details", has_text="The agent's own log")
        await log.locator("summary").click()
        await expect(log).to_contain_text("within ten seconds")
        at, text = "2026-01-01T00:00:00Z", "<b>hm</b>\u202e"
        line = {"number": 5, "at": at, "level": "warning", "text": text}
        sent = {"lines": [line], "server": ["<i>listening</i>\x1b[0m"]}
        url = f"{coordinator.url}/api/agents/{agent}/log"
        async with coordinator.session.post(url, json=sent) as response:
            assert response.status == 204
        await expect(log.locator("ol li")).to_contain_text(r"<b>hm</b>\u202e")
        await expect(log.locator("pre")).to_have_text(r"<i>listening</i>\u001b[0m")


@pytest.mark.spec("DASH-34")
async def test_a_log_that_was_forgotten_meanwhile_is_shown_anew(
    coordinator: Running, visit: Visit
) -> None:
    at = "2026-01-01T00:00:00Z"
    lines = [{"number": n, "at": at, "level": "info", "text": f"line {n}"} for n in range(1, 5)]
    told: dict[str, Any] = {"sends": True, "asked_seconds": 1.0, "reported_at": at}
    may_answer, asked = asyncio.Event(), 0

    async def answer(route: Route) -> None:
        nonlocal asked
        asked += 1
        await may_answer.wait()
        await route.fulfill(json=told)

    async with StandIn() as ollama:
        agent = await coordinator.register(ollama, "ours", agent_version="0.1.0")
        await visit.page.route("**/log", answer)
        await visit.open(f"agents/{agent}")
        log = visit.page.locator("details", has_text="The agent's own log")
        told["lines"] = lines[:3]
        for _ in range(3):  # opened, closed and opened again while the first question is open
            await log.locator("summary").click()
        await visit.page.evaluate("new Promise(requestAnimationFrame)")
        assert asked == 1
        may_answer.set()
        for some in (lines[:3], [], lines):
            told["lines"] = some
            await expect(log.locator("ol li")).to_have_count(len(some))


FIRST_ROWS = """
new MutationObserver(() => {
  window.firstRows ||= document.querySelectorAll("tr.agent-row").length;
}).observe(document, { childList: true, subtree: true });
"""


@pytest.mark.spec("DASH-32")
async def test_many_agents_are_rows_and_few_are_cards(coordinator: Running, visit: Visit) -> None:
    async with StandIn() as ollama:
        for number in range(60):
            own = {"ip_address": f"127.0.0.{number + 1}", "machine_id": f"m{number}"}
            agent = await coordinator.register(ollama, f"machine-{number}", **own)
            await beat(coordinator, agent, tags={"models": []}, ps={"models": []})
        await visit.page.add_init_script(FIRST_ROWS)
        await visit.open("fleet")
        await expect(visit.page.locator("tr.agent-row")).to_have_count(60)
        assert 0 < await visit.page.evaluate("window.firstRows") < 60
        await visit.page.get_by_label("Search agents").fill("machine-7")
        await expect(visit.page.locator("tr.agent-row")).to_have_count(1)
        await visit.page.get_by_label("Search agents").fill("")
        await visit.page.get_by_role("button", name="Cards").click()
        await expect(visit.page.locator("article.agent")).to_have_count(60)


async def test_the_page_fits_a_phone(coordinator: Running, ollama: StandIn) -> None:
    await coordinator.chat()
    async with visiting(coordinator.url, viewport={"width": 390, "height": 844}) as visit:
        for view in ("fleet", "now", "attention", "models", "history", "try", "settings"):
            await visit.open(view)
            await asyncio.sleep(0.3)
            wide = await visit.page.evaluate("document.documentElement.scrollWidth")
            assert wide <= 390, view
        assert visit.troubles == []


async def test_memory_stays_flat_under_load(coordinator: Running, visit: Visit) -> None:
    fast = Hardware(decode_tokens_per_second=2000)
    async with StandIn(hardware=fast, slots=8) as ollama:
        await coordinator.register(ollama, "first")
        await visit.open("now")
        session = await visit.page.context.new_cdp_session(visit.page)

        async def used() -> float:
            await session.send("HeapProfiler.collectGarbage")
            return float((await session.send("Runtime.getHeapUsage"))["usedSize"])

        async def load(requests: int) -> None:
            for _ in range(requests):
                await asyncio.gather(
                    *(coordinator.chat(options={"num_predict": 20}) for _ in range(8))
                )

        await load(10)
        before = await used()
        await load(40)
        assert await used() - before < 2_000_000


@pytest.mark.spec("DASH-40")
async def test_what_needs_attention_is_on_every_page_and_in_the_tabs_title(
    coordinator: Running, ollama: StandIn, visit: Visit
) -> None:
    agent = next(iter(coordinator.parts.registry))
    await visit.open("models")
    badge = visit.page.locator('.nav [data-count="attention"]')
    await expect(badge).to_have_text("")
    await coordinator.heartbeat(agent.id, disk_free_bytes=2 * 10**9)
    await expect(badge).to_have_text("1")
    await expect(visit.page).to_have_title("(1) Models · Ollama Coordinator")
    await visit.open("attention")
    row = visit.page.locator(".concerns li")
    await expect(row).to_have_attribute("data-severity", "warning")
    await expect(row.locator("p")).to_contain_text("Its disk has 2.0 GB left.")
    await expect(visit.page.locator(".events li").first).to_contain_text("agent registered")
    await row.locator("a").click()
    await expect(visit.page.locator("h1")).to_have_text("first")
    await coordinator.heartbeat(agent.id, disk_free_bytes=10**12)
    await expect(badge).to_have_text("")
    await expect(visit.page).to_have_title("first · Ollama Coordinator")


@pytest.mark.spec("DASH-40")
async def test_what_concerns_a_model_links_to_its_page_and_its_machine(
    coordinator: Running, ollama: StandIn, visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "GRACE_SECONDS", {})
    agent = next(iter(coordinator.parts.registry))
    key, now = next(iter(agent.inventory.available)), coordinator.parts.clock.now()
    coordinator.parts.registry.doubt(agent, key, "it writes nothing", now, pause=1000.0)
    await visit.open("attention")
    links = visit.page.locator(".concerns li a")
    await expect(links).to_have_text(["first", "llama3.2"])
    await links.last.click()
    await expect(visit.page.locator("h1")).to_have_text("llama3.2")
    await expect(visit.page.locator("main")).to_contain_text("Machines that have it")


async def test_keys_are_made_shown_once_and_revoked(coordinator: Running, visit: Visit) -> None:
    page = visit.page
    await visit.open("access")
    await expect(page.locator("main")).to_contain_text("No key was made yet")
    await page.get_by_role("button", name="Make a key").click()
    await page.get_by_label("Name").fill("anna")
    await expect(page.get_by_label("operate: everything")).to_be_checked()
    await page.get_by_role("textbox", name="Models").fill("llama3*, qwen*")
    await page.get_by_text("Limits, share and lane").click()
    await page.get_by_label("Requests at a time").fill("2")
    await page.get_by_label("Tokens a day").fill("100000")
    await page.get_by_label("Lane").select_option("batch")
    await page.get_by_role("button", name="Make", exact=True).click()
    key = await page.locator("[data-key]").inner_text()
    assert key.startswith("oc_")
    assert len(key) == 46
    await page.keyboard.press("Escape")
    row = page.locator("tr[data-name=anna]")
    await expect(row).to_contain_text("llama3*, qwen*")
    await expect(row).to_contain_text("2 at a time, 100,000 tokens a day, batch lane")
    assert key not in await page.content()
    await row.get_by_role("button", name="Revoke").click()
    await page.locator("dialog").get_by_role("button", name="Revoke").click()
    await expect(row).to_contain_text("revoked")


async def test_a_browser_logs_in_with_a_key_and_out() -> None:
    async with running(access="keys") as coordinator:
        _, key = coordinator.parts.access.keys.create(NewKey(name="anna", rights=("operate",)))
        async with visiting(coordinator.url) as visit:
            page = visit.page
            await page.goto(f"{coordinator.url}/dashboard")
            await page.get_by_label("Key").fill("oc_wrong")
            await page.get_by_role("button", name="Log in").click()
            await expect(page.get_by_role("status")).to_contain_text("mistyped")
            await page.get_by_label("Key").fill(key)
            await page.get_by_role("button", name="Log in").click()
            await expect(page).to_have_url(f"{coordinator.url}/dashboard")
            await expect(page.locator(".link-state")).to_contain_text("Live")
            await page.get_by_role("button", name="Log out").click()
            await expect(page.get_by_label("Key")).to_be_visible()
            # A session that ends elsewhere leads to the page that takes a key.
            await page.get_by_label("Key").fill(key)
            await page.get_by_role("button", name="Log in").click()
            await expect(page.locator(".link-state")).to_contain_text("Live")
            coordinator.parts.access.sessions.end_all(coordinator.parts.access.keys.find("anna"))
            await page.goto(f"{coordinator.url}/dashboard#/access")
            await page.reload()
            await expect(page.get_by_label("Key")).to_be_visible()


@pytest.mark.spec("ACCESS-24")
async def test_a_machine_that_wants_to_join_is_admitted_or_refused_on_the_fleet_page() -> None:
    async with running(access="keys", trusted_proxies=("127.0.0.1",)) as coordinator:
        _, key = coordinator.parts.access.keys.create(NewKey(name="anna", rights=("operate",)))
        async with StandIn() as wanted, StandIn() as unwanted, visiting(coordinator.url) as visit:
            page = visit.page

            async def asks(name: str, ollama: StandIn) -> int:
                facts: dict[str, Any] = {"machine_name": name, "ip_address": "192.168.1.7"}
                facts |= {"ollama_version": "0.24.0", "ollama_port": ollama.port}
                headers = {"X-Agent-Secret": name * 8, "X-Forwarded-For": "192.168.1.7"}
                url = f"{coordinator.url}/api/agents"
                async with coordinator.session.post(url, json=facts, headers=headers) as answer:
                    return answer.status

            await page.goto(f"{coordinator.url}/dashboard")
            await page.get_by_label("Key").fill(key)
            await page.get_by_role("button", name="Log in").click()
            await expect(page.locator(".link-state")).to_contain_text("Live")
            assert await asks("gpu-1", wanted) == 403
            assert await asks("gpu-2", unwanted) == 403
            rows = page.locator("tr[data-join]")
            first, second = (rows.filter(has_text=name) for name in ("gpu-1", "gpu-2"))
            shown = {one.machine_name: one for one in coordinator.parts.machines.requests()}
            await expect(first).to_contain_text(shown["gpu-1"].fingerprint)
            await expect(first).to_contain_text("192.168.1.7")
            await first.get_by_role("button", name="Admit").click()
            await second.get_by_role("button", name="Refuse").click()
            await expect(rows).to_have_count(0)
            assert await asks("gpu-1", wanted) == 201
            assert await asks("gpu-2", unwanted) == 403
            await expect(page.locator("article.agent .agent-name")).to_have_text("gpu-1")
            assert coordinator.parts.machines.requests() == []


async def test_the_models_page_says_what_would_have_cut_waiting(
    coordinator: Running, visit: Visit
) -> None:
    large = Model("qwen3:32b", size_bytes=20_000_000_000)
    async with StandIn([large]) as one, StandIn([Model("llama3.2")]) as other:
        busy = await coordinator.register(one, "gpu-1")
        await beat(coordinator, busy)
        await beat(coordinator, await coordinator.register(other, "gpu-3"))
        key = model_key("qwen3:32b")
        await coordinator.until(lambda: bool(coordinator.parts.registry.holders(key)))
        history = coordinator.parts.observation.history
        for request in crowd(busy, 10):
            history.note(request, [])
        await visit.open("models")
        advice = visit.page.locator("main .advice")
        await expect(advice).to_contain_text("qwen3:32b on gpu-3 would have saved")
        await expect(advice).to_contain_text("20 GB")
        if folder := os.environ.get("PICTURES"):
            await visit.page.screenshot(path=f"{folder}/advice.png")


@pytest.mark.spec("ACCESS-27")
async def test_usage_is_shown_by_person_key_and_model(
    coordinator: Running, ollama: StandIn, visit: Visit
) -> None:
    for _ in range(3):
        await coordinator.chat()
    page = visit.page
    await visit.open("usage")
    row = page.locator("tr[data-name='127.0.0.1']")
    await expect(row.locator("td").first).to_have_text("3")
    await expect(page.locator("oc-chart canvas").first).to_be_visible()
    await page.get_by_role("button", name="Models").click()
    await expect(page.locator(".table-box tbody th")).to_have_text("llama3.2")
    async with page.expect_download() as file:
        await page.get_by_role("link", name="CSV").click()
    assert "127.0.0.1" in Path(await (await file.value).path()).read_text("utf-8")
    if folder := os.environ.get("PICTURES"):
        await page.screenshot(path=f"{folder}/usage.png")


@pytest.mark.spec("FLEET-50")
async def test_the_card_says_which_model_others_are_asked_for_first_and_what_to_do(
    coordinator: Running,
    ollama: StandIn,
    spare: StandIn,
    visit: Visit,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = next(agent for agent in coordinator.parts.registry if agent.name == "first")
    await ollama.load("llama3.2")
    await coordinator.parts.monitor.look_at(first, seconds=DEADLINE_SECONDS)
    await visit.open("fleet")
    card = visit.page.get_by_role("article", name="Agent first")
    reason = card.locator(".reason")
    await expect(reason).to_be_hidden()
    with ollama.faults.status(500, "CUDA error: device lost"):
        await coordinator.chat()
        said = "Others are asked first for llama3.2:latest: answered 500: CUDA error: device lost"
        await expect(reason).to_have_text(said)
    monkeypatch.setattr(model_probes, "TOKEN_SECONDS", 0.5)
    with ollama.faults.hang(paths=("/api/chat",)):
        key = model_key("llama3.2")
        coordinator.parts.registry.succeeded(first, key)
        coordinator.parts.registry.doubt(first, key, "requests are late", 0.0)
        await expect(reason).to_contain_text("it is in memory and answers nothing; restart Ollama")
        if folder := os.environ.get("PICTURES"):
            await visit.page.screenshot(path=f"{folder}/stuck.png")
        await visit.page.click("article.agent .agent-name >> text=first")
        await expect(visit.page.locator("main")).to_contain_text("systemctl restart ollama")
        await visit.open("fleet")
    await expect(reason).to_be_hidden()


@pytest.mark.spec("ACCESS-28")
async def test_who_changed_what_is_on_a_page(coordinator: Running, visit: Visit) -> None:
    for number in range(60):
        await coordinator.post("/api/keys", {"name": f"key-{number}", "rights": ["join"]})
    page = visit.page
    await visit.open("audit")
    rows = page.locator(".table-box tbody tr")
    await expect(rows).to_have_count(50)
    await expect(rows.first).to_contain_text("key-59")
    await expect(rows.first).to_contain_text("127.0.0.1")
    await page.get_by_role("button", name="Older").click()
    await expect(rows).to_have_count(10)
    async with page.expect_download() as file:
        await page.get_by_role("link", name="CSV").click()
    assert "key-0" in Path(await (await file.value).path()).read_text("utf-8")
    await page.get_by_label("Who").fill("nobody")
    await page.keyboard.press("Enter")
    await expect(page.locator(".empty h2")).to_have_text("Nothing was changed yet")
    if folder := os.environ.get("PICTURES"):
        await page.get_by_label("Who").fill("")
        await page.keyboard.press("Enter")
        await expect(rows).to_have_count(50)
        await page.screenshot(path=f"{folder}/audit.png")
