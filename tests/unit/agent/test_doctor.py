"""The doctor: each thing that it can find is provoked once."""

import os
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.utils import formatdate
from pathlib import Path

import aiohttp
import msgspec
import pytest
from aiohttp import web
from msgspec import structs
from rich.console import Console

from ollama_coordinator.tls import Tls
from ollama_coordinator_agent.client import CoordinatorClient
from ollama_coordinator_agent.display import render_finding
from ollama_coordinator_agent.doctor import Card, Surroundings, cards, of_machine, of_the_way
from ollama_coordinator_agent.manifests import OnDisk
from ollama_coordinator_agent.metrics import Readings
from ollama_coordinator_agent.ollama import ModelList, Presence
from ollama_coordinator_agent.state import StateFolder
from ollama_coordinator_agent.watch import Facts
from ollama_coordinator_common.protocol import Finding
from ollama_coordinator_common.settings import CoordinatorConfig
from ollama_coordinator_common.types import Gpu, RunnerSettings
from support.agent_world import free_port

MODELS = ModelList(b"{}", (("m:latest", "", None),))
WELL = Facts(Presence.ANSWERING, "0.24.0", MODELS, ModelList(b"{}"), runner=RunnerSettings(1))
ON_CPU = ModelList(b'{"models":[{"name":"m:latest","size":5,"size_vram":0}]}')
ROOM = Readings(disk_free_bytes=10**12)
RTX = structs.replace(ROOM, gpus=[Gpu("RTX")])
HERE = Surroundings("http://127.0.0.1:11434", Path("/usr/bin/ollama"))
NVIDIA = Card("NVIDIA", "0000:01:00.0", "nvidia")


def bad(
    facts: Facts = WELL, readings: Readings = ROOM, around: Surroundings = HERE
) -> list[tuple[str, str, str]]:
    """The findings that are not ok, each as check, level and all of its words."""
    found = of_machine(facts, readings, around)
    return [
        (one.check, one.level, f"{one.text} → {one.remedy}") for one in found if one.level != "ok"
    ]


def away(presence: Presence, trouble: str = "") -> Facts:
    return Facts(presence, trouble=trouble)


@pytest.mark.spec("AGENT-63")
def test_a_machine_that_is_well_has_nothing_to_show() -> None:
    assert bad() == bad(WELL, RTX, structs.replace(HERE, cards=(NVIDIA,))) == []


