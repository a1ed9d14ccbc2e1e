"""Failures, agents that are away, and requests that no agent may serve."""

import msgspec
import pytest

from ollama_coordinator.scheduler import (
    Form,
    HoldersUnavailable,
    Lease,
    ModelNotFound,
    NoAgentRegistered,
    Result,
    Timings,
)
from ollama_coordinator.scheduler.eligibility import RECOVERY_SECONDS
from ollama_coordinator.scheduler.export import Learned
from ollama_coordinator_common.types import AgentId
from unit.coordinator.scheduler.world import M, World

A, B = AgentId("a"), AgentId("b")


@pytest.mark.spec("SCHED-30")
def test_who_cannot_be_served_at_all_is_told_at_once() -> None:
    world = World()
    with pytest.raises(NoAgentRegistered):
        world.submit()
    agent = world.agent("a")
    with pytest.raises(ModelNotFound):
        world.submit("unknown")
    agent.left = True
    world.registry.changes += 1
    with pytest.raises(HoldersUnavailable, match="offline"):
        world.submit()


@pytest.mark.spec("SCHED-31")
def test_a_request_waits_for_the_only_agent_while_it_may_recover() -> None:
    world = World()
    agent = world.agent("a", loaded=["m"])
    world.registry.fail(agent, "connection refused", world.now)
    request = world.submit()
    assert world.plan() == []
    assert world.tick(RECOVERY_SECONDS - 1.0) == []
    world.registry.probed(agent)
    (lease,) = world.plan()
    assert lease.request is request


@pytest.mark.spec("SCHED-31")
def test_it_is_refused_when_the_agent_does_not_recover() -> None:
    world = World()
    agent = world.agent("a")
    world.registry.fail(agent, "connection refused", world.now)
    request = world.submit()
    world.tick(RECOVERY_SECONDS + 0.6)
    assert isinstance(world.refused[request.id], HoldersUnavailable)
    assert "connection refused" in str(world.refused[request.id])


@pytest.mark.spec("SCHED-31")
def test_the_recovery_is_awaited_anew_by_a_request_that_waited_long_for_a_slot() -> None:
    world = World()
    agent = world.agent("a", loaded=["m"], slots=1)
    world.send()
    request = world.submit()
    world.tick(30.0)
    world.registry.fail(agent, "reset", world.now)
    world.tick(RECOVERY_SECONDS - 1.0)
    assert request.id not in world.refused


@pytest.mark.spec("SCHED-32")
def test_agents_that_failed_a_request_do_not_get_it_again() -> None:
    world = World()
    world.agent("a", loaded=["m"])
    world.agent("b")
    lease = world.send()
    assert lease.agent_id == A
    world.end(lease, Result.BUSY)
    world.scheduler.submit(lease.request.without([A]), world.now)
    (again,) = world.plan()
    assert again.agent_id == B
    world.end(again, Result.BUSY)
    with pytest.raises(HoldersUnavailable, match="already tried"):
        world.scheduler.submit(lease.request.without([A, B]), world.now)


@pytest.mark.spec("SCHED-33")
def test_failures_make_an_agent_less_attractive_and_successes_more_again() -> None:
    world = World()
    for name in "ab":
        world.agent(name, loaded=["m"], slots=4)
    for _ in range(3):
        world.end(world.send(excluded=frozenset({B})), Result.CUT)
    assert {world.send().agent_id for _ in range(2)} == {B}
    for lease in list(world.scheduler.leases()):
        world.end(lease, Result.CANCELLED)
    world.now += 60.0
    assert {world.send().agent_id for _ in range(6)} == {A, B}


@pytest.mark.spec("SCHED-65")
def test_the_share_of_failures_costs_a_repetition() -> None:
    world = World()
    for name in "ab":
        world.agent(name, loaded=["m"], slots=4)
    for _ in range(10):
        world.end(world.send(excluded=frozenset({B})), Result.MODEL_FAILED)
    for _ in range(4):
        lease = world.send()
        assert lease.agent_id == B
        world.end(lease, Result.CANCELLED)
    # It is forgotten by and by where it is not asked.
    world.now += 1500.0
    assert {world.send().agent_id for _ in range(6)} == {A, B}


