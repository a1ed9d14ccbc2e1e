"""A slow agent beside a fast one: no request is felt later for it."""

from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec import structs

from ollama_coordinator.registry import AgentSettings, Registry
from ollama_coordinator.scheduler import Decision, Form, LeaseId
from ollama_coordinator.scheduler.predicted import PredictedScheduler
from ollama_coordinator.scheduler.protocol import Plan
from ollama_coordinator.simulation import (
    Fleet,
    MachineSpec,
    ModelSpec,
    Record,
    Simulation,
    TraceRequest,
)
from ollama_coordinator_common.types import AgentId

M = ModelSpec("m", 4_900_000_000)
FAST = MachineSpec(
    name="fast", models=(M,), prefill_tokens_per_second=4000, decode_tokens_per_second=114
)
SLOW = MachineSpec(
    name="slow", models=(M,), prefill_tokens_per_second=400, decode_tokens_per_second=10
)
SAME_SECONDS = 0.011
"""Costs within 10 ms are ties."""


class Burst:
    """Agents that have the model in memory and whose speeds are learned, one request or a few."""

    def __init__(self, *machines: MachineSpec) -> None:
        self.scheduler: PredictedScheduler
        self.simulation = Simulation(Fleet(machines=machines), self._create)
        self.number = 0
        for machine in machines:
            self._only(machine.name)
            for form in (Form.STREAM, Form.WHOLE):
                for count in (1, 1, 1, 1, machine.slots):
                    self.serve([self.send(form) for _ in range(count)])
        for machine in machines:
            self.simulation.registry.update_settings(AgentId(machine.name), AgentSettings())
        self.simulation.run_until(self.simulation.now + 30.0)
        assert all(M.key in node.runners for node in self.simulation.nodes.values())

    def _create(self, registry: Registry) -> PredictedScheduler:
        self.scheduler = PredictedScheduler(registry, max_queue=100)
        return self.scheduler

    def _only(self, name: str) -> None:
        for agent_id in self.simulation.nodes:
            drains = AgentSettings(draining=agent_id != name)
            self.simulation.registry.update_settings(agent_id, drains)

    def send(self, form: Form) -> Record:
        self.number += 1
        now = self.simulation.now
        request = TraceRequest(
            at=now, model="m", prompt_tokens=100, output_tokens=240, form=form, client="c"
        )
        return self.simulation.arrive(self.number, request, now)

    def serve(self, records: list[Record]) -> None:
        while any(record.ended_at is None for record in records):
            self.simulation.run_until(self.simulation.now + 5.0)

    def felt(self, count: int, form: Form) -> list[float]:
        """The felt delays of so many requests at once, the shortest first."""
        records = [self.send(form) for _ in range(count)]
        self.serve(records)
        return sorted(record.felt_seconds for record in records)


@cache
def felt(count: int, form: Form, *machines: MachineSpec) -> list[float]:
    return Burst(*machines).felt(count, form)


@pytest.mark.spec("SCHED-90")
@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("form", [Form.STREAM, Form.WHOLE, Form.TOOLS])
@pytest.mark.parametrize("count", range(2, 25))
def test_no_burst_is_felt_more_with_a_slow_agent_than_without(
    count: int, form: Form, slots: int
) -> None:
    fast, slow = (structs.replace(machine, slots=slots) for machine in (FAST, SLOW))
    alone, both = felt(count, form, fast), felt(count, form, fast, slow)
    later = [more - less for less, more in zip(alone, both, strict=True)]
    assert max(later) <= SAME_SECONDS
    assert sum(both) <= sum(alone) + SAME_SECONDS


@pytest.mark.spec("SCHED-90")
def test_a_slow_agent_is_used_where_it_ends_sooner() -> None:
    assert felt(24, Form.WHOLE, FAST, SLOW)[-1] < felt(24, Form.WHOLE, FAST)[-1] - 1.0


def lowest(decision: Decision) -> bool:
    """Whether nothing that could serve it costs less than what was chosen, but for a tie."""
    (chosen,) = (
        one.cost
        for one in decision.candidates
        if (one.agent_id, one.action) == (decision.chosen, decision.action)
    )
    costs = [one.cost for one in decision.candidates if one.cost is not None]
    return chosen is not None and chosen <= min(costs) + SAME_SECONDS