@pytest.mark.spec("AGENT-63")
@pytest.mark.parametrize(
    ("facts", "around", "check", "words"),
    [
        (away(Presence.ABSENT), structs.replace(HERE, binary=None), "program", "install-ollama"),
        (
            away(Presence.ABSENT, "nothing listens at X"),
            structs.replace(HERE, may_start=False),
            "Ollama", "nothing listens at X → start `ollama serve`: AGENT_MANAGE_OLLAMA is false",
        ),
        (away(Presence.ABSENT), HERE, "Ollama", "run` starts /usr/bin/ollama"),
        (away(Presence.SILENT, "X ends the connection"), HERE, "Ollama", "X ends the connection →"),
        (away(Presence.FOREIGN), HERE, "Ollama", "set OLLAMA_PORT"),
        (structs.replace(WELL, version="0.9.6"), HERE, "version", "update it"),
        (structs.replace(WELL, runner=None), HERE, "settings", "the user that runs Ollama"),
        (structs.replace(WELL, tags=ModelList(b"{}")), HERE, "models", "pull one"),
        (
            structs.replace(WELL, disk=OnDisk(broken={"m:latest": "a file is missing"})),
            HERE, "files", "m:latest cannot run: a file is missing → pull it again",
        ),
        (structs.replace(WELL, left_behind="end process 7"), HERE, "runners", "end process 7"),
        (WELL, structs.replace(HERE, unkept="/x is read-only"), "state", "AGENT_STATE_DIR"),
        (WELL, structs.replace(HERE, skew_seconds=45.0), "clock", "about a minute ahead of"),
        (WELL, structs.replace(HERE, skew_seconds=-7300.0), "clock", "122 minutes behind"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found_with_what_to_do(
    facts: Facts, around: Surroundings, check: str, words: str
) -> None:
    found = {name: text for name, _, text in bad(facts, ROOM, around)}
    assert words in found[check]


@pytest.mark.spec("AGENT-63")
@pytest.mark.parametrize(
    ("card", "readings", "ps", "words"),
    [
        (structs.replace(NVIDIA, driver=""), ROOM, ON_CPU, "NVIDIA card at 0000:01:00.0 has no"),
        (structs.replace(NVIDIA, driver="nouveau"), ROOM, ON_CPU, "install NVIDIA's driver"),
        (NVIDIA, ROOM, ON_CPU, "--gpus all"),
        (NVIDIA, RTX, ON_CPU, "runs m:latest on the processor, although there is RTX"),
    ],
)
def test_a_gpu_is_seen_by_the_system_and_by_ollama(
    card: Card, readings: Readings, ps: ModelList, words: str
) -> None:
    facts, around = structs.replace(WELL, ps=ps), structs.replace(HERE, cards=(card,))
    ((check, _, text),) = bad(facts, readings, around)
    assert (check, words in text) == ("GPU", True)


@pytest.mark.spec("AGENT-63")
def test_little_disk_is_found() -> None:
    assert bad(readings=Readings(disk_free_bytes=3 * 10**9)) == [
        ("disk", "warning", "only 3 GB free → remove a model, or make room")
    ]
    ((check, level, _),) = bad(readings=Readings())
    assert (check, level) == ("disk", "note")


@pytest.mark.spec("AGENT-63")
def test_cards_are_what_the_kernel_lists(tmp_path: Path) -> None:
    drivers = tmp_path / "drivers" / "amdgpu"
    drivers.mkdir(parents=True)
    for name, kind, vendor in (
        ("0000:00:1f.0", "0x060100", "0x8086"),
        ("0000:01:00.0", "0x030000", "0x10de"),
        ("0000:03:00.0", "0x038000", "0x1002"),
        ("0000:04:00.0", "0x030000", "0x1af4"),
    ):
        device = tmp_path / "devices" / name
        device.mkdir(parents=True)
        (device / "class").write_text(f"{kind}\n")
        (device / "vendor").write_text(f"{vendor}\n")
    (tmp_path / "devices" / "0000:03:00.0" / "driver").symlink_to(drivers)
    (tmp_path / "devices" / "broken").mkdir()
    assert cards(tmp_path / "devices") == (
        Card("NVIDIA", "0000:01:00.0"), Card("AMD", "0000:03:00.0", "amdgpu")
    )  # fmt: skip
    assert cards(tmp_path / "none") == ()


@pytest.mark.spec("AGENT-63")
def test_a_state_folder_that_cannot_be_used_is_found(tmp_path: Path) -> None:
    assert StateFolder(tmp_path / "new" / "state", 1).unkept == ""
    (tmp_path / "file").write_text("")
    assert "no folder" in StateFolder(tmp_path / "file", 1).unkept


# ── the way to the coordinator ────────────────────────────────────────────────────────────────


async def way(url: str, certificate: str = "") -> list[Finding]:
    async with aiohttp.ClientSession() as session:
        client = CoordinatorClient(session, url, certificate=certificate)
        return [one async for one in of_the_way(client, certificate)]


@asynccontextmanager
async def coordinator(
    answer: web.Response, context: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    """The port of a server that answers everything so."""

    async def handle(request: web.Request) -> web.Response:
        return answer

    app = web.Application()
    app.router.add_get("/{path:.*}", handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port, ssl_context=context).start()
    try:
        yield port
    finally:
        await runner.cleanup()


@pytest.mark.spec("AGENT-63")
async def test_the_way_is_found_step_by_step() -> None:
    async with coordinator(web.json_response([])) as port:
        found = await way(f"http://localhost:{port}")
    assert [(one.check, one.level) for one in found] == [
        ("coordinator", "ok"), ("name", "ok"), ("route", "ok"), ("port", "ok"), ("key", "ok"),
    ]  # fmt: skip


@pytest.mark.spec("AGENT-63")
@pytest.mark.parametrize(
    ("url", "check", "words"),
    [
        ("http://no..name:80", "name", "no host no..name"),
        ("http://127.0.0.1:{port}", "port", "connection refused"),
    ],
)
async def test_the_first_step_that_fails_is_the_last(url: str, check: str, words: str) -> None:
    last = (await way(url.format(port=free_port())))[-1]
    assert (last.check, last.level) == (check, "failed")
    assert last.remedy
    assert words in last.text


ALONE = ["unshare", "--map-root-user", "--net"]


def can_be_alone() -> bool:
    """Whether a process can have a network of its own here, in which there is none."""
    return not (shutil.which("unshare") is None or subprocess.run([*ALONE, "true"]).returncode)


@pytest.mark.spec("AGENT-63")
@pytest.mark.skipif(not can_be_alone(), reason="no network namespaces here")
def test_a_machine_without_a_network_is_told_so(tmp_path: Path) -> None:
    program = "from ollama_coordinator_agent.main import app; app()"
    settings = {"COORDINATOR_URL": "http://192.0.2.1:8080", "AGENT_STATE_DIR": str(tmp_path)}
    done = subprocess.run(
        [*ALONE, sys.executable, "-c", program, "doctor", "--json"],
        env={**os.environ, **settings},
        capture_output=True,
    )
    found = {one.check: one for one in msgspec.json.decode(done.stdout, type=list[Finding])}
    assert (done.returncode, found["route"].level) == (1, "failed")
    assert found["route"].text == "this machine has no route to 192.0.2.1"
    assert "port" not in found


@pytest.mark.spec("AGENT-63")
async def test_a_key_that_is_wanted_is_found() -> None:
    refusal = web.json_response({"error": "a key is needed"}, status=401)
    async with coordinator(refusal) as port:
        last = (await way(f"http://127.0.0.1:{port}"))[-1]
    assert (last.check, last.level) == ("key", "failed")
    assert "a key is needed" in last.text
    assert "join-token create" in last.remedy


@pytest.mark.spec("AGENT-63")
async def test_a_certificate_that_is_not_believed_is_found(tmp_path: Path) -> None:
    Tls(CoordinatorConfig(database_url=f"sqlite:///{tmp_path}/a.db", tls="self"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "a.db.tls.pem")
    async with coordinator(web.json_response([]), context) as port:
        url = f"https://127.0.0.1:{port}"
        unknown, other = (await way(url))[-1], (await way(url, "00" * 32))[-1]
    assert (unknown.check, "vouched for by nobody" in unknown.text) == ("TLS", True)
    assert (other.check, "not the one that is believed" in other.text) == ("TLS", True)
    async with coordinator(web.json_response([])) as port:
        plain = (await way(f"https://127.0.0.1:{port}"))[-1]
    assert (plain.check, plain.text) == ("TLS", "it speaks no TLS there: http in place of https?")


@pytest.mark.spec("AGENT-63")
async def test_the_coordinators_clock_is_compared() -> None:
    date = formatdate(time.time() - 3600, usegmt=True)
    async with coordinator(web.json_response([], headers={"Date": date})) as port:
        async with aiohttp.ClientSession() as session:
            client = CoordinatorClient(session, f"http://127.0.0.1:{port}")
            await client.agents()
            assert client.skew_seconds == pytest.approx(3600, abs=30)


@pytest.mark.spec("AGENT-63")
def test_findings_fit_a_terminal_of_80_columns_and_steer_none() -> None:
    screen = Console(width=80)
    with screen.capture() as capture:
        screen.print(render_finding(Finding("name", "failed", "x " * 90 + "\x1b[2J", "do it")))
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert ("→ do it" in lines[-1], "\x1b" in capture.get()) == (True, False)
