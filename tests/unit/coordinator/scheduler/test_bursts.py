"""A slow agent beside a fast one: no request is felt later for it."""

from functools import cache

import pytest
from msgspec import structs

from ollama_coordinator.registry import AgentSettings, Registry
from ollama_coordinator.scheduler import Decision, Form, LeaseId
from ollama_coordinator.scheduler.predicted import PredictedScheduler
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
    costs = {one.agent_id: one.cost for one in decision.candidates if one.cost is not None}
    assert decision.chosen is not None
    return all(costs[decision.chosen] <= cost + SAME_SECONDS for cost in costs.values())


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
    settings = AgentSettings(backup_seconds=10.0)
    burst.simulation.registry.update_settings(AgentId("spare"), settings)
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