@pytest.mark.spec("SCHED-91")
@pytest.mark.parametrize("form", [Form.STREAM, Form.WHOLE])
def test_the_chosen_agent_is_shown_with_the_lowest_cost(form: Form) -> None:
    burst = Burst(FAST, SLOW, structs.replace(SLOW, name="medium", decode_tokens_per_second=40))
    records = [burst.send(form) for _ in range(24)]
    told: dict[LeaseId, Decision] = {}
    while any(record.ended_at is None for record in records):
        for lease in list(burst.scheduler.leases()):
            decision = told.get(lease.id) or burst.scheduler.account(lease.id)
            assert decision is not None
            told[lease.id] = decision
        burst.simulation.run_until(burst.simulation.now + 0.05)
    assert len(told) == 24
    assert {decision.chosen for decision in told.values()} == {"fast", "slow", "medium"}
    assert all(lowest(decision) for decision in told.values())


class Told(PredictedScheduler):
    """A scheduler that accounts for each of its grants at once, and is asked before each."""

    def __init__(self, registry: Registry, *, asks: bool) -> None:
        super().__init__(registry, max_queue=100)
        self.asks = asks
        self.told: list[Decision] = []

    def plan(self, now: float) -> Plan:
        if self.asks:
            for form in (Form.STREAM, Form.WHOLE):
                asked = TraceRequest(at=now, model="m", prompt_tokens=50, form=form, client="x")
                decision = self.explain(asked.arrive("asked"), now)
                assert decision.chosen is None or lowest(decision)
        plan = super().plan(now)
        self.told += filter(None, [self.account(lease.id) for lease in plan.granted])
        return plan


def play(
    speeds: list[tuple[float, int]], requests: list[tuple[float, int, int, Form]], *, asks: bool
) -> tuple[list[Decision], list[str | None]]:
    """What was told of each grant, and the agent of each request, on machines of these speeds."""
    machines = tuple(
        MachineSpec(
            name=f"a{number}", models=(M,), slots=slots,
            prefill_tokens_per_second=speed * 30, decode_tokens_per_second=speed,
        )
        for number, (speed, slots) in enumerate(speeds)
    )  # fmt: skip
    scheduler: list[Told] = []

    def create(registry: Registry) -> Told:
        scheduler.append(Told(registry, asks=asks))
        return scheduler[-1]

    at, trace = 0.0, []
    for pause, prompt, output, form in requests:
        at += pause
        trace.append(
            TraceRequest(
                at=at, model="m", prompt_tokens=prompt, output_tokens=output, form=form, client="c"
            )
        )
    replay = Simulation(Fleet(machines=machines), create).run(trace)
    return scheduler[0].told, [record.agent for record in replay.records]


# A free place costs 7 ms more than a slot to come, and a second one 3 ms less: a tie of all three.
A_TIE = (
    [(196.0, 2), (200.0, 2)],
    [
        (0.0, 20, 20, Form.WHOLE), (0.0, 50, 20, Form.WHOLE), (0.0, 20, 5, Form.WHOLE),
        (10.0, 1, 2, Form.STREAM), (0.0, 1, 5, Form.STREAM), (10.0, 20, 1, Form.STREAM),
        (0.0, 1, 2, Form.STREAM),
    ],
)  # fmt: skip
# One of two requests on a machine is late: the slot of the other one gets free before.
A_LATE_ONE = (
    [(4.0, 2), (4.0, 1), (4.0, 3)],
    [
        (0.0, 1, 38, Form.STREAM), (10.0, 1, 16, Form.STREAM), (0.0, 1, 1, Form.STREAM),
        (1.0, 1, 1, Form.STREAM), (0.0, 1, 1, Form.STREAM), (0.0, 1, 1, Form.WHOLE),
    ],
)  # fmt: skip


