"""Whatever happens in whatever order: nothing is lost or counted twice, nobody is stuck."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ollama_coordinator.scheduler import (
    Kind,
    Lane,
    Lease,
    Outcome,
    Request,
    RequestId,
    Result,
    RunnerOptions,
    SchedulerError,
    Timings,
)
from ollama_coordinator.scheduler.predicted import PredictedScheduler
from ollama_coordinator_common.types import AgentId
from unit.coordinator.scheduler.world import GB, World

AGENTS = ("a", "b", "c")
MODELS = ("m", "n", "o")
CONTEXTS = (None, 4096, 8192)
LONGEST_DRAIN = 120.0


class AnyInterleaving(RuleBasedStateMachine):
    """The protocol in any order, with agents that come, go and fail."""

    def __init__(self, policy: str = "predicted") -> None:
        super().__init__()
        self.world = World(max_queue=12, policy=policy)
        self.world.agent("a", models=MODELS, loaded=["m"], slots=2, memory=10 * GB)
        self.world.agent("b", models=MODELS, memory=30 * GB)
        self.world.agent("c", models=("m", "n"), slots=1)
        self.waiting: dict[RequestId, Request] = {}
        self.gave_up: set[RequestId] = set()
        self.leased: dict[int, Lease] = {}
        self.began: set[int] = set()

    def _take(self, leases: list[Lease]) -> None:
        for lease in leases:
            assert lease.id not in self.leased
            del self.waiting[lease.request.id]
            assert lease.agent_id not in lease.request.excluded
            self.leased[lease.id] = lease
        for request_id in self.world.refused:
            self.waiting.pop(request_id, None)
        assert self.gave_up <= self.world.refused.keys()

    @rule(
        model=st.sampled_from(MODELS),
        kind=st.sampled_from(Kind),
        lane=st.sampled_from(Lane),
        client=st.sampled_from(("x", "y")),
        context=st.sampled_from(CONTEXTS),
        patience=st.sampled_from((None, 2.0, 20.0)),
        excluded=st.sets(st.sampled_from(AGENTS), max_size=2),
        tokens=st.integers(0, 5000),
    )
    def submit(self, model, kind, lane, client, context, patience, excluded, tokens):  # type: ignore[no-untyped-def]
        world = self.world
        request = world.request(
            model, kind=kind, lane=lane, client=client, prompt_tokens=tokens,
            prefix=(tokens % 3, tokens), options=RunnerOptions(num_ctx=context),
            deadline=None if patience is None else world.now + patience,
            excluded=frozenset(map(AgentId, excluded)),
        )  # fmt: skip
        try:
            world.scheduler.submit(request, world.now)
        except SchedulerError:
            return
        self.waiting[request.id] = request
        still = {one.request.id for one in world.scheduler.waiting(world.now)}
        gave_up = self.waiting.keys() - still  # its place, if the queue was full
        assert len(gave_up) <= 1
        for request_id in gave_up:
            assert self.waiting.pop(request_id).client != client
        self.gave_up |= gave_up

    @rule()
    def plan(self) -> None:
        self._take(self.world.plan())

    @rule(seconds=st.sampled_from((0.01, 0.5, 3.0, 30.0)))
    def pass_time(self, seconds: float) -> None:
        self._take(self.world.tick(seconds))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.waiting)))
        self.world.scheduler.withdraw(request_id, self.world.now)
        del self.waiting[request_id]

    @precondition(lambda self: self.leased.keys() - self.began)
    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        lease_id = data.draw(st.sampled_from(sorted(self.leased.keys() - self.began)))
        self.world.began(self.leased[lease_id])
        self.began.add(lease_id)

    @precondition(lambda self: self.leased)
    @rule(
        data=st.data(),
        result=st.sampled_from(Result),
        timings=st.sampled_from(
            (None, Timings(400, 100), Timings(400, 100, 5.0, 0.1, 1.0, 3.0), Timings(0, 0, 0.0))
        ),
    )
    def end(self, data: st.DataObject, result: Result, timings: Timings | None) -> None:
        world = self.world
        lease = self.leased.pop(data.draw(st.sampled_from(sorted(self.leased))))
        agent = world.registry.get(lease.agent_id)
        if result is Result.UNREACHABLE:
            world.registry.fail(agent, "refused", world.now)
        elif result is Result.MODEL_FAILED:
            world.registry.fail_model(agent, lease.request.model, "failed", world.now)
        elif result is Result.SERVED:
            world.registry.succeeded(agent, lease.request.model)
        world.scheduler.end(lease.id, Outcome(result, timings=timings), world.now)
        with pytest.raises(KeyError):
            world.scheduler.end(lease.id, Outcome(result), world.now)

    @rule(name=st.sampled_from(AGENTS))
    def fail(self, name: str) -> None:
        self.world.registry.fail(self.world.registry.get(name), "refused", self.world.now)

    @rule(name=st.sampled_from(AGENTS))
    def come_back(self, name: str) -> None:
        self.world.registry.probed(self.world.registry.get(name))

    @rule(name=st.sampled_from(AGENTS), gone=st.booleans())
    def leave_or_return(self, name: str, gone: bool) -> None:
        self.world.registry.get(name).left = gone
        self.world.registry.changes += 1

    @rule(loaded=st.sets(st.sampled_from(MODELS)))
    def report(self, loaded: set[str]) -> None:
        self.world.agent("b", models=MODELS, loaded=sorted(loaded), memory=30 * GB)

    @invariant()
    def every_count_derives_from_leases(self) -> None:
        leases = list(self.world.scheduler.leases())
        assert {lease.id for lease in leases} == self.leased.keys()
        for name in AGENTS:
            mine = sum(lease.agent_id == name for lease in leases)
            assert self.world.scheduler.in_flight(AgentId(name)) == mine

    @invariant()
    def nothing_is_lost(self) -> None:
        queue = {one.request.id for one in self.world.scheduler.waiting(self.world.now)}
        assert queue == self.waiting.keys()
        assert self.world.scheduler.waiting_count() == len(queue)
        # Until the next plan, one more of each queue may be in it: who has a free place.
        assert len(queue) <= 12 + len(MODELS) * len(CONTEXTS)

    @invariant()
    def nobody_is_sent_more_than_it_runs(self) -> None:
        for name, most in (("a", 2), ("c", 1)):
            for model in MODELS:
                mine = [
                    lease
                    for lease in self.world.scheduler.leases()
                    if lease.agent_id == name and lease.request.name == model
                ]
                embeds = any(lease.request.kind is Kind.EMBED for lease in mine)
                assert len(mine) <= (3 if embeds else most) or self._embedded(model)

    def _embedded(self, model: str) -> bool:
        """Once used for embeddings, a model has their two extra places."""
        return any(
            slots.slots == 1 and slots.slots_reported and slots.model.endswith(f"/{model}:latest")
            for slots in self.world.scheduler.estimates()
        )

    @invariant()
    def predicted_ends_are_in_order_and_add_up(self) -> None:
        if not isinstance(self.world.scheduler, PredictedScheduler):
            return
        for queue in self.world.scheduler._queues._queues.values():
            assert queue.ends == sorted((run.ends_at, run.number, run) for *_, run in queue.ends)
        for machine in self.world.scheduler._machines.by_agent.values():
            ends = [run.ends_at for place in machine.busy for run in place.running.values()]
            assert machine.ends == pytest.approx(sum(ends))
            assert machine.running == len(ends)
            assert set(machine.busy) >= {
                place for place in machine.places.values() if place.running
            }
            assert all(place.running for place in machine.busy)

    @invariant()
    def no_free_slot_is_overlooked(self) -> None:
        if not isinstance(self.world.scheduler, PredictedScheduler):
            return
        queues = self.world.scheduler._queues
        for queue in queues._queues.values():
            queues.refresh(queue, self.world.now)
            free = {place for place in queue.hot if len(place.running) < place.slots.limit}
            assert set(queue.with_free_slot()) == free

    @invariant()
    def whoever_waits_is_looked_after(self) -> None:
        wake = self.world.scheduler.wake_at(self.world.now)
        assert (wake is None) == (not self.waiting)
        assert wake is None or wake >= self.world.now

    def teardown(self) -> None:
        """At the end everybody is served: nobody is stuck, and nothing remains."""
        world = self.world
        for name in AGENTS:
            agent = world.registry.get(name)
            agent.left = False
            world.registry.probed(agent)
        world.registry.changes += 1
        until = world.now + LONGEST_DRAIN
        while (self.waiting or self.leased) and world.now < until:
            for lease in list(self.leased.values()):
                del self.leased[lease.id]
                self._take(world.end(lease, Result.CANCELLED))
            self._take(world.tick(1.0))
        assert not self.waiting
        assert list(world.scheduler.leases()) == []
        assert world.scheduler.wake_at(world.now) is None
        if isinstance(world.scheduler, PredictedScheduler):
            for machine in world.scheduler._machines.by_agent.values():
                assert machine.waiting_load == 0.0
                assert all(place.waiting_load == 0.0 for place in machine.places.values())


@pytest.mark.spec("SCHED-80")
def test_any_interleaving_leaves_every_count_right_and_nobody_stuck() -> None:
    limits = settings(max_examples=60, stateful_step_count=40, deadline=None)
    run_state_machine_as_test(AnyInterleaving, settings=limits)
