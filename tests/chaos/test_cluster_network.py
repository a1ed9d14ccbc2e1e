"""Three coordinators behind HAProxy in network namespaces: one fault after the other.

A client asks in a loop and repeats what it got no whole answer to because its connection ended, and
nothing else. In the end clients, the history and the machines are counted against each other.
"""

import asyncio
import json
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from support import programs
from support.databases import PostgresSchema
from support.deadline import DEADLINE_SECONDS
from support.switch import SWITCH, Switch, have_namespaces

WHY_NOT = have_namespaces("haproxy", "curl")

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "-"),
]

AWAY_SECONDS = float(os.environ.get("AWAY_SECONDS", "60"))
"""How long the database is away."""

CUT_SECONDS = 10.0
"""How long a cable is out, and a process frozen: more than all that others wait for it."""

WRITTEN_SECONDS = 3.0
"""What ended so shortly before its leader was lost may be missing from the history."""

REFERENCE = Path(__file__).parents[2] / "packages" / "coordinator" / "README.md"
TESTS = str(Path(__file__).parents[1])
CONTROL_PORT = 11500

CLIENTS = """
import asyncio, json, sys, time
import aiohttp

async def ask(session, name):
    body = {"model": "llama3.2", "prompt": name, "options": {"num_predict": 12}}
    async with session.post(sys.argv[1] + "/api/generate", json=body,
                            headers={"User-Agent": name}) as answer:
        began, lines = time.time(), (await answer.read()).splitlines()
        end = f"{answer.status} {lines[-1:]}"
        if answer.status == 200 and lines and json.loads(lines[-1]).get("done"):
            end = "served"
        return answer.headers.get("X-Ollama-Coordinator-Request"), began, end

async def client(session, number):
    count = 0
    while True:
        count += 1
        name, cuts = f"client-{number}-{count}", []
        while True:
            try:
                asked = time.time()
                request, began, end = await ask(session, name)
                break
            except (aiohttp.ClientError, ConnectionError) as exc:
                cuts.append([asked, time.time(), type(exc).__name__])
                await asyncio.sleep(0.05)
        print(json.dumps([name, cuts, request, began, time.time(), end, asked]), flush=True)

async def main():
    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        await asyncio.gather(*(client(session, number) for number in range(int(sys.argv[2]))))

asyncio.run(main())
"""
"""Each line that they write is a request: its name, the connections that it lost, and its end."""


def balancer(coordinators: list[str]) -> str:
    """HAProxy's settings as the reference has them."""
    [block] = re.findall(r"```haproxy\n(.*?)```", REFERENCE.read_text("utf-8"), re.DOTALL)
    head, *_ = block.partition("  server a ")
    servers = [f"  server c{at} {one}:8080" for at, one in enumerate(coordinators)]
    return "\n".join([head.rstrip(" \n").replace(":8080", f"{SWITCH}:8080"), *servers, ""])


def way_to_database(server: str) -> str:
    """HAProxy's settings for a port on the switch that is the server's socket."""
    from psycopg.conninfo import conninfo_to_dict

    given = conninfo_to_dict(server)
    host, port = str(given.get("host", "")), given.get("port", "5432")
    if not host.startswith("/"):
        pytest.skip("needs a PostgreSQL server that listens on a Unix socket")
    return f"""
listen database
  mode tcp
  bind {SWITCH}:5432
  timeout connect 3s
  timeout client 24h
  timeout server 24h
  server socket unix@{host}/.s.PGSQL.{port}
"""


