"""The link: an agent whose port the coordinator does not reach opens the connections itself."""

import asyncio
import hashlib
import io
import json
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from msgspec import structs

from ollama_coordinator_agent.daemon import Daemon
from ollama_coordinator_common.protocol import PROOF_HEADER
from ollama_coordinator_common.settings import AgentConfig
from support import agent_world, programs
from support.coordinator import Running, running
from support.deadline import DEADLINE_SECONDS
from support.ollama import Model, StandIn
from support.ollama.script import Script
from support.sockets import asked_every_15_seconds
from support.wire import wired

pytestmark = pytest.mark.loops

FLAPS = 100

NOWHERE = "127.77.7.7"
"""An address of this machine (Linux) on which no stand-in listens."""


def config(url: str, ollama: StandIn, folder: Path, **more: Any) -> AgentConfig:
    """An agent that has a link and nothing else."""
    settings: dict[str, Any] = {"transport": "link", "manage_ollama": False, **more}
    folder = folder / str(ollama.port)
    return AgentConfig(
        coordinator_url=url, ollama_port=ollama.port, state_dir=folder,
        machine_name=f"machine-{ollama.port}", **settings,
    )  # fmt: skip


def is_linked(coordinator: Running, count: int = 1) -> bool:
    """Whether so many agents are in rotation by their links."""
    registry = coordinator.parts.registry
    return sum(agent.linked and agent.out_of_rotation() is None for agent in registry) == count


@asynccontextmanager
async def linked(
    coordinator: Running, ollama: StandIn, folder: Path, url: str = "", **more: Any
) -> AsyncIterator[Daemon]:
    """An agent beside a stand-in, in rotation by its link."""
    count = sum(agent.linked for agent in coordinator.parts.registry)
    settings = config(url or coordinator.url, ollama, folder, **more)
    async with agent_world.running(settings) as daemon:
        await coordinator.until(lambda: is_linked(coordinator, count + 1))
        yield daemon


@pytest.fixture
async def agent(coordinator: Running, far: StandIn, tmp_path: Path) -> AsyncIterator[Daemon]:
    """An agent with a link, beside the stand-in `far`."""
    async with linked(coordinator, far, tmp_path) as daemon:
        yield daemon


@pytest.fixture
async def far() -> AsyncIterator[StandIn]:
    """A stand-in that is not registered."""
    async with StandIn() as ollama:
        yield ollama


# ── the request path ──────────────────────────────────────────────────────────────────────────


@pytest.mark.spec("LINK-1")
async def test_streams_lists_and_details_come_over_the_link(
    coordinator: Running, agent: Daemon, far: StandIn
) -> None:
    async with coordinator.stream() as response:
        records = [json.loads(line) async for line in response.content]
    assert records[-1]["done"]
    assert (await coordinator.chat())[0] == 200
    tags = await coordinator.get("/api/tags")
    assert [row["name"] for row in tags["models"]] == ["llama3.2:latest"]
    assert (await coordinator.post("/api/show", {"model": "llama3.2"}))[0] == 200
    [row] = await coordinator.get("/api/agents")
    assert row["link"]
    assert row["status"] == "online"
    hosts = {record.headers.get("Host") for record in far.node.seen.of("/api/chat")}
    assert hosts == {f"{row['id']}.link.internal"}
    await coordinator.until(coordinator.at_rest)


@pytest.mark.spec("LINK-1")
async def test_a_body_of_64_mebibytes_arrives_whole(
    coordinator: Running, agent: Daemon, far: StandIn
) -> None:
    text = "x" * (60 * 1024 * 1024)
    body = json.dumps({"model": "llama3.2", "prompt": text, "stream": False}).encode()
    url = f"{coordinator.url}/api/generate"
    async with coordinator.session.post(url, data=io.BytesIO(body)) as response:
        assert response.status == 200, await response.text()
    assert far.node.seen.of("/api/generate")[-1].body_bytes > len(text)


