"""Links between machines with firewalls: Linux network namespaces, and nftables inside of them."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from support import programs
from support.deadline import DEADLINE_SECONDS

COORDINATOR, MACHINE = "10.77.0.1", "10.77.0.2"
OLLAMA_PORT, PORT = 11434, 8080

SHUT = """
table inet shut {
  chain input { type filter hook input priority 0; policy drop;
    iif lo accept
    ct state established,related accept
  }
}
"""
"""A firewall that drops whatever comes in unasked, as those of laptops and routers do."""

DEAF = """
table inet deaf {
  chain input { type filter hook input priority 0; policy drop; iif lo accept; }
  chain output { type filter hook output priority 0; policy drop; oif lo accept; }
}
"""
"""Every packet is lost, both ways."""

CLIENT = """
import http.client, json, sys, time
options = {"num_predict": int(sys.argv[1])}
body = json.dumps({"model": "llama3.2", "prompt": "x", "options": options})
began = time.monotonic()
while time.monotonic() - began < 60:
    try:
        connection = http.client.HTTPConnection("10.77.0.1", 8080, timeout=60)
        connection.request("POST", "/api/generate", body)
        answer = connection.getresponse()
        if answer.status == 200:
            break
    except OSError:
        pass
    time.sleep(0.05)
for line in answer:
    sys.stdout.buffer.write(line)
    sys.stdout.flush()
"""


def have_namespaces() -> str:
    """Why there can be none; empty where there can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "needs root"
    if missing := [name for name in ("ip", "nft") if shutil.which(name) is None]:
        return f"needs {', '.join(missing)} (Debian: iproute2, nftables)"
    tried = subprocess.run(["ip", "netns", "add", "link-probe"], capture_output=True)
    subprocess.run(["ip", "netns", "del", "link-probe"], capture_output=True)
    return "" if tried.returncode == 0 else "this system allows no network namespaces"


pytestmark = pytest.mark.skipif(bool(have_namespaces()), reason=have_namespaces() or "")


NAT = """
table ip nat {
  chain out { type nat hook postrouting priority 100;
    oifname "outside" masquerade
  }
}
table inet shut {
  chain input { type filter hook input priority 0; policy drop;
    ct state established,related accept
  }
  chain forward { type filter hook forward priority 0; policy drop;
    iifname "inside" accept
    ct state established,related accept
  }
}
"""
"""A router that hides a network behind its own address, as those of homes and clouds do."""

FORGETS_SECONDS = 20


@pytest.fixture
def routed(network: "Network") -> Iterator["Network"]:
    """The machine behind a router that forgets a connection after 20 silent seconds."""
    router = f"link-r-{os.getpid()}"
    _run("ip", "netns", "add", router)
    try:
        _run("ip", "-n", network.machine, "link", "set", "cable", "netns", router)
        _run("ip", "-n", router, "link", "set", "cable", "name", "outside")
        _run(
            *("ip", "-n", router, "link", "add", "inside", "type", "veth"),
            *("peer", "name", "cable", "netns", network.machine),
        )
        for place, address, card in (
            (router, MACHINE, "outside"),
            (router, "192.168.77.1", "inside"),
            (network.machine, "192.168.77.2", "cable"),
        ):
            _run("ip", "-n", place, "address", "add", f"{address}/24", "dev", card)
            _run("ip", "-n", place, "link", "set", card, "up")
        _run("ip", "-n", network.machine, "route", "add", "default", "via", "192.168.77.1")
        inside = ("ip", "netns", "exec", router)
        subprocess.run([*inside, "nft", "-f", "-"], input=NAT.encode(), check=True)
        for setting, value in (
            ("net.ipv4.ip_forward", 1),
            ("net.netfilter.nf_conntrack_tcp_timeout_established", FORGETS_SECONDS),
            ("net.netfilter.nf_conntrack_tcp_loose", 0),  # what it has forgotten is dropped
        ):
            _run(*inside, "sysctl", "-qw", f"{setting}={value}")
        yield network
    finally:
        subprocess.run(["ip", "netns", "del", router], check=False)


