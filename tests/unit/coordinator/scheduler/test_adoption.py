"""One scheduler takes over from another over the same registry: what runs and what waits."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule, run_state_machine_as_test

from ollama_coordinator.registry import Registry
from ollama_coordinator.scheduler import (
    POLICIES,
    DoesNotPredict,
    HoldersUnavailable,
    Kind,
    Scheduler,
    SchedulerError,
    Timings,
    create_scheduler,
)
from ollama_coordinator_common.types import AgentId
from unit.coordinator.scheduler.test_properties import MODELS, AnyInterleaving
from unit.coordinator.scheduler.world import World

PREDICTED, COUNTING = "predicted", "round-robin"
SPOKEN = Timings(400, 100, 5.0, 1.0, 1.0, 2.0)
NO_LIMIT = 1_000_000


def take_over(world: World, policy: str) -> None:
    """A scheduler of this policy goes on where the one before stands."""
    old, new = world.scheduler, create_scheduler(policy, world.registry, max_queue=NO_LIMIT)
    new.import_state(old.export_state())
    for lease in sorted(old.leases(), key=lambda lease: lease.id):
        assert new.adopt(lease, world.now)
    for waiting in old.waiting(world.now):
        try:
            new.submit(waiting.request, world.now)
        except SchedulerError as error:
            world.refused[waiting.request.id] = error
    new.max_queue = old.max_queue
    world.scheduler = new


class AnyTakeovers(AnyInterleaving):
    """The same, with schedulers of any policy that take over, and changes of the queue's limit."""

    def __init__(self) -> None:
        super().__init__(PREDICTED)
        self.given: set[int] = set()
        self.embedding: set[str] = set()

    @rule(policy=st.sampled_from(POLICIES))
    def take_over(self, policy: str) -> None:
        self._take(self.world.plan())
        before = [lease.id for lease in self.world.scheduler.leases()]
        take_over(self.world, policy)
        assert sorted(before) == sorted(lease.id for lease in self.world.scheduler.leases())
        self._take(self.world.plan())

    @rule(count=st.sampled_from((0, 3, 12)))
    def limit(self, count: int) -> None:
        self.world.scheduler.max_queue = count

    @invariant()
    def no_id_is_given_twice(self) -> None:
        new = self.leased.keys() - self.given
        assert all(lease_id not in self.given for lease_id in new)
        self.given |= new

    @invariant()
    def nobody_is_sent_more_than_it_runs(self) -> None:
        """Embeddings have two slots more under the policy that predicts, and keep them."""
        sent = [lease.request for lease in self.leased.values()]
        for request in (*sent, *self.waiting.values()):
            if request.kind is Kind.EMBED:
                self.embedding.add(request.name)
        for name, most in (("a", 2), ("c", 1)):
            for model in MODELS:
                mine = [
                    lease
                    for lease in self.leased.values()
                    if lease.agent_id == name and lease.request.name == model
                ]
                assert len(mine) <= (3 if model in self.embedding else most)

    @invariant()
    def whoever_waits_is_looked_after(self) -> None:
        """Policies that count are woken by events alone."""
        wake = self.world.scheduler.wake_at(self.world.now)
        assert wake is None or (self.waiting and wake >= self.world.now)
        if self.world.scheduler.policy == PREDICTED:
            assert (wake is None) == (not self.waiting)


@pytest.mark.spec("SCHED-80")
@pytest.mark.spec("SCHED-74")
def test_any_interleaving_with_takeovers_leaves_every_count_right_and_nobody_stuck() -> None:
    limits = settings(max_examples=60, stateful_step_count=40, deadline=None)
    run_state_machine_as_test(AnyTakeovers, settings=limits)


@pytest.mark.spec("SCHED-74")
@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != PREDICTED])
def test_a_takeover_loses_nobody_and_keeps_the_order(policy: str) -> None:
    world = World(policy=PREDICTED)
    world.agent("a", loaded=["m"], slots=1)
    running = world.send()
    waiting = [world.submit() for _ in range(3)]
    assert world.plan() == []
    for name in (policy, PREDICTED, policy):
        take_over(world, name)
        assert world.plan() == []
        assert [lease.id for lease in world.scheduler.leases()] == [running.id]
        assert world.scheduler.in_flight(AgentId("a")) == 1
        queue = world.scheduler.waiting(world.now)
        assert [one.request.id for one in queue] == [request.id for request in waiting]
        assert world.scheduler.waiting_count() == len(queue)
    ids = {running.id}
    lease = running
    for expected in waiting:
        (lease,) = world.end(lease, timings=SPOKEN)
        assert lease.request is expected
        ids.add(lease.id)
    assert len(ids) == 4