@pytest.mark.spec("LINK-1")
async def test_models_are_pulled_created_uploaded_and_deleted(
    coordinator: Running, tmp_path: Path
) -> None:
    catalogue = [Model("smollm:latest")]
    async with StandIn(registry=catalogue) as far, linked(coordinator, far, tmp_path):
        status, _ = await coordinator.post("/api/pull", {"model": "smollm", "stream": False})
        assert status == 200
        assert far.node.store.find("smollm:latest") is not None
        blob = os.urandom(3_000_000)
        digest = f"sha256:{hashlib.sha256(blob).hexdigest()}"
        url = f"{coordinator.url}/api/blobs/{digest}"
        async with coordinator.session.post(url, data=io.BytesIO(blob)) as response:
            assert response.status == 201
        create = {"model": "mine", "files": {"mine.gguf": digest}, "stream": False}
        status, answer = await coordinator.post("/api/create", create)
        assert status == 200, answer
        async with coordinator.session.delete(
            f"{coordinator.url}/api/delete", json={"model": "smollm"}
        ) as response:
            assert response.status == 200


@pytest.mark.spec("LINK-1")
async def test_a_client_that_leaves_ends_its_work_over_the_link(
    coordinator: Running, agent: Daemon, far: StandIn
) -> None:
    far.node.gate.hold(after=3)
    async with coordinator.stream() as response:
        await response.content.readline()
    await coordinator.until(lambda: far.node.seen.of("/api/chat")[-1].outcome == "cancelled")
    await coordinator.until(coordinator.at_rest)


@pytest.mark.spec("LINK-1")
async def test_a_client_that_does_not_read_stops_the_agent_and_no_other_stream(
    coordinator: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"OLLAMA_NUM_PARALLEL": "4"}
    monkeypatch.setattr("ollama_coordinator_agent.watch.environment_of_listener", lambda _: found)
    flood = Script(content=["x" * 50_000] * 2_000)
    usual = Script(content=["y"] * 10)

    def answer(request: Any) -> Script:
        return flood if "flood" in str(request.prompt) else usual

    async with StandIn(slots=4, answer=answer) as far, linked(coordinator, far, tmp_path):
        body = json.dumps({"model": "llama3.2", "messages": [{"role": "user", "content": "flood"}]})
        host, port = coordinator.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as slow:
            head = f"POST /api/chat HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            slow.sendall(head.encode() + body.encode())
            await coordinator.until(lambda: len(far.node.seen.of("/api/chat")) == 1)
            for _ in range(5):
                assert (await coordinator.chat())[0] == 200
            produced = far.node.seen.of("/api/chat")[0]
            assert produced.outcome == "running"  # it is held back, not done
        await coordinator.until(coordinator.at_rest)


@pytest.mark.spec("LINK-2")
async def test_more_requests_than_connections_are_parked_are_all_served(
    coordinator: Running, tmp_path: Path
) -> None:
    async with StandIn(slots=64) as far:
        async with linked(coordinator, far, tmp_path) as daemon:
            [one] = coordinator.parts.registry
            await coordinator.heartbeat(one.id, runner={"num_parallel": 64})
            async with asyncio.timeout(DEADLINE_SECONDS):
                answers = await asyncio.gather(*(coordinator.chat() for _ in range(64)))
            assert {status for status, _ in answers} == {200}
            [link] = daemon._links
            await agent_world.eventually(lambda: link._parked == 5)


@pytest.mark.spec("LINK-2")
async def test_silent_connections_are_kept_open_in_every_router(
    coordinator: Running, agent: Daemon
) -> None:
    [link] = coordinator.parts.links
    await coordinator.until(lambda: len(link) >= 5)
    for connection in link._open:
        assert asked_every_15_seconds(connection.get_extra_info("socket"))
    [own] = agent._links
    assert own._control is not None
    assert asked_every_15_seconds(own._control._transport.get_extra_info("socket"))


