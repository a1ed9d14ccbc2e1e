"""Several coordinators under load lose their leader again and again: nothing is lost outside it.

Clients ask one coordinator after the other until one takes the connection, as a balancer does, and
repeat a request only where they got no answer at all.
"""

import asyncio
import os
import signal
import sys
import time
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from secrets import token_hex

import aiohttp
import pytest

from support import programs
from support.cluster import CHAT, Coordinator, started
from support.databases import PostgresSchema
from support.deadline import DEADLINE_SECONDS
from support.line import Line
from support.ollama import StandIn

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform == "win32", reason="signals there are another matter"),
]

CLIENTS = 12
AWAY_SECONDS = float(os.environ.get("AWAY_SECONDS", "60"))
"""How long the database is away, by the last one of the trials."""

HUNG_SECONDS = 15.0
"""A balancer cuts the connections to a coordinator that does not answer its checks."""

CUT = "connection"
"""A client lost its connection, and so knows that it has to ask again."""


class Load:
    """What clients did: `ends` counts how their requests ended, `served` are those with answers.

    `wait`: the longest time in which no answer began, in seconds, since it was last taken.
    """

    def __init__(self, coordinators: list[Coordinator]) -> None:
        self.coordinators = coordinators
        self.ends: Counter[str] = Counter()
        self.served: set[str] = set()
        self.over = asyncio.Event()
        self._began_at = time.monotonic()
        self._longest = 0.0

    def wait(self) -> float:
        longest, self._longest = self._longest, 0.0
        return longest

    async def client(self, number: int) -> None:
        connector = aiohttp.TCPConnector(force_close=True)
        timeout = aiohttp.ClientTimeout(total=HUNG_SECONDS, sock_connect=1)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            while not self.over.is_set():
                number += 1
                self.ends[await self._ask(session, self._url(number))] += 1

    def _url(self, number: int) -> str:
        return f"{self.coordinators[number % len(self.coordinators)].url}/api/chat"

    async def _ask(self, session: aiohttp.ClientSession, url: str) -> str:
        body = {**CHAT, "messages": [{"role": "user", "content": token_hex(8)}]}
        try:
            async with session.post(url, json=body) as response:
                now = time.monotonic()
                self._longest = max(self._longest, now - self._began_at)
                self._began_at = now
                text = await response.read()
        except (aiohttp.ClientError, TimeoutError):
            return CUT
        if response.status != 200:
            return f"status {response.status}"
        if b'"done":true' not in text:
            return "error record"
        self.served.add(response.headers["X-Ollama-Coordinator-Request"])
        return "served"


async def leader_of(
    coordinators: list[Coordinator], epoch: int, asked: Coordinator | None = None
) -> Coordinator:
    """Who leads in this epoch, or a later one, as any that is ready knows, or the `asked` one."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while True:
            for one in coordinators if asked is None else [asked]:
                try:
                    health = await one.get("/readyz", 503)
                except (aiohttp.ClientError, TimeoutError):
                    continue
                leader = health.get("leader", {})
                if leader.get("epoch", 0) >= epoch:
                    return next(each for each in coordinators if each.url == leader["url"])
            await asyncio.sleep(0.1)


async def steady(load: Load, more: int = 30) -> None:
    """Wait until so many further requests were served."""
    wanted = load.ends["served"] + more
    async with asyncio.timeout(DEADLINE_SECONDS):
        while load.ends["served"] < wanted:
            await asyncio.sleep(0.1)


@pytest.mark.spec("CLUSTER-4")
@pytest.mark.spec("CLUSTER-6")
@pytest.mark.spec("CLUSTER-12")
async def test_a_cluster_loses_nothing_but_what_its_dead_leaders_clients_see(
    tmp_path: Path, postgres: PostgresSchema
) -> None:
    figures = []
    async with AsyncExitStack() as stack:
        line = await stack.enter_async_context(Line(postgres.url))
        machines = [await stack.enter_async_context(StandIn()) for _ in range(5)]
        coordinators = []
        for number in range(3):
            made = await stack.enter_async_context(started(tmp_path / str(number), line.url))
            await made.program.says("stands by" if number else "coordinator leads")
            coordinators.append(made)
        for number, machine in enumerate(machines):
            await coordinators[0].register(machine, f"machine-{number}")
        load = Load(coordinators)
        clients = [asyncio.create_task(load.client(number)) for number in range(CLIENTS)]
        await steady(load)

        def note(what: str) -> None:
            figures.append(f"{what}: {load.wait():.2f} s without a first byte; {dict(load.ends)}")

        load.wait()
        leader = coordinators[0]
        leader.program.send(signal.SIGSTOP)
        frozen, others = leader, [one for one in coordinators if one is not leader]
        load.coordinators = others  # a balancer sees by its checks that it does not answer
        leader = await leader_of(others, 2)
        await steady(load)
        frozen.program.send(signal.SIGCONT)
        await frozen.program.says("stands by")
        await leader_of(
            coordinators, 2, frozen
        )  # it knows who leads: its balancer's checks succeed again
        load.coordinators = coordinators
        note("frozen")
        line.cut()
        await asyncio.sleep(AWAY_SECONDS)
        await steady(load)
        await line.mend()
        await leader.program.says("database writable again")
        await steady(load)
        note("database away")
        assert await leader_of(coordinators, 2) is leader
        leader.program.send(signal.SIGKILL)
        rest = [one for one in coordinators if one is not leader]
        load.coordinators = rest
        leader = await leader_of(rest, 3)
        await steady(load)
        note("killed")
        leader.program.send(programs.TERMINATE)
        [last] = [one for one in rest if one is not leader]
        load.coordinators = [last]
        await leader_of([last], 4)
        await steady(load)
        note("told to stop")
        load.over.set()
        await asyncio.gather(*clients)
        await last.has(0)
        print(*figures, sep="\n")
        # Only connections to the process that was frozen, killed or stopped were lost.
        assert load.ends.keys() <= {"served", CUT, "error record"}
        assert load.ends["error record"] + load.ends[CUT] <= 4 * CLIENTS
        rows = await last.history(1, "?limit=500")
        recorded = Counter(row["id"] for row in rows)
        assert set(recorded.values()) == {1}
        for machine in machines:
            assert machine.seen.held == 0
        answered = sum(
            one.status == 200 for machine in machines for one in machine.seen.of("/api/chat")
        )
        assert answered <= load.ends.total()