@pytest.mark.spec("SCHED-91")
@settings(max_examples=40, deadline=None)
@example(*A_TIE)
@example(*A_LATE_ONE)
@given(
    speeds=st.lists(st.tuples(st.floats(4, 200), st.integers(1, 4)), min_size=1, max_size=6),
    requests=st.lists(
        st.tuples(
            st.sampled_from((0.0, 0.0, 0.1, 1.0, 10.0)), st.integers(1, 4000),
            st.integers(1, 400), st.sampled_from((Form.STREAM, Form.WHOLE)),
        ),
        min_size=1, max_size=40,
    ),
)  # fmt: skip
def test_on_any_fleet_what_is_shown_with_the_lowest_cost_is_chosen_and_asking_changes_nothing(
    speeds: list[tuple[float, int]], requests: list[tuple[float, int, int, Form]]
) -> None:
    told, agents = play(speeds, requests, asks=False)
    assert all(lowest(decision) for decision in told)
    assert play(speeds, requests, asks=True)[1] == agents


@pytest.mark.spec("SCHED-91")
def test_an_explained_request_goes_where_the_cost_is_lowest() -> None:
    burst = Burst(FAST, SLOW)
    for _ in range(4):
        burst.send(Form.WHOLE)
    now = burst.simulation.now
    asked = TraceRequest(at=now, model="m", prompt_tokens=100, form=Form.WHOLE, client="c")
    decision = burst.scheduler.explain(asked.arrive("new"), now)
    assert decision.action == "wait"
    assert decision.candidates[0].agent_id == decision.chosen == "fast"
    assert lowest(decision)


@pytest.mark.spec("SCHED-92")
def test_a_client_that_reads_slowly_is_served_by_a_slow_agent_at_once() -> None:
    burst = Burst(FAST, SLOW)
    burst.send(Form.STREAM)
    now = burst.simulation.now
    asked = TraceRequest(at=now, model="m", prompt_tokens=100, client="c").arrive("new")
    assert burst.scheduler.explain(asked, now).action == "wait"
    patient = structs.replace(asked, pace=1.0)
    for _ in range(3):
        burst.send(Form.STREAM)
    decision = burst.scheduler.explain(patient, now)
    assert (decision.action, decision.chosen) == ("go", "slow")


@pytest.mark.spec("SCHED-93")
def test_of_equal_costs_the_preferred_agent_is_taken() -> None:
    twins = (FAST, structs.replace(FAST, name="twin"))
    burst = Burst(*twins)
    registry = burst.simulation.registry
    registry.update_settings(AgentId("twin"), AgentSettings(preference=1.001))
    assert [burst.felt(1, Form.WHOLE) for _ in range(3)]
    last = sorted(burst.simulation.records.values(), key=lambda record: record.number)[-3:]
    assert {record.agent for record in last} == {"twin"}


@pytest.mark.spec("SCHED-94")
@pytest.mark.parametrize("form", [Form.STREAM, Form.WHOLE])
def test_a_backup_is_taken_only_where_all_others_would_take_so_much_longer(form: Form) -> None:
    burst = Burst(FAST, structs.replace(FAST, name="spare"))
    backup = AgentSettings(backup_seconds=10.0)
    burst.simulation.registry.update_settings(AgentId("spare"), backup)
    records = [burst.send(form) for _ in range(12)]
    decision = burst.scheduler.explain(
        TraceRequest(at=0.0, model="m", form=form, client="c").arrive("new"), burst.simulation.now
    )
    spare = next(one for one in decision.candidates if one.agent_id == "spare")
    assert spare.backup_seconds == 10.0
    assert spare.cost is not None
    assert spare.cost >= 10.0
    burst.serve(records)
    spared = [record for record in records if record.agent == "spare"]
    assert 0 < len(spared) < 6
    first = min(spared, key=lambda record: record.number)
    assert sum(record.number < first.number for record in records) >= 4


@pytest.mark.spec("SCHED-94")
def test_a_backup_serves_when_nobody_else_can() -> None:
    burst = Burst(FAST, SLOW)
    registry = burst.simulation.registry
    registry.update_settings(AgentId("slow"), AgentSettings(backup_seconds=100.0))
    registry.update_settings(AgentId("fast"), AgentSettings(draining=True))
    record = burst.send(Form.WHOLE)
    burst.serve([record])
    assert record.agent == "slow"
