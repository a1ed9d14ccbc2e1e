"""Four machines behind one slow line to a registry of models: what crosses it, and for how long.

Network namespaces: four machines and the coordinator on a bridge, and beyond it the registry, at
the other end of a line that `tc` limits. Everything runs as programs; `ip -s` counts the bytes.
"""

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from support import programs
from support.deadline import DEADLINE_SECONDS


def missing() -> str:
    """Why there can be no such network; empty where there can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "needs root"
    if absent := [name for name in ("ip", "tc", "nft") if shutil.which(name) is None]:
        return f"needs {', '.join(absent)} (Debian: iproute2, nftables)"
    probe = f"uplink-probe-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", probe], capture_output=True)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True)
    return "" if tried.returncode == 0 else "this system allows no network namespaces"


pytestmark = [
    pytest.mark.chaos,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(missing()), reason=missing() or ""),
]

MACHINES = 4
SIZE = 10_000_000
"""Of each model: four seconds of the line."""

MODELS = ("each", "one", "killed", "cut", "spoilt", "full", "linked")
UPLINK, SLOW, FAST = "20mbit", "50mbit", "10gbit"
"""The line; and a machine's cable, slow where its death has to fall into a transfer."""

CENTER, REGISTRY, FILES = "10.78.0.1", "10.79.0.2", "10.79.0.3"
PORT, OLLAMA_PORT = 8080, 11434
FULL = 3
"""The machine whose disk is full at times, and which has a firewall at last."""

MOST_BYTES = 1.15 * SIZE
"""One copy, with the heads of its packets."""

SHUT = """
table inet shut {
  chain input { type filter hook input priority 0; policy drop;
    iif lo accept
    ct state established,related accept
  }
}
"""

CLIENT = """
import http.client, sys
host, port, method, path, body = sys.argv[1:]
connection = http.client.HTTPConnection(host, int(port), timeout=120)
connection.request(method, path, body)
answer = connection.getresponse()
print(answer.status, flush=True)
for line in answer:
    sys.stdout.buffer.write(line)
    sys.stdout.flush()
"""


def _run(*command: str, given: str = "") -> str:
    done = subprocess.run(command, check=True, input=given.encode(), stdout=subprocess.PIPE)
    return done.stdout.decode()


