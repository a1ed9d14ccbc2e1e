"""What a decision costs: `python tests/benchmarks/bench_scheduler.py`.

A saturated fleet in a steady state: each round one request ends, its place is given away, and a new
one arrives; so a round is two decisions, with everything that is learned from the end.
"""

import argparse
import sys
from datetime import UTC, datetime
from random import Random
from time import process_time

import msgspec
from msgspec import Raw, Struct

from ollama_coordinator.registry import Registry
from ollama_coordinator.scheduler import Lease, Outcome, Request, RequestId, Result, Timings
from ollama_coordinator.scheduler.predicted import PredictedScheduler
from ollama_coordinator.server import collect_seldom
from ollama_coordinator_common.names import model_key
from ollama_coordinator_common.protocol import HealthReport, RegisterRequest
from ollama_coordinator_common.types import AgentId, Gpu, RunnerSettings

GB = 1_000_000_000
SERVED = Outcome(Result.SERVED, timings=Timings(300, 100, 2.6, 0.01, 0.1, 2.4))
SERVICE_SECONDS = 2.6
DECISIONS_PER_ROUND = 2


class Case(Struct, frozen=True):
    """How large the fleet is and how many wait; `budget` is the microseconds per decision."""

    agents: int
    models: int
    waiting: int
    rounds: int
    budget: float


CASES = (Case(50, 100, 1000, 8000, 50.0), Case(1000, 100, 1000, 2000, 300.0))


class Bench:
    """A fleet under constant load."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.lots = Random(1)
        self.now = 0.0
        self.sent = 0
        keys = [model_key(f"m{number}") for number in range(case.models)]
        popularity = [1 / (rank + 1) for rank in range(case.models)]
        self.asked = self.lots.choices(keys, popularity, k=100_000)
        self.registry = Registry(1e9)
        self.scheduler = PredictedScheduler(self.registry, max_queue=10**6)
        self.leases: list[Lease] = []
        for number in range(case.agents):
            self._register(AgentId(f"agent-{number:04}"))
        while len(self.scheduler.waiting(self.now)) < case.waiting:
            for _ in range(case.waiting // 10):
                self.arrive()

    def _register(self, agent_id: AgentId) -> None:
        names = [f"m{number}" for number in range(self.case.models)]
        loaded = self.lots.sample(names, 4)
        request = RegisterRequest(agent_id, agent_id, "0.12.0", 11434)
        self.registry.register(request, agent_id, datetime.now(UTC), self.now)
        self.registry.heartbeat(
            HealthReport(
                agent_id, 1.0, 1.0, 0,
                gpus=[Gpu("gpu", memory_total_bytes=32 * GB)],
                runner=RunnerSettings(num_parallel=2),
                tags=_rows([{"name": name, "digest": name, "size": 5 * GB} for name in names]),
                ps=_rows([{"name": name, "digest": name, "size": 6 * GB} for name in loaded]),
            ),
            self.now,
        )  # fmt: skip

    def arrive(self) -> None:
        """One more request; models are as popular as Zipf says."""
        self.sent += 1
        model = self.asked[self.sent % len(self.asked)]
        request = Request(
            id=RequestId(str(self.sent)), model=model, name=model, arrived_at=self.now,
            client=f"client-{self.sent % 50}", prompt_tokens=300, prefix=(self.sent % 97,),
        )  # fmt: skip
        self.scheduler.submit(request, self.now)
        self._plan()

    def finish(self) -> None:
        """One of the running requests ends: any, but without the cost of drawing lots."""
        index = self.sent * 7919 % len(self.leases)
        self.leases[index], self.leases[-1] = self.leases[-1], self.leases[index]
        lease = self.leases.pop()
        self.scheduler.began(lease.id, self.now)
        self.scheduler.end(lease.id, SERVED, self.now)
        self._plan()

    def _plan(self) -> None:
        self.leases += self.scheduler.plan(self.now).granted
        self.scheduler.wake_at(self.now)

    def run(self, rounds: int) -> float:
        """Seconds of processor time."""
        started = process_time()
        for _ in range(rounds):
            self.now += SERVICE_SECONDS / len(self.leases)
            self.finish()
            self.arrive()
        return process_time() - started

    def idle(self, rounds: int) -> float:
        """Seconds of processor time of planning when nothing waits."""
        empty = PredictedScheduler(self.registry, max_queue=1)
        empty.plan(self.now)
        started = process_time()
        for _ in range(rounds):
            empty.plan(self.now)
        return process_time() - started


def _rows(rows: list[dict[str, object]]) -> Raw:
    return Raw(msgspec.json.encode({"models": rows}))


def main() -> None:
    """Print a queue for each case; fail when one is over its budget and `--check` is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    over = False
    for case in CASES:
        bench = Bench(case)
        collect_seldom()
        bench.run(case.rounds)
        micros = bench.run(case.rounds) / case.rounds / DECISIONS_PER_ROUND * 1e6
        idle = bench.idle(10_000) / 10_000 * 1e6
        over = over or micros > case.budget
        print(
            f"{case.agents} agents, {case.models} models, {case.waiting} waiting: "
            f"{micros:.0f} us per decision (budget {case.budget:.0f}), idle plan {idle:.1f} us"
        )
    sys.exit(over and options.check)


if __name__ == "__main__":
    main()