@pytest.mark.spec("FLEET-18")
def test_a_slot_where_the_model_failed_is_not_waited_for() -> None:
    world = World()
    agent = world.agent("a", loaded=["m"], slots=1)
    world.agent("b", slots=1)
    assert world.send().agent_id == A
    world.registry.fail_model(agent, M, "out of memory", world.now)
    assert world.send().agent_id == B


@pytest.mark.spec("FLEET-18")
def test_the_model_is_asked_for_where_it_failed_if_nobody_else_is_left() -> None:
    world = World()
    agent = world.agent("a", loaded=["m"])
    world.agent("b", loaded=["m"])
    world.registry.fail_model(agent, M, "out of memory", world.now)
    lease = world.send()
    assert lease.agent_id == B
    world.end(lease, Result.MODEL_FAILED)
    world.scheduler.submit(lease.request.without([B]), world.now)
    (again,) = world.plan()
    assert again.agent_id == A


@pytest.mark.spec("SCHED-65")
def test_the_share_of_failures_survives_a_restart() -> None:
    world = World()
    for name in "ab":
        world.agent(name, loaded=["m"], slots=4)
    for _ in range(10):
        world.end(world.send(excluded=frozenset({B})), Result.MODEL_FAILED)
    stored = msgspec.json.encode(world.scheduler.export_state())
    fresh = World()
    fresh.now = 5000.0
    fresh.scheduler.import_state(msgspec.json.decode(stored, type=Learned))
    for name in "ab":
        fresh.agent(name, loaded=["m"], slots=4)
    for _ in range(4):
        lease = fresh.send()
        assert lease.agent_id == B
        fresh.end(lease, Result.CANCELLED)
    again = fresh.scheduler.export_state().failing
    assert [one.share for one in again] == pytest.approx(
        [one.share for one in world.scheduler.export_state().failing]
    )
    fresh.now += 3600.0
    assert {fresh.send().agent_id for _ in range(6)} == {A, B}
    assert fresh.scheduler.export_state().failing == []


@pytest.mark.spec("FLEET-18")
@pytest.mark.parametrize("policy", ["predicted", "least-connections", "round-robin", "random"])
def test_one_request_at_a_time_tries_a_place_whose_time_is_over(policy: str) -> None:
    world = World(policy=policy)
    agent = world.agent("a", loaded=["m"], slots=16)
    world.agent("b", loaded=["m"], slots=16)
    world.registry.fail_model(agent, M, "CUDA error", world.now)
    world.now += 60.0
    world.registry.changes += 1
    leases = [world.send() for _ in range(8)]
    tried = [lease for lease in leases if lease.agent_id == A]
    assert len(tried) <= 1
    for lease in tried:
        world.end(lease, Result.CANCELLED)
        assert sum(world.send().agent_id == A for _ in range(6)) <= 1


@pytest.mark.spec("SCHED-65")
def test_one_failure_alone_changes_no_choice() -> None:
    world = World()
    for name in "ab":
        world.agent(name, loaded=["m"], slots=1)
    world.end(world.send(excluded=frozenset({B})), Result.MODEL_FAILED)
    assert {world.send().agent_id for _ in range(2)} == {A, B}


@pytest.mark.spec("SCHED-34")
def test_a_load_that_came_to_nothing_is_forgotten() -> None:
    world = World()
    world.agent("a", slots=1)
    lease = world.send()
    world.now += 0.5
    world.end(lease, Result.CANCELLED)
    again = world.send()
    decision = world.scheduler.decision(again.id)
    assert decision is not None
    assert decision.action == "load"


@pytest.mark.spec("SCHED-35")
def test_an_agent_that_went_offline_has_nothing_in_memory_when_it_returns() -> None:
    world = World()
    world.agent("a", loaded=["m"], slots=1)
    agent = world.agent("b", loaded=["m"], slots=1)
    world.end(world.send())
    agent.left = True
    world.registry.changes += 1
    world.plan()
    agent.left = False
    world.registry.changes += 1
    for _ in range(4):
        lease = world.send()
        assert lease.agent_id == A
        world.end(lease, timings=Timings(10, 10, 0.2, 0.0, 0.1, 0.1))