class Site:
    """The namespaces, and the programs in them."""

    def __init__(self, folder: Path, stack: AsyncExitStack) -> None:
        pid = os.getpid()
        self.center, self.far = f"uplink-c-{pid}", f"uplink-r-{pid}"
        self.machines = [f"uplink-{number}-{pid}" for number in range(MACHINES)]
        self.folder = folder
        self.ollamas: dict[int, programs.Program] = {}
        self.agents: dict[int, programs.Program] = {}
        self._stack = stack
        self._started = 0

    # ── the network ───────────────────────────────────────────────────────────────────────────

    @contextmanager
    def network(self) -> Iterator[None]:
        places = [self.center, self.far, *self.machines]
        try:
            for place in places:
                _run("ip", "netns", "add", place)
                _run("ip", "-n", place, "link", "set", "lo", "up")
            self._lay()
            yield
        finally:
            for place in places:
                subprocess.run(["ip", "netns", "del", place], check=False, capture_output=True)

    def _lay(self) -> None:
        _run("ip", "-n", self.center, "link", "add", "lan", "type", "bridge")
        for number, place in enumerate(self.machines):
            card = f"m{number}"
            self._cable(card, place)
            _run("ip", "-n", self.center, "link", "set", card, "master", "lan")
            self._address(place, "cable", f"{self.address(number)}/24")
            _run("ip", "-n", place, "route", "add", "default", "via", CENTER)
        self._address(self.center, "lan", f"{CENTER}/24")
        self._cable("uplink", self.far)
        self._address(self.center, "uplink", "10.79.0.1/24")
        for address in (REGISTRY, FILES):
            self._address(self.far, "cable", f"{address}/24")
        _run("ip", "-n", self.far, "route", "add", "10.78.0.0/24", "via", "10.79.0.1")
        _run("ip", "netns", "exec", self.center, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        self.limit(self.center, "uplink", UPLINK)
        self.limit(self.far, "cable", UPLINK)

    def _cable(self, name: str, place: str) -> None:
        ends = ("type", "veth", "peer", "name", "cable", "netns", place)
        _run("ip", "-n", self.center, "link", "add", name, *ends)
        _run("ip", "-n", self.center, "link", "set", name, "up")

    def _address(self, place: str, card: str, address: str) -> None:
        _run("ip", "-n", place, "address", "add", address, "dev", card)
        _run("ip", "-n", place, "link", "set", card, "up")

    def limit(self, place: str, card: str, rate: str) -> None:
        shape = ("tbf", "rate", rate, "burst", "64kb", "latency", "100ms")
        _run("tc", "-n", place, "qdisc", "replace", "dev", card, "root", *shape)

    def address(self, number: int) -> str:
        return f"10.78.0.{10 + number}"

    def came_over(self, card: str) -> int:
        """The bytes that the center has got over one of its cards."""
        shown = json.loads(_run("ip", "-n", self.center, "-s", "-j", "link", "show", card))
        return int(shown[0]["stats64"]["rx"]["bytes"])

    # ── programs ──────────────────────────────────────────────────────────────────────────────

    async def start(
        self, place: str, name: str, *command: str, **environment: str
    ) -> programs.Program:
        self._started += 1
        log = self.folder / f"{self._started}-{name}.log"
        path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        run = programs.program(
            log, "ip", "netns", "exec", place, *command, **{"PYTHONPATH": path, **environment}
        )
        return await self._stack.enter_async_context(run)

    def store(self, number: int) -> Path:
        return self.folder / f"models-{number}"

    async def start_machine(self, number: int) -> None:
        place, folder = self.machines[number], str(self.store(number))
        options = ("--host", "0.0.0.0", "--port", str(OLLAMA_PORT), "--models-path", folder)
        self.ollamas[number] = await self.start(
            place, f"ollama-{number}", sys.executable, "-m", "support.ollama", *options,
            OLLAMA_MODELS=folder,
        )  # fmt: skip
        await self.ollamas[number].says("control")
        await self.start_agent(number)

    async def start_agent(self, number: int, **settings: str) -> None:
        self.agents[number] = await self.start(
            self.machines[number], f"agent-{number}", programs.command("ollama-coordinator-agent"),
            COORDINATOR_URL=f"http://{CENTER}:{PORT}", AGENT_MACHINE_NAME=f"machine-{number}",
            AGENT_STATE_DIR=str(self.folder / f"state-{number}"), AGENT_MANAGE_OLLAMA="false",
            **settings,
        )  # fmt: skip

    async def kill(self, number: int) -> None:
        """Its programs die."""
        await self.agents[number].kill()
        await self.ollamas[number].kill()

    def pull_plug(self, number: int, *, out: bool = True) -> None:
        """Its cable falls out, or is put in again."""
        way = "down" if out else "up"
        _run("ip", "-n", self.center, "link", "set", f"m{number}", way)

    async def given(self, number: int, more: int) -> None:
        """Wait until a machine has given away so many bytes more."""
        before = self.came_over(f"m{number}")
        async with asyncio.timeout(DEADLINE_SECONDS):
            while self.came_over(f"m{number}") - before < more:
                await asyncio.sleep(0.02)

    async def ask(
        self, path: str, body: object = None, *, host: str = CENTER, port: int = PORT
    ) -> list[Any]:
        """The lines of an answer."""
        method = "GET" if body is None else "POST"
        text = "" if body is None else json.dumps(body)
        process = await asyncio.create_subprocess_exec(
            *("ip", "netns", "exec", self.center, sys.executable, "-c", CLIENT),
            *(host, str(port), method, path, text),
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            out, _ = await process.communicate()
        finally:
            with suppress(ProcessLookupError):
                process.kill()
        status, *lines = out.splitlines()
        assert status in (b"200", b"202"), out
        return [json.loads(line) for line in lines]

    async def pull(self, model: str, placement: str = "all", **more: object) -> str:
        """What a pull through the coordinator says."""
        body = {"model": f"{REGISTRY}/library/{model}", "insecure": True, **more}
        async with asyncio.timeout(DEADLINE_SECONDS * 2):
            lines = await self.ask(f"/api/pull?placement={placement}", body)
        said = dict.fromkeys(str(one.get("status") or one) for one in lines)
        return "\n".join(one for one in said if not one.startswith("pulling "))

    async def copy(self, model: str, *numbers: int) -> dict[str, Any]:
        """Have machines get a model from the others; the operation, once it has ended."""
        order = {
            "kind": "pull", "model": f"{REGISTRY}/library/{model}", "from": "fleet",
            "placement": "agents:" + ",".join(f"machine-{number}" for number in numbers),
        }  # fmt: skip
        [started] = await self.ask("/api/operations", order)
        async with asyncio.timeout(DEADLINE_SECONDS):
            while True:
                [seen] = await self.ask(f"/api/operations/{started['id']}")
                if seen["state"] != "running":
                    return dict(seen)
                await asyncio.sleep(0.1)

    async def until_ready(self, *, linked: int = 0) -> None:
        """Wait until all machines have reported, so many of them by a link."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            while True:
                [agents] = await self.ask("/api/agents")
                there = [one for one in agents if one["status"] == "online"]
                there = [one for one in there if one.get("memory_total_bytes")]
                if len(there) == MACHINES and sum(one["link"] for one in there) == linked:
                    return
                await asyncio.sleep(0.1)

    @contextmanager
    def disk(self, number: int) -> Iterator[None]:
        """A disk of a machine's own, for its models."""
        self.store(number).mkdir()
        _run("mount", "-t", "tmpfs", "-o", "size=2g", "tmpfs", str(self.store(number)))
        try:
            yield
        finally:
            subprocess.run(["umount", "-l", str(self.store(number))], check=False)

    def resize_disk(self, number: int, free: int | None = None) -> None:
        """Leave so many bytes free of it, or many."""
        seen = os.statvfs(self.store(number))
        used = (seen.f_blocks - seen.f_bfree) * seen.f_frsize
        size = 2 * 1024**3 if free is None else used + free
        _run("mount", "-o", f"remount,size={size}", str(self.store(number)))

    def lacks(self, number: int, model: str) -> str:
        """What a machine lacks of a model, or has too much; empty: it has all of it."""
        manifests = self.store(number) / "manifests"
        if passing := list(manifests.glob("*/transfer-*/*/*")):
            return f"machine-{number} still has {passing}"
        file = manifests / REGISTRY / "library" / model / "latest"
        if not file.exists():
            return f"machine-{number} has no {model}"
        read = json.loads(file.read_bytes())
        for one in [*read["layers"], read["config"]]:
            blob = self.store(number) / "blobs" / one["digest"].replace(":", "-")
            if f"sha256:{hashlib.sha256(blob.read_bytes()).hexdigest()}" != one["digest"]:
                return f"machine-{number} has another {blob}"
        return ""

    def lacking(self, model: str, numbers: Iterable[int] = range(MACHINES)) -> list[str]:
        return [text for number in numbers if (text := self.lacks(number, model))]

    def weights(self, number: int, model: str) -> Path:
        file = self.store(number) / "manifests" / REGISTRY / "library" / model / "latest"
        digest = str(json.loads(file.read_bytes())["layers"][0]["digest"])
        return self.store(number) / "blobs" / digest.replace(":", "-")


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        site = Site(tmp_path, stack)
        stack.enter_context(site.network())
        stack.enter_context(site.disk(FULL))
        models = [f"{name}={SIZE}" for name in MODELS]
        registry = await site.start(
            site.far, "registry", sys.executable, "-m", "support.model_registry", REGISTRY, FILES,
            *models,
        )  # fmt: skip
        coordinator = await site.start(
            site.center, "coordinator", programs.command("ollama-coordinator"), "serve",
            COORDINATOR_HOST="0.0.0.0", COORDINATOR_PORT=str(PORT),
            DATABASE_URL=f"sqlite:///{tmp_path}/coordinator.db",
        )  # fmt: skip
        await registry.says("serves")
        await coordinator.says("coordinator listens")
        for number in range(MACHINES):
            await site.start_machine(number)
        await site.until_ready()
        yield site


@pytest.mark.spec("SURFACE-76")
@pytest.mark.spec("SURFACE-77")
async def test_one_copy_crosses_the_line_whatever_befalls_the_machines(site: Site) -> None:
    at, before = 0.0, 0

    def begin() -> None:
        nonlocal at, before
        at, before = time.monotonic(), site.came_over("uplink")

    def note(what: str) -> int:
        came = site.came_over("uplink") - before
        took = time.monotonic() - at
        print(f"{what}: {took:.1f} s, {came / SIZE:.2f} copies over the line")
        return came

    begin()
    each = {"model": f"http://{REGISTRY}/library/each", "insecure": True}
    await asyncio.gather(
        *(
            site.ask("/api/pull", each, host=site.address(number), port=OLLAMA_PORT)
            for number in range(MACHINES)
        )
    )
    note("four downloads")
    assert site.lacking("each") == []

    begin()
    said = await site.pull("one")
    assert note("one pull onto four machines") < MOST_BYTES, said
    assert site.lacking("one") == []

    begin()
    said = await site.pull("killed", "agents:machine-0,machine-1")
    note("one pull onto two machines")
    for number in (0, 1):
        site.limit(site.machines[number], "cable", SLOW)
    begin()
    copying = asyncio.create_task(site.copy("killed", 2, 3))
    await site.given(0, SIZE // 4)
    await site.kill(0)
    ended = await copying
    assert note("two copies, one of two givers killed meanwhile") < SIZE / 10
    assert ended["state"] == "done", json.dumps(ended)
    assert site.lacking("killed", (2, 3)) == [], json.dumps(ended)
    await site.start_machine(0)
    await site.until_ready()

    begin()
    said = await site.pull("cut", "agents:machine-0,machine-1")
    begin()
    copying = asyncio.create_task(site.copy("cut", 2, 3))
    await site.given(0, SIZE // 4)
    site.pull_plug(0)
    ended = await copying
    assert note("two copies, the cable of one of two givers out meanwhile") < SIZE / 10
    assert ended["state"] == "done", json.dumps(ended)
    assert site.lacking("cut", (2, 3)) == [], json.dumps(ended)
    site.pull_plug(0, out=False)
    for number in (0, 1):
        site.limit(site.machines[number], "cable", FAST)
    await site.until_ready()

    said = await site.pull("spoilt", "agents:machine-0,machine-1")
    file = site.weights(0, "spoilt")
    file.write_bytes(b"?" + file.read_bytes()[1:])
    begin()
    ended = await site.copy("spoilt", 2, 3)
    assert note("two copies, the file of one of two givers spoilt") < SIZE / 10
    assert ended["state"] == "done", json.dumps(ended)
    assert site.lacking("spoilt", (2, 3)) == [], json.dumps(ended)

    begin()
    pulling = asyncio.create_task(site.pull("full"))
    while site.came_over("uplink") - before < SIZE // 4:
        await asyncio.sleep(0.02)
    site.resize_disk(FULL, SIZE // 2)
    said = await pulling
    assert note("one pull, the disk of one of four machines full meanwhile") < MOST_BYTES, said
    assert "no space left" in said, said
    assert said.endswith("success")
    assert site.lacking("full") == [f"machine-{FULL} has no full"]
    site.resize_disk(FULL)
    ended = await site.copy("full", FULL)
    assert ended["state"] == "done", json.dumps(ended)
    assert site.lacking("full") == []

    await site.agents[FULL].kill()
    _run("ip", "netns", "exec", site.machines[FULL], "nft", "-f", "-", given=SHUT)
    await site.start_agent(FULL, AGENT_TRANSPORT="link")
    await site.until_ready(linked=1)
    begin()
    said = await site.pull("linked", f"agents:machine-{FULL}")
    ended = await site.copy("linked", 0, 1, 2)
    assert note("one download by a linked machine, and three copies") < MOST_BYTES, said
    assert ended["state"] == "done", json.dumps(ended)
    assert site.lacking("linked") == []