class Network:
    """Two namespaces with a cable between them: the coordinator's and the machine's."""

    def __init__(self) -> None:
        self.center, self.machine = f"link-c-{os.getpid()}", f"link-m-{os.getpid()}"

    def __enter__(self) -> "Network":
        for name in (self.center, self.machine):
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        _run(
            *("ip", "-n", self.center, "link", "add", "cable", "type", "veth"),
            *("peer", "name", "cable", "netns", self.machine),
        )
        for name, address in ((self.center, COORDINATOR), (self.machine, MACHINE)):
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "cable")
            _run("ip", "-n", name, "link", "set", "cable", "up")
        self.filter(SHUT)
        return self

    def __exit__(self, *raised: object) -> None:
        for name in (self.center, self.machine):
            subprocess.run(["ip", "netns", "del", name], check=False)

    def filter(self, rules: str) -> None:
        """Add a table to the machine's firewall."""
        command = ["ip", "netns", "exec", self.machine, "nft", "-f", "-"]
        subprocess.run(command, input=rules.encode(), check=True)

    def unfilter(self, table: str) -> None:
        """Remove one."""
        _run("ip", "netns", "exec", self.machine, "nft", "delete", "table", "inet", table)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


@pytest.fixture
def network() -> Iterator[Network]:
    with Network() as network:
        yield network


Started = AbstractAsyncContextManager[programs.Program]