@pytest.mark.spec("SCHED-36")
def test_a_drained_agent_gets_nothing_new() -> None:
    world = World()
    for name in "ab":
        world.agent(name, loaded=["m"], slots=4)
    settings = world.registry.get("a").settings
    world.registry.update_settings(A, type(settings)(draining=True))
    assert {world.send().agent_id for _ in range(4)} == {B}


@pytest.mark.spec("DASH-17")
def test_a_shorter_silence_until_offline_counts_at_once() -> None:
    world = World()
    world.registry.agent_timeout = 300.0
    world.agent("silent", loaded=["m"])
    world.plan(29.0)
    world.agent("heard")
    world.plan(1.0)
    world.registry.agent_timeout = 5.0
    assert world.send().agent_id == "heard"


def taken_back(world: World, lease: Lease) -> Lease:
    """Where its request goes, 10 s after this lease was granted."""
    world.now += 10.0
    ((lease_id, reason),) = world.scheduler.take_back(world.now)
    assert lease_id == lease.id
    assert "no byte after 10.0 s" in reason
    assert world.end(lease, Result.TAKEN_BACK) == []
    world.scheduler.submit(lease.request.taken_from(lease.agent_id), world.now)
    (again,) = world.plan()
    return again


@pytest.mark.spec("SCHED-96")
def test_a_request_is_taken_back_twice_at_most_and_never_returns() -> None:
    world = World()
    for name in "abcd":
        world.agent(name, loaded=["m"], slots=1)
    lease = world.send(prompt_tokens=100)
    assert world.scheduler.take_back(world.now + 1.0) == []
    seen = [lease.agent_id]
    for _ in range(2):
        lease = taken_back(world, lease)
        seen.append(lease.agent_id)
    assert len(set(seen)) == 3
    world.now += 10.0
    assert world.scheduler.take_back(world.now) == []


@pytest.mark.spec("SCHED-96")
def test_one_request_of_a_queue_goes_at_a_time_and_only_where_there_is_a_slot() -> None:
    world = World()
    world.agent("a", loaded=["m"], slots=2)
    leases = [world.send(prompt_tokens=100) for _ in range(2)]
    world.now += 10.0
    assert world.scheduler.take_back(world.now) == []
    world.agent("b", loaded=["m"], slots=1)
    ((lease_id, _),) = world.scheduler.take_back(world.now)
    assert lease_id == leases[1].id
    world.end(leases[1], Result.TAKEN_BACK)
    world.scheduler.submit(leases[1].request.taken_from(A), world.now)
    assert [lease.agent_id for lease in world.plan()] == [B]
    assert world.scheduler.take_back(world.now) == []


@pytest.mark.spec("SCHED-96")
@pytest.mark.parametrize(("limit", "is_late"), [(None, False), (10, True)])
def test_an_answer_in_one_piece_is_late_beyond_the_longest_that_it_can_get(
    limit: int | None, is_late: bool
) -> None:
    world = World()
    world.agent("a", loaded=["m"], slots=1)
    world.agent("b", loaded=["m"], slots=1)
    world.send(prompt_tokens=100, form=Form.WHOLE, output_limit=limit)
    world.now += 10.0
    assert bool(world.scheduler.take_back(world.now)) is is_late


@pytest.mark.spec("SCHED-96")
def test_what_follows_goes_elsewhere_than_a_request_that_was_taken_back() -> None:
    world = World()
    world.agent("a", loaded=["m"], slots=1)
    for _ in range(3):
        world.serve(world.send(prompt_tokens=100), Timings(100, 50, 0.6, 0.0, 0.1, 0.5), after=0.6)
    lease = world.send(prompt_tokens=100)
    world.agent("b", loaded=["m"], slots=1)
    again = taken_back(world, lease)
    world.end(again, timings=Timings(100, 50, 0.6, 0.0, 0.1, 0.5))
    assert world.send(prompt_tokens=100).agent_id == B