# ── which way ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.spec("LINK-3")
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs 127.77.7.7 to be this machine")
async def test_an_agent_whose_port_is_not_reached_gets_a_link_and_remembers_it(
    coordinator: Running, far: StandIn, tmp_path: Path
) -> None:
    hidden = {"transport": "auto", "ip_address": NOWHERE, "relay": "never"}
    began = time.monotonic()
    async with linked(coordinator, far, tmp_path, **hidden):
        assert time.monotonic() - began < 10
        assert (await coordinator.chat())[0] == 200
    [agent] = coordinator.parts.registry
    await coordinator.until(lambda: agent.left)
    before = len(coordinator.parts.registry)
    began = time.monotonic()
    async with linked(coordinator, far, tmp_path, **hidden) as daemon:
        assert time.monotonic() - began < 3
        assert daemon.parts.state.last_run.linked
    assert len(coordinator.parts.registry) == before


@pytest.mark.spec("LINK-3")
async def test_an_agent_whose_port_is_reached_has_no_link(
    coordinator: Running, far: StandIn, tmp_path: Path
) -> None:
    settings = config(coordinator.url, far, tmp_path, transport="auto")
    async with agent_world.running(settings):
        await coordinator.until(lambda: any(one.report for one in coordinator.parts.registry))
        assert (await coordinator.chat())[0] == 200
        assert list(coordinator.parts.links) == []


@pytest.mark.spec("LINK-3")
async def test_a_port_that_is_reached_again_makes_the_link_needless_and_ends_no_answer(
    coordinator: Running, far: StandIn, tmp_path: Path
) -> None:
    settings = config(coordinator.url, far, tmp_path, transport="auto")
    pace = structs.replace(agent_world.FAST, ask_reached=0.5)
    async with linked(coordinator, far, tmp_path):
        pass
    (tmp_path / str(far.port) / f"agent-{far.port}.json").write_text('{"linked": true}')
    far.node.gate.hold(after=3)
    async with agent_world.running(settings, pace=pace) as daemon:
        await coordinator.until(lambda: is_linked(coordinator))
        async with coordinator.stream() as response:
            await response.content.readline()
            await coordinator.until(
                lambda: all(not one.registration.link for one in coordinator.parts.registry)
            )
            far.node.gate.release()
            lines = (await response.read()).splitlines()
        assert json.loads(lines[-1])["done"]
        assert not daemon.parts.state.last_run.linked
        assert (await coordinator.chat())[0] == 200


@pytest.mark.spec("LINK-4")
async def test_two_machines_with_one_private_address_are_two_agents(
    coordinator: Running, tmp_path: Path
) -> None:
    port = programs.free_port()
    async with StandIn(port=port) as far:
        for name in ("one", "other"):
            ids = {"machine_id": f"machine-id-{name}", "instance_id": f"run-{name}"}
            await coordinator.register(far, name, link=True, **ids)
    assert len(coordinator.parts.registry) == 2
    assert all(row["conflict"] is None for row in await coordinator.get("/api/agents"))


# ── gone and back ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.spec("LINK-5")
async def test_a_link_that_is_cut_ends_its_streams_at_once_and_comes_back(
    coordinator: Running, far: StandIn, tmp_path: Path
) -> None:
    async with wired(coordinator.url) as wire, linked(coordinator, far, tmp_path, wire.url):
        far.node.gate.hold(after=3)
        async with coordinator.stream() as response:
            await response.content.readline()
            cut = time.monotonic()
            wire.cut()
            *_, last = (await response.read()).splitlines()
        assert "error" in json.loads(last)
        assert time.monotonic() - cut < 1
        far.node.gate.release()
        status, _ = await coordinator.chat()
        assert status == 200
        assert coordinator.parts.registry.changes
        await coordinator.until(coordinator.at_rest)


@pytest.mark.spec("PROXY-46")
async def test_an_answer_goes_on_over_another_link(coordinator: Running, tmp_path: Path) -> None:
    async with StandIn() as one, StandIn() as two:
        nodes = {f"machine-{node.port}": node for node in (one, two)}
        async with linked(coordinator, one, tmp_path), linked(coordinator, two, tmp_path):
            for node in nodes.values():
                node.hold(after=5)
            async with coordinator.stream() as response:
                name = response.headers["x-ollama-coordinator-agent"]
                dying, [other] = nodes.pop(name), nodes
                await dying.seen.wait_for(lambda seen: seen.held == 1)
                nodes[other].release()
                await dying.kill()
                lines = [json.loads(line) for line in (await response.read()).splitlines()]
    assert lines[-1]["continued"] == [{"from": name, "by": other, "tokens": 5}]
    assert len(lines) == 17