class World:
    """All that runs, and what is asked of it from the switch."""

    def __init__(self, switch: Switch, folder: Path, postgres: PostgresSchema) -> None:
        self.switch = switch
        self.folder = folder
        self.coordinators = [switch.machine() for _ in range(3)]
        self.agents = [switch.machine() for _ in range(5)]
        self.running: dict[str, programs.Program] = {}
        self._stack = AsyncExitStack()
        self._postgres = postgres

    async def __aenter__(self) -> "World":
        database, balancing = self.folder / "database.cfg", self.folder / "balancer.cfg"
        database.write_text(way_to_database(os.environ["TEST_DATABASE_URL"]))
        balancing.write_text(balancer(self.coordinators))
        await self.start("database", SWITCH, "haproxy", "-db", "-f", str(database))
        for number, address in enumerate(self.coordinators):
            await self.coordinator(address)
            said = "stands by" if number else "coordinator leads"
            await self.running[address].says(said)
        await self.start("balancer", SWITCH, "haproxy", "-db", "-f", str(balancing))
        for number, address in enumerate(self.agents):
            await self.agent(address, "link" if number % 2 else "direct")
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self._stack.aclose()

    async def start(self, name: str, address: str, *command: str, **environment: str) -> None:
        run = self.switch.run(address, name, *command, **environment)
        self.running[name] = await self._stack.enter_async_context(run)

    async def restart_database(self, seconds: float) -> None:
        """The server is away for so long, and every session with it."""
        await self.running["database"].kill()
        await asyncio.sleep(seconds)
        settings = str(self.folder / "database.cfg")
        await self.start("database", SWITCH, "haproxy", "-db", "-f", settings)

    async def coordinator(self, address: str) -> None:
        url = f"postgresql://postgres@{SWITCH}:5432/postgres"
        await self.start(
            address, address, programs.command("ollama-coordinator"), "serve",
            DATABASE_URL=f"{url}?options=-csearch_path%3D{self._postgres.schema}",
            COORDINATOR_LOG_LEVEL="INFO", COORDINATOR_ANNOUNCE="false",
        )  # fmt: skip

    async def agent(self, address: str, transport: str) -> None:
        ollama = [sys.executable, "-m", "support.ollama", "--model", "llama3.2=5e9"]
        ollama += ["--decode-rate", "30", "--slots", "2", "--control-port", str(CONTROL_PORT)]
        await self.start(f"ollama-{address}", address, *ollama, PYTHONPATH=TESTS)
        await self.start(
            f"agent-{address}", address, programs.command("ollama-coordinator-agent"),
            COORDINATOR_URL=f"http://{SWITCH}:8080", AGENT_TRANSPORT=transport,
            AGENT_MANAGE_OLLAMA="false",
            AGENT_MACHINE_NAME=f"machine-{address}", AGENT_STATE_DIR=str(self.folder / address),
        )  # fmt: skip

    async def get(self, url: str, at: str = SWITCH) -> Any:
        """What is answered to a question from a machine; `None` if nothing is within a second."""
        command = ("curl", "-s", "-m", "2", url)
        with suppress(json.JSONDecodeError):
            return json.loads(await self.switch.output(at, *command))
        return None

    async def one_more(self, coordinator: str) -> str:
        """The id of one more request, which is served."""
        url, body = f"http://{coordinator}:8080/api/generate", '{"model":"llama3.2","prompt":"x"}'
        command = ("curl", "-sf", "-D", "-", "-o", os.devnull, "-d", body, url)
        head = (await self.switch.output(SWITCH, *command)).decode()
        [request] = re.findall(r"(?i)x-ollama-coordinator-request: (\S+)", head)
        return str(request)

    async def leader(self, epoch: int = 0) -> tuple[str, int]:
        """Who leads, once all coordinators agree about it."""
        async with asyncio.timeout(2 * DEADLINE_SECONDS):
            while True:
                asked = [self.get(f"http://{one}:8080/readyz") for one in self.coordinators]
                health = await asyncio.gather(*asked)
                leaders = [(one or {}).get("leader", {}) for one in health]
                found = {(one.get("url", ""), one.get("epoch", -1)) for one in leaders}
                if len(found) == 1 and (leads := found.pop())[1] >= epoch:
                    return leads[0].partition("//")[2].partition(":")[0], leads[1]
                await asyncio.sleep(0.2)


class Asked:
    """What the clients' program has written."""

    def __init__(self, program: programs.Program) -> None:
        self._program = program

    def lines(self) -> list[Any]:
        whole, _, _ = self._program.output.rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    async def steady(self, more: int = 60) -> None:
        """Wait until so many further requests were served."""
        wanted = len(self.lines()) + more
        async with asyncio.timeout(2 * DEADLINE_SECONDS):
            while len(self.lines()) < wanted:
                await asyncio.sleep(0.2)


class Day:
    """The faults, one after the other, with the time of each."""

    def __init__(self, world: World, asked: Asked) -> None:
        self.world = world
        self.asked = asked
        self.began: dict[str, float] = {}

    @asynccontextmanager
    async def fault(self, name: str) -> AsyncIterator[str]:
        """Who leads, before a fault of this name; after it, all is well again."""
        leader, epoch = await self.world.leader()
        self.began[name] = time.time()
        yield leader
        after, later = await self.world.leader()
        await self.asked.steady()
        print(f"{name}: epoch {epoch} → {later}, leader {leader} → {after}")

    async def live(self) -> None:
        world = self.world
        await self.asked.steady()
        for who in ("leader", "another"):
            async with self.fault(f"{who} killed") as leader:
                victim = self._of(who, leader)
                await world.running[victim].kill()
                await asyncio.sleep(CUT_SECONDS / 2)
                await world.coordinator(victim)
            async with self.fault(f"{who} frozen") as leader:
                victim = self._of(who, leader)
                world.running[victim].send(signal.SIGSTOP)
                await asyncio.sleep(CUT_SECONDS)
                world.running[victim].send(signal.SIGCONT)
            async with self.fault(f"{who}'s cable out") as leader:
                victim = self._of(who, leader)
                world.switch.pull(victim)
                await asyncio.sleep(CUT_SECONDS)
                world.switch.plug(victim)
        async with self.fault("database restarted"):
            await world.restart_database(1)
        async with self.fault(f"database away for {AWAY_SECONDS:g} s"):
            await world.restart_database(AWAY_SECONDS)

    def _of(self, who: str, leader: str) -> str:
        others = [one for one in self.world.coordinators if one != leader]
        return leader if who == "leader" else others[0]

    def figures(self) -> None:
        """For each fault: the longest time in which no answer began, and what clients saw."""
        lines, names = self.asked.lines(), list(self.began)
        for at, name in enumerate(names):
            since = self.began[name]
            until = self.began[names[at + 1]] if at + 1 < len(names) else time.time()
            began = sorted(line[3] for line in lines if since <= line[3] < until)
            gaps = [b - a for a, b in zip([since, *began], began, strict=False)]
            cuts = [cut for line in lines for cut in line[1] if since <= cut[1] < until]
            asked = {line[0] for line in lines for cut in line[1] if since <= cut[1] < until}
            print(
                f"{name}: no answer began for {max(gaps):.1f} s;"
                f" {len(began)} began, {len(asked)} requests lost a connection ({len(cuts)} tries)"
            )