@pytest.mark.spec("SCHED-74")
@pytest.mark.parametrize("policy", [PREDICTED, COUNTING])
def test_who_cannot_be_served_any_more_is_refused_by_the_new_scheduler(policy: str) -> None:
    world = World(policy=PREDICTED)
    world.agent("a", loaded=["m"], slots=1)
    world.send()
    request = world.submit()
    world.plan()
    world.registry.get("a").left = True
    world.registry.changes += 1
    take_over(world, policy)
    assert isinstance(world.refused.pop(request.id), HoldersUnavailable)
    assert world.plan() == []
    assert world.scheduler.wake_at(world.now) is None


@pytest.mark.spec("SCHED-74")
@pytest.mark.parametrize("policy", [PREDICTED, COUNTING])
def test_a_lease_on_an_agent_that_was_removed_is_not_taken_over(policy: str) -> None:
    world = World(policy=COUNTING)
    world.agent("a", loaded=["m"])
    lease = world.send()
    world.registry.remove(AgentId("a"))
    new = create_scheduler(policy, world.registry, max_queue=9)
    assert not new.adopt(lease, world.now)
    assert list(new.leases()) == []
    assert new.in_flight(AgentId("a")) == 0


@pytest.mark.spec("SCHED-56")
def test_what_was_learned_is_kept_by_a_policy_that_does_not_predict() -> None:
    world = World(policy=PREDICTED)
    world.agent("a", loaded=["m"], slots=1)
    for _ in range(5):
        world.serve(world.send(prompt_tokens=400), SPOKEN, after=5.0)
    learned = world.scheduler.export_state()
    assert learned.pairs
    before = world.scheduler.estimates()
    take_over(world, COUNTING)
    assert world.scheduler.export_state() == learned
    world.serve(world.send(prompt_tokens=400), SPOKEN, after=5.0)
    take_over(world, PREDICTED)
    world.plan()
    assert world.scheduler.estimates() == before
    fresh: Scheduler = create_scheduler(COUNTING, Registry(60.0), max_queue=9)
    fresh.import_state(learned)
    assert fresh.export_state() == learned


@pytest.mark.spec("SCHED-64")
@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != PREDICTED])
def test_a_policy_that_does_not_predict_explains_nothing(policy: str) -> None:
    world = World(policy=policy)
    world.agent("a", loaded=["m"])
    lease = world.send()
    assert world.scheduler.decision(lease.id) is None
    assert world.scheduler.account(lease.id) is None
    assert world.scheduler.estimate(AgentId("a"), lease.request.model) is None
    for asked in (
        lambda: world.scheduler.explain(world.request(), world.now),
        world.scheduler.estimates,
    ):
        with pytest.raises(DoesNotPredict):
            asked()


@pytest.mark.spec("SCHED-61")
def test_why_an_adopted_lease_was_given_is_not_known() -> None:
    world = World(policy=PREDICTED)
    world.agent("a", loaded=["m"])
    lease = world.send()
    assert world.scheduler.decision(lease.id) is not None
    take_over(world, PREDICTED)
    assert world.scheduler.decision(lease.id) is None
    assert world.scheduler.account(lease.id) is None


@pytest.mark.spec("SCHED-74")
def test_an_adopted_request_loads_what_is_not_in_memory() -> None:
    world = World(policy=COUNTING)
    world.agent("a", models=("m", "n"), memory=40_000_000_000, slots=1)
    first = world.send("m")
    take_over(world, PREDICTED)
    world.plan()
    world.submit("n")
    assert world.plan() == []
    (second,) = world.serve(first, SPOKEN)
    assert second.request.name == "n"


@pytest.mark.spec("SCHED-74")
def test_who_waits_in_fair_order_is_handed_over_in_it() -> None:
    world = World(policy=PREDICTED)
    world.agent("a", loaded=["m"], slots=1)
    world.send(client="greedy")
    for _ in range(10):
        world.submit(client="greedy")
    world.now += 0.5
    polite = world.submit(client="polite")
    before = [one.request.id for one in world.scheduler.waiting(world.now)]
    assert before.index(polite.id) <= 1
    take_over(world, COUNTING)
    assert [one.request.id for one in world.scheduler.waiting(world.now)] == before


@pytest.mark.spec("SCHED-74")
def test_what_ran_before_a_takeover_teaches_no_speed() -> None:
    world = World(policy=PREDICTED)
    world.agent("a", loaded=["m"], slots=4)
    for _ in range(6):
        world.serve(world.send(prompt_tokens=400), Timings(400, 100, 3.0, 0.0, 1.0, 2.0), after=3.0)
    (before,) = world.scheduler.estimates()
    take_over(world, COUNTING)
    leases = [world.send(prompt_tokens=400) for _ in range(4)]
    world.now += 60.0
    take_over(world, PREDICTED)
    for lease in leases:
        world.end(lease, timings=Timings(400, 1360, 61.0, 0.0, 1.0, 60.0))
    (after,) = world.scheduler.estimates()
    assert after.decode_tokens_per_second == before.decode_tokens_per_second