@pytest.mark.spec("LINK-5")
async def test_requests_wait_for_a_link_that_comes_back_and_go_elsewhere_where_they_can(
    coordinator: Running, far: StandIn, tmp_path: Path
) -> None:
    async with wired(coordinator.url) as wire, linked(coordinator, far, tmp_path, wire.url):
        far.node.gate.hold(after=3)
        far.node.gate.hold_prompts()
        asked = asyncio.create_task(coordinator.chat())
        await coordinator.until(lambda: far.node.seen.of("/api/chat"))
        async with StandIn() as near:
            await coordinator.register(near, "near")
            wire.cut()
            assert (await asked)[0] == 200
            assert len(near.node.seen.of("/api/chat")) == 1
        far.node.gate.release()


@pytest.mark.spec("LINK-5")
async def test_an_agent_that_stays_away_is_offline(
    coordinator: Running, far: StandIn, tmp_path: Path
) -> None:
    async with wired(coordinator.url) as wire:
        async with linked(coordinator, far, tmp_path, wire.url):
            [agent] = coordinator.parts.registry
            wire.deafen()
            await coordinator.until(lambda: not agent.linked)
            assert agent.out_of_rotation() == "its link is not open"
            [row] = await coordinator.get("/api/agents")
            assert row["status"] == "online"
            async with asyncio.timeout(DEADLINE_SECONDS):
                while (await coordinator.get("/api/agents"))[0]["status"] != "offline":
                    await asyncio.sleep(0.1)
            wire.heal()
            await coordinator.until(lambda: is_linked(coordinator))


@pytest.mark.spec("LINK-6")
async def test_a_link_on_which_nothing_passes_ends_within_four_seconds(
    coordinator: Running, far: StandIn, tmp_path: Path
) -> None:
    async with wired(coordinator.url) as wire, linked(coordinator, far, tmp_path, wire.url):
        far.node.gate.hold(after=3)
        async with coordinator.stream() as response:
            await response.content.readline()
            deaf = time.monotonic()
            wire.deafen()
            *_, last = (await response.read()).splitlines()
            took = time.monotonic() - deaf
        assert "its link has ended" in json.loads(last)["error"]
        assert took < 4.5
        far.node.gate.release()
        wire.heal()
        assert (await coordinator.chat())[0] == 200
        await coordinator.until(coordinator.at_rest)


@pytest.mark.spec("LINK-5")
async def test_a_link_that_flaps_under_load_loses_nothing_that_another_agent_can_serve(
    coordinator: Running, tmp_path: Path
) -> None:
    statuses: list[int] = []
    whole = "".join(f"word{number} " for number in range(30)).strip()
    streams = {"whole": 0, "cut": 0}

    async def ask(until: asyncio.Event) -> None:
        while not until.is_set():
            statuses.append((await coordinator.chat())[0])

    async def read_along(until: asyncio.Event) -> None:
        while not until.is_set():
            async with coordinator.stream() as response:
                records = [json.loads(line) async for line in response.content]
            text = "".join(one.get("message", {}).get("content", "") for one in records)
            # Once a byte has come no other agent goes on, and none begins anew.
            assert text == whole if records[-1].get("done") else whole.startswith(text)
            assert records[-1].get("done") or "link has ended" in records[-1]["error"]
            streams["whole" if records[-1].get("done") else "cut"] += 1

    async with (
        StandIn(slots=4, answer=lambda request: whole) as near,
        StandIn(answer=lambda request: whole) as far,
        wired(coordinator.url) as wire,
    ):
        await coordinator.register(near, "near")
        async with linked(coordinator, far, tmp_path, wire.url) as daemon:
            over = asyncio.Event()
            async with asyncio.timeout(6 * DEADLINE_SECONDS), asyncio.TaskGroup() as tasks:
                for _ in range(4):
                    tasks.create_task(ask(over))
                    tasks.create_task(read_along(over))
                for _ in range(FLAPS):
                    await coordinator.until(lambda: is_linked(coordinator))
                    await asyncio.sleep(0.02)
                    wire.cut()
                    await coordinator.until(lambda: not is_linked(coordinator))
                over.set()
            assert set(statuses) == {200}
            assert streams["whole"] > 0
            await coordinator.until(coordinator.at_rest)
            await coordinator.until(lambda: is_linked(coordinator))
            [link] = [one for one in daemon._links if not one.has_ended]
            await agent_world.eventually(lambda: link._parked == 5)