@pytest.mark.spec("CLUSTER-19")
async def test_a_day_of_faults_behind_a_balancer_loses_nothing_outside_the_dead_process(
    tmp_path: Path, postgres: PostgresSchema
) -> None:
    with Switch(tmp_path) as switch:
        async with World(switch, tmp_path, postgres) as world:
            async with asyncio.timeout(DEADLINE_SECONDS):
                while sum(
                    one["status"] == "online" and one["ollama_running"]
                    for one in await world.get(f"http://{SWITCH}:8080/api/agents") or []
                ) < len(world.agents):
                    await asyncio.sleep(0.2)
            command = (sys.executable, "-c", CLIENTS, f"http://{SWITCH}:8080", "8")
            await world.start("clients", SWITCH, *command)
            agents = await world.get(f"http://{SWITCH}:8080/api/agents")
            assert [one["link"] for one in agents].count(True) == 2
            day = Day(world, Asked(world.running["clients"]))
            await day.live()
            world.running["clients"].send(signal.SIGSTOP)  # what it has not read is cut below
            day.figures()
            await world.running["clients"].kill()
            await count(day)


async def count(day: Day) -> None:
    """Clients, history and machines agree."""
    world, lines = day.world, day.asked.lines()
    leader, _ = await world.leader()
    async with asyncio.timeout(DEADLINE_SECONDS):
        while True:  # no lease is left, at the leader or at a machine
            health = await world.get(f"http://{leader}:8080/healthz") or {"waiting": 1}
            seen = [
                await world.get(f"http://127.0.0.1:{CONTROL_PORT}/seen?requests=1", at)
                for at in world.agents
            ]
            if not health["waiting"] + health["in_flight"] + sum(one["active"] for one in seen):
                break
            await asyncio.sleep(0.5)
    ends = Counter(line[5] for line in lines)
    completed = Counter(
        request["headers"].get("User-Agent", "")
        for one in seen
        for request in one["requests"]
        if request["path"] == "/api/generate" and request["outcome"] == "completed"
    )
    last = await world.one_more(leader)
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not (written := await history(world, leader))[last]:
            await asyncio.sleep(0.2)  # it is written once a second, in order
    missing = [line for line in lines if written[line[2]] != 1]
    again = [line for line in lines if completed[line[0]] > 1 + len(line[1])]
    cut = sum(bool(line[1]) for line in lines)
    print(f"{len(lines)} requests: {dict(ends)}; {cut} lost a connection")
    print(f"{completed.total()} generations were completed; {len(written)} rows in the history")
    print(
        f"{len(missing)} answers are not in it, {len(again)} were generated for a lost leader too"
    )
    lost = [at for name, at in day.began.items() if name.startswith("leader")]
    for line in missing:
        print(line[0], line[1], [f"{line[4] - at:.1f} s" for at in lost])
    assert set(ends) == {"served"}
    assert all(completed[line[0]] for line in lines)
    # A leader that is lost takes its last second of the history along, and a machine that it has
    # asked itself goes on for it, while the next one asks another.
    assert max(written.values()) == 1
    assert not [
        line
        for line in missing
        if not any(line[4] - 1 < at < line[4] + WRITTEN_SECONDS for at in lost)
    ]
    assert not [line for line in again if not any(line[6] < at + 1 < line[4] + 1 for at in lost)]


async def history(world: World, leader: str) -> Counter[str]:
    """How often each request is in it."""
    found: Counter[str] = Counter()
    page = ""
    while True:
        url = f"http://{leader}:8080/api/history?limit=500{page}"
        answer = await world.get(url)
        found.update(row["id"] for row in answer["requests"])
        if not answer["next"]:
            return found
        page = f"&after={answer['next']}"
