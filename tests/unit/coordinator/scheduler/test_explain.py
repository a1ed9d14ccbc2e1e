"""Every decision can be explained."""

import pytest

from ollama_coordinator.registry import AgentSettings
from ollama_coordinator.scheduler import HoldersUnavailable, ModelNotFound, RunnerOptions
from ollama_coordinator_common.types import AgentId
from unit.coordinator.scheduler.world import World


@pytest.mark.spec("SCHED-60")
def test_a_request_that_is_not_sent_is_explained_with_every_holder() -> None:
    world = World()
    world.agent("hot", loaded=["m"], slots=1)
    world.agent("cold")
    world.agent("drained", loaded=["m"])
    world.registry.update_settings(AgentId("drained"), AgentSettings(draining=True))
    decision = world.scheduler.explain(world.request(prompt_tokens=800), world.now)
    assert (decision.action, decision.chosen) == ("go", "hot")
    told = {candidate.agent: candidate for candidate in decision.candidates}
    assert told.keys() == {"hot", "cold", "drained"}
    assert told["drained"].refused == "draining"
    assert told["cold"].action == "load"
    assert told["cold"].load_seconds > 1.0
    for name in ("hot", "cold"):
        one = told[name]
        terms = (
            one.wait_seconds + one.load_seconds + one.evict_seconds + one.prefill_seconds
            + one.decode_seconds + one.crowding_seconds + one.failure_seconds
        )  # fmt: skip
        assert one.cost == pytest.approx(terms)
    assert list(world.scheduler.leases()) == []
    assert world.scheduler.waiting(world.now) == []


@pytest.mark.spec("SCHED-60")
def test_why_a_request_would_wait_is_told() -> None:
    world = World()
    world.agent("a", models=["m", "other"], loaded=["m"], slots=1)
    world.send()
    world.submit()
    world.plan()
    decision = world.scheduler.explain(world.request(), world.now)
    assert decision.action == "wait"
    assert decision.position == 2
    assert decision.start_in_seconds is not None
    assert decision.start_in_seconds > 0
    world.send("other")
    third = world.agent("b", models=["third", "fourth"], slots=1)
    world.send("third")
    blocked = world.scheduler.explain(world.request("fourth"), world.now)
    assert blocked.chosen is None
    assert blocked.candidates[0].agent == third.name
    assert "loading" in (blocked.candidates[0].refused or "")


@pytest.mark.spec("SCHED-60")
def test_explaining_what_cannot_be_served_fails_as_sending_does() -> None:
    world = World()
    agent = world.agent("a")
    with pytest.raises(ModelNotFound):
        world.scheduler.explain(world.request("unknown"), world.now)
    agent.left = True
    world.registry.changes += 1
    with pytest.raises(HoldersUnavailable):
        world.scheduler.explain(world.request(), world.now)


@pytest.mark.spec("SCHED-61")
def test_a_lease_keeps_why_it_was_given_until_it_ends() -> None:
    world = World()
    world.agent("hot", loaded=["m"], slots=1)
    world.agent("cold")
    lease = world.send()
    decision = world.scheduler.decision(lease.id)
    assert decision is not None
    assert decision.request_id == lease.request.id
    assert decision.chosen == "hot"
    assert decision.candidates[0].agent == "hot"
    world.end(lease)
    assert world.scheduler.decision(lease.id) is None


@pytest.mark.spec("SCHED-63")
def test_a_lease_just_given_is_told_with_every_other_holder() -> None:
    world = World()
    for name in ("hot", "warm", "busy"):
        world.agent(name, models=["m", "other"], loaded=["m"], slots=1)
    world.agent("cold", models=["m", "other"])
    world.agent("loading", models=["m", "other"])
    world.agent("elsewhere", models=["other"])
    first = world.send()
    excluded = frozenset({AgentId("loading")})
    lease = world.send(excluded=excluded)
    brief, full = world.scheduler.decision(lease.id), world.scheduler.account(lease.id)
    assert brief is not None
    assert full is not None
    assert full.chosen == lease.agent_id
    assert all(one in full.candidates for one in brief.candidates)
    told = [candidate.agent for candidate in full.candidates]
    assert sorted(told) == ["busy", "cold", "hot", "warm"]
    assert told[0] == lease.agent_id
    assert full.unevaluated == 0
    taken = next(one for one in full.candidates if one.agent == first.agent_id)
    assert taken.action == "wait"
    assert taken.wait_seconds > 0
    world.end(lease)
    assert world.scheduler.account(lease.id) is None


@pytest.mark.spec("SCHED-63")
def test_a_model_in_use_with_other_options_cannot_be_loaded_anew() -> None:
    world = World()
    world.agent("free", models=["m"], loaded=["m"])
    world.agent("used", models=["m"])
    long = RunnerOptions(num_ctx=8192)
    world.began(world.send(options=long, excluded=frozenset({AgentId("free")})))
    account = world.scheduler.account(world.send().id)
    assert account is not None
    used = next(one for one in account.candidates if one.agent == "used")
    assert used.refused == "the model is in use there with other options"


@pytest.mark.spec("SCHED-63")
def test_accounts_are_bounded_in_size_and_in_time() -> None:
    world = World()
    for number in range(60):
        world.agent(f"a{number:02}", loaded=["m"], slots=30)
    lease = world.send()
    full = world.scheduler.account(lease.id)
    assert full is not None
    assert len(full.candidates) in (50, 51)
    assert full.unevaluated == 60 - len(full.candidates)
    sizes = []
    for _ in range(12):
        account = world.scheduler.account(world.send().id)
        assert account is not None
        assert len(account.candidates) + account.unevaluated == 60
        sizes.append(len(account.candidates))
    assert sizes[-1] <= 2
    world.now += 1.0
    account = world.scheduler.account(world.send().id)
    assert account is not None
    assert len(account.candidates) >= 50


@pytest.mark.spec("SCHED-62")
def test_an_operators_preference_weighs_the_estimate() -> None:
    world = World()
    for name in "ab":
        world.agent(name, loaded=["m"], slots=4)
    world.registry.update_settings(AgentId("b"), AgentSettings(preference=4.0))
    assert [world.send(prompt_tokens=500).agent_id for _ in range(2)] == ["b", "b"]


@pytest.mark.spec("SCHED-91")
def test_to_ask_changes_nothing_in_a_fleet_of_which_a_part_is_compared_at_a_time() -> None:
    """Of more than 64 free places those between the fastest and the last are compared in turn."""
    asked, silent = World(), World()
    for world in (asked, silent):
        for number in range(90):
            world.agent(f"a{number:02}", loaded=["m"], slots=1)
            preferred = AgentSettings(preference=1 + number % 7 / 10 if 24 <= number < 66 else 1)
            world.registry.update_settings(AgentId(f"a{number:02}"), preferred)
    goes: list[list[AgentId]] = [[], []]
    for _ in range(20):
        for world, agents in zip((asked, silent), goes, strict=True):
            if world is asked:
                world.scheduler.explain(world.request(), world.now)
            lease = world.send()
            agents.append(lease.agent_id)
            world.now += 0.01
    assert goes[0] == goes[1]