@pytest.mark.spec("LINK-7")
async def test_news_of_an_ollama_come_over_the_link_at_once(
    coordinator: Running, agent: Daemon, far: StandIn
) -> None:
    far.node.store.add(Model("pulled-by-hand"))
    async with asyncio.timeout(DEADLINE_SECONDS):
        while (await coordinator.chat("pulled-by-hand"))[0] != 200:
            await asyncio.sleep(0.02)
    [row] = await coordinator.get("/api/agents")
    log = await coordinator.get(f"/api/agents/{row['id']}/log")
    assert log["sends"]
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not log["lines"]:
            await asyncio.sleep(0.02)
            log = await coordinator.get(f"/api/agents/{row['id']}/log")


@pytest.mark.spec("LINK-7")
async def test_an_agent_that_was_removed_registers_again_and_gets_another_link(
    coordinator: Running, agent: Daemon
) -> None:
    [row] = await coordinator.get("/api/agents")
    async with coordinator.session.delete(f"{coordinator.url}/api/agents/{row['id']}") as response:
        assert response.status == 204
    await coordinator.until(lambda: is_linked(coordinator))
    [other] = await coordinator.get("/api/agents")
    assert other["id"] != row["id"]
    assert (await coordinator.chat())[0] == 200
    await coordinator.until(lambda: len(list(coordinator.parts.links)) == 1)


@pytest.mark.spec("LINK-8")
async def test_a_coordinator_that_stops_waits_for_answers_and_not_for_links(
    far: StandIn, tmp_path: Path
) -> None:
    async with running() as coordinator, linked(coordinator, far, tmp_path):
        assert (await coordinator.chat())[0] == 200
        stopping = time.monotonic()
    assert time.monotonic() - stopping < 3


@pytest.mark.spec("LINK-8")
async def test_a_coordinator_that_was_restarted_has_its_linked_agents_within_seconds(
    far: StandIn, tmp_path: Path
) -> None:
    port = programs.free_port()
    url = f"http://127.0.0.1:{port}"
    async with agent_world.running(config(url, far, tmp_path)), aiohttp.ClientSession() as session:
        for _ in range(2):
            async with programs.coordinator(tmp_path, port):
                async with asyncio.timeout(DEADLINE_SECONDS):
                    while True:
                        body = {"model": "llama3.2", "prompt": "x", "stream": False}
                        async with session.post(f"{url}/api/generate", json=body) as response:
                            if response.status == 200:
                                break
                        await asyncio.sleep(0.05)


# ── refusals ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.spec("LINK-9")
async def test_what_is_no_link_is_refused_with_a_sentence(
    coordinator: Running, agent: Daemon
) -> None:
    [row] = await coordinator.get("/api/agents")
    url = f"{coordinator.url}/api/agents/{row['id']}/link"
    coordinator.session.headers[PROOF_HEADER] = agent.parts.state.secret()
    async with coordinator.session.get(url) as response:
        assert response.status == 426
        assert "proxy_set_header Upgrade" in (await response.json())["error"]
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await coordinator.session.ws_connect(f"{url}?session=guessed")
    assert refused.value.status == 409
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await coordinator.session.ws_connect(f"{coordinator.url}/api/agents/none/link")
    assert refused.value.status == 404