class Machines:
    """The programs of both namespaces."""

    def __init__(self, network: Network, folder: Path) -> None:
        self.network = network
        self._folder = folder

    def run(
        self, place: str, name: str, *command: str, **environment: str
    ) -> AbstractAsyncContextManager[programs.Program]:
        """Run a program in a namespace during a block."""
        inside = ("ip", "netns", "exec", place, *command)
        return programs.program(self._folder / f"{name}.log", *inside, **environment)

    def agent(self, **settings: str) -> Started:
        """The agent; without settings it finds out by itself how it is reached."""
        state = str(self._folder / "state")
        return self.run(
            self.network.machine, "agent", programs.command("ollama-coordinator-agent"),
            **{
                "COORDINATOR_URL": f"http://{COORDINATOR}:{PORT}", "AGENT_STATE_DIR": state,
                "AGENT_MANAGE_OLLAMA": "false", **settings,
            },
        )  # fmt: skip

    @asynccontextmanager
    async def client(self, tokens: int) -> AsyncIterator[asyncio.StreamReader]:
        """A client that asks until it is served; the records of its answer."""
        process = await asyncio.create_subprocess_exec(
            *(
                "ip",
                "netns",
                "exec",
                self.network.center,
                sys.executable,
                "-c",
                CLIENT,
                str(tokens),
            ),
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                yield process.stdout
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


@pytest.fixture
async def machines(network: Network, tmp_path: Path) -> AsyncIterator[Machines]:
    """A coordinator, and an Ollama on the loopback of the machine behind the firewall."""
    machines = Machines(network, tmp_path)
    settings = {"COORDINATOR_HOST": COORDINATOR, "COORDINATOR_PORT": str(PORT)}
    settings["DATABASE_URL"] = f"sqlite:///{tmp_path}/coordinator.db"
    command = [sys.executable, "-m", "support.ollama", "--port", str(OLLAMA_PORT)]
    command += ["--model", "llama3.2=5e9", "--decode-rate", "20"]
    path = str(Path(__file__).parents[1])
    async with (
        machines.run(
            network.center, "coordinator", programs.command("ollama-coordinator"), **settings
        ) as coordinator,
        machines.run(network.machine, "ollama", *command, PYTHONPATH=path),
    ):
        await coordinator.says("coordinator listens")
        yield machines


MOVED = "10.77.0.9"


@pytest.mark.spec("JOIN-9")
@pytest.mark.skipif(find_spec("zeroconf") is None, reason="needs zeroconf, an extra")
async def test_a_coordinator_is_found_by_multicast_dns_and_found_again_once_it_has_moved(
    network: Network, tmp_path: Path
) -> None:
    machines = Machines(network, tmp_path)
    network.unfilter("shut")  # an answer to a question to all looks unasked

    def coordinator(name: str, port: int) -> Started:
        return machines.run(
            network.center, name, programs.command("ollama-coordinator"),
            COORDINATOR_PORT=str(port), DATABASE_URL=f"sqlite:///{tmp_path}/{name}.db",
        )  # fmt: skip

    async with coordinator("first", PORT) as first, coordinator("second", 8081) as second:
        await first.says("announced on the network")
        await second.says("announced on the network")
        async with machines.agent(COORDINATOR_URL="") as agent:
            # Which one is meant?
            await agent.says("several coordinators answer on the network")
            await second.kill()
            await agent.says(f"found the coordinator url=http://{COORDINATOR}:{PORT} ")
            await first.says("agent registered")
            async with coordinator("second", 8081) as second:
                await second.says("announced on the network")
                await first.kill()
                await agent.says("another one is not followed")
                for verb, address in (("del", COORDINATOR), ("add", MOVED)):
                    where = (f"{address}/24", "dev", "cable")
                    _run("ip", "-n", network.center, "address", verb, *where)
                async with coordinator("first", 9090) as first:
                    await agent.says(f"found the coordinator url=http://{MOVED}:9090 ")
                    await first.says("agent updated")
                assert "agent registered" not in second.output


@pytest.mark.spec("LINK-3")
async def test_behind_a_firewall_that_drops_it_is_served_in_ten_seconds_and_then_in_three(
    machines: Machines,
) -> None:
    for number, most in enumerate((10, 3), start=1):
        async with machines.client(1) as out, machines.agent() as agent:
            # A busy machine needs seconds to load a Python program: from its first look on.
            await agent.says_so_often("Ollama: running", number)
            began = time.monotonic()
            await out.readline()
            took = time.monotonic() - began
            agent.send(signal.SIGTERM)
            assert await agent.ended() == 0
        print(f"served {took:.1f} s after the agent's start")
        assert took < most, agent.output


NEIGHBOUR = """
import socket, sys
peer = socket.create_connection(("10.77.0.2", int(sys.argv[1])), timeout=60)
peer.sendall(b"GET /api/tags HTTP/1.1\\r\\nHost: 127.0.0.1\\r\\nConnection: close\\r\\n\\r\\n")
try:
    print(peer.recv(4096))
except ConnectionResetError:
    print(b"")
"""


@pytest.mark.spec("AGENT-84")
async def test_another_program_on_the_coordinators_machine_does_not_get_through_the_relay(
    machines: Machines,
) -> None:
    machines.network.unfilter("shut")
    async with machines.agent(AGENT_TRANSPORT="direct") as agent, machines.client(1) as out:
        assert await out.readline()
        port = agent.output.partition("relaying the coordinator to Ollama port=")[2].split()[0]
        neighbour = await asyncio.create_subprocess_exec(
            *("ip", "netns", "exec", machines.network.center, sys.executable, "-c", NEIGHBOUR),
            port,
            stdout=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(DEADLINE_SECONDS):
            said, _ = await neighbour.communicate()
            assert said.strip() == b"b''"
            await agent.says("the relay refused a peer")
        async with machines.client(1) as out:
            assert await out.readline()


@pytest.mark.spec("LINK-2")
async def test_a_router_that_forgets_silent_connections_forgets_none_of_a_link(
    routed: Network, machines: Machines
) -> None:
    async with machines.agent() as agent, machines.client(1) as out:
        await out.readline()
        # The parked connections are silent for longer than the router remembers.
        await asyncio.sleep(FORGETS_SECONDS * 1.5)
        for _ in range(3):
            began = time.monotonic()
            async with machines.client(1) as again:
                assert await again.readline()
            assert time.monotonic() - began < 3
        assert "has ended" not in agent.output


@pytest.mark.spec("LINK-6")
@pytest.mark.parametrize("how", ["packets lost", "agent stopped"])
async def test_a_silent_machine_is_found_within_four_seconds_and_comes_back(
    machines: Machines, how: str
) -> None:
    async with machines.agent() as agent, machines.client(400) as out:
        await out.readline()
        await out.readline()
        began = time.monotonic()
        if how == "packets lost":
            machines.network.filter(DEAF)
        else:
            agent.send(signal.SIGSTOP)
        *_, last = (await out.read()).splitlines()
        took = time.monotonic() - began
        print(f"{how}: noticed after {took:.1f} s")
        assert "its link has ended" in json.loads(last)["error"]
        assert took < 4.5
        if how == "packets lost":
            machines.network.unfilter("deaf")
        else:
            agent.send(signal.SIGCONT)
        async with machines.client(1) as again:
            assert await again.readline()


@pytest.mark.spec("LINK-5")
async def test_an_agent_that_is_killed_is_gone_at_once(machines: Machines) -> None:
    async with machines.agent() as agent, machines.client(400) as out:
        await out.readline()
        await out.readline()
        began = time.monotonic()
        await agent.kill()
        *_, last = (await out.read()).splitlines()
        assert "error" in json.loads(last)
        assert time.monotonic() - began < 1


CARD = """
import socket
card = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3))
own = open("/sys/class/net/cable/address").read().strip()
wanted = b"\\xff" * 6 + bytes.fromhex(own.replace(":", "")) * 16
print("listens", flush=True)
while wanted not in card.recv(2000):
    pass
print("magic packet", flush=True)
"""
"""A network card: it sees what the firewall of a machine that sleeps does not."""


@pytest.mark.spec("FLEET-81")
@pytest.mark.spec("FLEET-82")
@pytest.mark.spec("FLEET-83")
async def test_a_machine_that_went_away_is_woken_by_its_network_and_serves(
    network: Network, tmp_path: Path
) -> None:
    machines = Machines(network, tmp_path)
    network.unfilter("shut")
    for place, address in ((network.center, COORDINATOR), (network.machine, MACHINE)):
        _run("ip", "-n", place, "address", "del", f"{address}/24", "dev", "cable")
        _run("ip", "-n", place, "address", "add", f"{address}/24", "brd", "+", "dev", "cable")
    state = tmp_path / "state"
    state.mkdir()
    (state / f"agent-{OLLAMA_PORT}.json").write_text('{"slept": true}')
    ollama = [sys.executable, "-m", "support.ollama", "--port", str(OLLAMA_PORT)]
    path = str(Path(__file__).parents[1])
    async with (
        machines.run(
            network.center,
            "coordinator",
            programs.command("ollama-coordinator"),
            COORDINATOR_HOST=COORDINATOR,
            COORDINATOR_PORT=str(PORT),
            AGENT_TIMEOUT="3",
            DATABASE_URL=f"sqlite:///{tmp_path}/coordinator.db",
        ) as coordinator,
        machines.run(
            network.machine, "ollama", *ollama, "--model", "llama3.2=5e9", PYTHONPATH=path
        ),
    ):
        await coordinator.says("coordinator listens")
        world = [sys.executable, "-m", "support.agent_world", f"http://{COORDINATOR}:{PORT}"]
        world += [str(OLLAMA_PORT), str(state)]
        async with machines.run(network.machine, "agent", *world, PYTHONPATH=path):
            await coordinator.says("agent registered")
            async with machines.run(network.machine, "card", sys.executable, "-c", CARD) as card:
                await card.says("listens")
                network.filter(DEAF)
                await coordinator.says("agent sleeps")
                async with machines.client(1) as out:
                    await card.says("magic packet")
                    network.unfilter("deaf")
                    assert await out.readline()
        assert "was not woken" not in coordinator.output
