"""The policies that only count, and the factory."""

import pytest

from ollama_coordinator.registry import AgentState, Registry
from ollama_coordinator.scheduler import POLICIES, create_scheduler
from ollama_coordinator.scheduler.counting import Random, cpu, least_connections, round_robin
from unit.coordinator.scheduler.world import World


def agents(world: World, count: int = 3) -> list[AgentState]:
    return [world.agent(f"a{number}") for number in range(count)]


@pytest.mark.spec("SCHED-70")
def test_predicted_is_the_first_policy_and_every_name_makes_a_scheduler() -> None:
    assert POLICIES[0] == "predicted"
    for policy in POLICIES:
        scheduler = create_scheduler(policy, Registry(60.0), max_queue=1)
        assert list(scheduler.leases()) == []
    with pytest.raises(KeyError):
        create_scheduler("fortune-teller", Registry(60.0), max_queue=1)


@pytest.mark.spec("SCHED-71")
def test_least_connections_counts_and_nothing_else() -> None:
    world = World()
    chosen = least_connections(
        agents(world), world.request(), {"a0": 2, "a1": 0, "a2": 1}.__getitem__
    )
    assert chosen.id == "a1"


@pytest.mark.spec("SCHED-71")
def test_round_robin_takes_whose_turn_it_is() -> None:
    world = World()
    assert round_robin(agents(world), world.request(), lambda agent: 0).id == "a0"


@pytest.mark.spec("SCHED-71")
def test_random_choices_repeat_with_their_seed() -> None:
    world = World()
    fleet, request = agents(world), world.request()
    one, two = Random(seed=7), Random(seed=7)
    choices = [one(fleet, request, lambda agent: 0).id for _ in range(30)]
    assert choices == [two(fleet, request, lambda agent: 0).id for _ in range(30)]
    assert set(choices) == {"a0", "a1", "a2"}


@pytest.mark.spec("SCHED-71")
def test_the_cpu_score_takes_the_least_used_machine() -> None:
    world = World()
    fleet = agents(world)
    for agent, load in zip(fleet, (50.0, 10.0, 90.0), strict=True):
        report = agent.report
        assert report is not None
        agent.report = type(report)(agent.id, load, load, 0)
    assert cpu(fleet, world.request(), lambda agent: 0).id == "a1"