@pytest.mark.spec("LINK-9")
async def test_lines_that_mean_nothing_end_only_their_own_connection(
    coordinator: Running, agent: Daemon
) -> None:
    [row] = await coordinator.get("/api/agents")
    url = f"{coordinator.url}/api/agents/{row['id']}/link"
    coordinator.session.headers[PROOF_HEADER] = agent.parts.state.secret()
    for text in ("no json\n", '{"health": 3}\n', '{"health": {"agent_id": "another"}}\n'):
        async with coordinator.session.ws_connect(url) as socket_:
            await socket_.send_bytes(text.encode())
            answer = await socket_.receive()
            assert b"error" in answer.data
    async with coordinator.session.ws_connect(url) as socket_:
        await socket_.send_bytes(b"x" * 100)
    assert is_linked(coordinator)
    assert (await coordinator.chat())[0] == 200


@pytest.mark.spec("LINK-9")
async def test_where_hypercorn_serves_alone_both_sides_say_what_to_set(
    far: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(http="hypercorn") as coordinator:
        async with agent_world.running(config(coordinator.url, far, tmp_path)):
            await agent_world.eventually(lambda: "COORDINATOR_HTTP=auto" in caplog.text)


@pytest.mark.spec("LINK-9")
async def test_errors_of_a_link_speak_of_no_firewall(
    coordinator: Running, far: StandIn, tmp_path: Path
) -> None:
    agent_id = await coordinator.register(far, link=True, machine_id="some-machine-id")
    [row] = await coordinator.get("/api/agents")
    assert row["out_of_rotation"] == "its link is not open"
    agent = coordinator.agent(agent_id)
    assert not await coordinator.parts.monitor.answers(agent)
    with pytest.raises(Exception, match="link is down"):
        async with coordinator.parts.upstreams.open("GET", f"{agent.url}/api/version"):
            pass


# ── proxies ───────────────────────────────────────────────────────────────────────────────────

REFERENCE = Path(__file__).parents[2] / "packages" / "coordinator" / "README.md"


def proxy_command(name: str, folder: Path, port: int, target: str) -> list[str]:
    """How to start a proxy on a port of this machine, set up as the reference says."""
    if name == "caddy":
        (folder / "Caddyfile").write_text(
            f"{{\n admin off\n auto_https off\n}}\n:{port} {{\n reverse_proxy {target}\n}}\n"
        )
        return ["caddy", "run", "--adapter", "caddyfile", "--config", str(folder / "Caddyfile")]
    [block] = re.findall(r"```nginx\n(.*?)```", REFERENCE.read_text("utf-8"), re.DOTALL)
    block = block.replace("127.0.0.1:8080", target)
    (folder / "nginx.conf").write_text(
        f"pid {folder}/pid; error_log stderr; daemon off; events {{}}\n"
        f"http {{ access_log off; client_body_temp_path {folder}/body;\n"
        f" server {{ listen 127.0.0.1:{port};\n{block}\n}} }}\n"
    )
    return ["nginx", "-c", str(folder / "nginx.conf"), "-p", str(folder)]


@pytest.mark.spec("LINK-10")
@pytest.mark.parametrize("name", ["nginx", "caddy"])
async def test_links_pass_proxies_that_are_set_up_as_the_reference_says(
    far: StandIn, tmp_path: Path, name: str
) -> None:
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed (it is a Debian package)")
    async with running(trusted_proxies=("127.0.0.1",)) as coordinator:
        port = programs.free_port()
        command = proxy_command(name, tmp_path, port, coordinator.url.removeprefix("http://"))
        home = {"HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)}
        async with programs.program(tmp_path / "proxy.log", *command, **home) as proxy:
            url = f"http://127.0.0.1:{port}"
            await programs.answers(f"{url}/api/version", proxy)
            async with linked(coordinator, far, tmp_path, url):
                far.node.gate.hold(after=3)
                async with coordinator.stream() as response:
                    assert b"message" in await response.content.readline()
                await coordinator.until(
                    lambda: far.node.seen.of("/api/chat")[-1].outcome == "cancelled"
                )
                far.node.gate.release()
                assert (await coordinator.chat())[0] == 200
            await coordinator.until(coordinator.at_rest)
