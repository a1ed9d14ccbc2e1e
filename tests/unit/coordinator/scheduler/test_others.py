"""What a request costs others: those who run where it goes, and those who wait there."""

import pytest
from msgspec import structs

from ollama_coordinator.scheduler import Lane, Lease, Result, Timings
from ollama_coordinator.scheduler.state import Machine
from ollama_coordinator_common.types import AgentId
from unit.coordinator.scheduler.world import GB, World

FAST = Timings(100, 100, 1.1, 0.0, 0.1, 1.0)
SLOW = Timings(100, 100, 10.3, 0.0, 0.3, 10.0)


def fast_and_slow(slow: Timings = SLOW) -> World:
    """Two idle agents with model `m`; the fast one serves `x` too, which it has to itself."""
    world = World()
    world.agent("fast", models=["m", "x"], loaded=["m", "x"], slots=1)
    world.agent("slow", models=["m"], loaded=["m"], slots=1)
    for _ in range(12):
        for name, other, timings in (("fast", "slow", FAST), ("slow", "fast", slow)):
            lease = world.send("m", prompt_tokens=100, excluded=frozenset({other}))
            assert lease.agent_id == name
            world.serve(lease, timings, after=timings.total_seconds or 0.0)
        world.serve(world.send("x", prompt_tokens=100), FAST, after=1.1)
    return world


def machine_of(world: World, name: str) -> Machine:
    return world.predictor._machines.by_agent[AgentId(name)]


def send(world: World, lane: Lane = Lane.INTERACTIVE) -> Lease:
    return world.send("m", prompt_tokens=100, lane=lane)


def test_a_faster_agent_is_worth_the_company_there() -> None:
    world = fast_and_slow()
    world.send("x", prompt_tokens=100)
    assert send(world).agent_id == "fast"


@pytest.mark.spec("SCHED-9")
def test_an_agent_for_which_others_wait_is_left_to_them() -> None:
    world = fast_and_slow()
    world.send("x", prompt_tokens=100)
    waiting = [world.submit("x", prompt_tokens=100) for _ in range(3)]
    assert world.plan() == []
    lease = send(world)
    assert lease.agent_id == "slow"
    world.end(lease)
    for request in waiting:
        world.scheduler.withdraw(request.id, world.now)
    world.plan()
    assert send(world).agent_id == "fast"


@pytest.mark.spec("SCHED-9")
def test_who_waited_in_vain_is_counted_no_longer() -> None:
    world = fast_and_slow()
    world.send("x", prompt_tokens=100)
    for seconds in (0.2, 0.2, 0.2, 60.0):
        world.submit("x", prompt_tokens=100, deadline=world.now + seconds)
    assert world.plan() == []
    assert machine_of(world, "fast").waiting_load == 4.0
    assert world.plan(after=0.2) == []
    assert len(world.refused) == 3
    assert machine_of(world, "fast").waiting_load == 1.0


@pytest.mark.spec("SCHED-9")
def test_the_waiting_of_an_agent_that_vanished_does_not_come_back_with_it() -> None:
    world = fast_and_slow()
    lease = world.send("x", prompt_tokens=100)
    requests = [world.submit("x", prompt_tokens=100) for _ in range(3)]
    assert world.plan() == []
    world.registry.remove(lease.agent_id)
    world.end(lease, Result.CANCELLED)
    for request in requests:
        world.scheduler.withdraw(request.id, world.now)
    world.plan()
    world.agent("fast", models=["m", "x"], loaded=["m", "x"], slots=1)
    world.plan(after=2.0)
    machine = machine_of(world, "fast")
    assert machine.waiting_load == 0.0
    assert not machine.busy


@pytest.mark.spec("SCHED-19")
def test_batch_keeps_away_from_those_who_wait_for_their_answers() -> None:
    world = fast_and_slow()
    world.send("x", prompt_tokens=100)
    assert send(world, Lane.BATCH).agent_id == "slow"


@pytest.mark.spec("SCHED-19")
def test_batch_has_the_fastest_agent_when_nobody_is_there() -> None:
    assert send(fast_and_slow(), Lane.BATCH).agent_id == "fast"


@pytest.mark.spec("SCHED-19")
def test_batch_takes_a_slow_slot_where_others_wait_for_a_fast_one() -> None:
    world = fast_and_slow(Timings(100, 100, 60.3, 0.0, 0.3, 60.0))
    assert send(world).agent_id == "fast"
    for _ in range(8):
        world.submit("m", prompt_tokens=100)
    assert world.plan() == []
    assert send(world, Lane.BATCH).agent_id == "slow"


@pytest.mark.spec("SCHED-58")
def test_ends_are_predicted_anew_when_company_comes_and_goes() -> None:
    world = fast_and_slow()

    def start() -> float:
        (waiting,) = world.scheduler.waiting(world.now)
        assert waiting.start_in_seconds is not None
        return waiting.start_in_seconds

    world.send("x", prompt_tokens=100)
    world.submit("x", prompt_tokens=100)
    world.plan()
    alone = start()
    guest = world.send("m", prompt_tokens=100, excluded=frozenset({"slow"}))
    assert start() == pytest.approx(2 * alone)
    world.end(guest)
    assert start() == pytest.approx(alone)


def hot_and_cold() -> World:
    """One agent has `m` in memory and is busy with it, the other must push out `x` for it."""
    world = World()
    world.agent("hot", models={"m": 8 * GB}, loaded=["m"], slots=1, memory=12 * GB)
    both = {"m": 8 * GB, "x": 8 * GB}
    world.agent("cold", models=both, loaded=["x"], slots=1, memory=12 * GB)
    for _ in range(6):
        lease = world.send("m", prompt_tokens=100, excluded=frozenset({"cold"}))
        world.serve(lease, SLOW, after=10.3)
    world.tick(10.0)
    for _ in range(5):
        world.serve(world.send("x", prompt_tokens=100), FAST, after=1.0)
    world.send("m", prompt_tokens=100)
    return world


@pytest.mark.spec("SCHED-3")
@pytest.mark.parametrize("lanes", [[Lane.BATCH] * 3, [Lane.BATCH], []])
def test_batch_that_rather_waits_keeps_nobody_from_a_load(lanes: list[Lane]) -> None:
    world = hot_and_cold()
    for lane in lanes:
        world.submit("m", prompt_tokens=100, lane=lane)
    assert world.plan() == []
    for _ in range(3):
        world.submit("m", prompt_tokens=100)
    (lease,) = world.plan()
    assert lease.agent_id == "cold"
    assert lease.request.lane is Lane.INTERACTIVE


@pytest.mark.spec("SCHED-41")
def test_a_conversation_under_way_keeps_its_model_and_what_it_has_read() -> None:
    world = hot_and_cold()
    calls = (
        Timings(20_000, 50, 21.0, 0.0, 20.0, 1.0),
        *[Timings(20_000, 50, 1.1, 0.0, 0.1, 1.0)] * 3,
    )
    for number, timings in enumerate(calls):  # of a program that goes on a second later
        prefix = tuple(range(number + 1))
        world.serve(world.send("x", prompt_tokens=20_000, prefix=prefix), timings, after=1.1)
        world.tick(1.0)
    for _ in range(3):
        world.submit("m", prompt_tokens=100)
    assert world.plan() == []
    world.tick(15.0)
    assert [lease.agent_id for lease in world.plan(after=120.0)] == ["cold"]


def test_an_agent_that_gets_idle_is_offered_to_interactive_requests_before_batch() -> None:
    world = hot_and_cold()
    other = world.send("x", prompt_tokens=100)
    for lane in (*[Lane.INTERACTIVE] * 3, Lane.BATCH):
        world.submit("m", prompt_tokens=100, lane=lane)
    assert world.plan() == []
    (lease,) = world.end(other)
    assert lease.agent_id == "cold"
    assert lease.request.lane is Lane.INTERACTIVE


def two_equal() -> World:
    """Two idle agents of one known speed, one slot each."""
    world = World()
    for name in ("used", "idle"):
        world.agent(name, loaded=["m"], slots=1)
    for _ in range(4):
        for other in ("used", "idle"):
            lease = world.send(prompt_tokens=100, excluded=frozenset({other}))
            world.serve(lease, FAST, after=1.1)
    return world


def to_used(world: World) -> Lease:
    return world.send(prompt_tokens=100, excluded=frozenset({"idle"}))


def shares(world: World, count: int = 6) -> int:
    """How many of so many requests, one after the other, go to the agent that is used."""
    used = 0
    for _ in range(count):
        lease = world.send(prompt_tokens=100)
        used += lease.agent_id == "used"
        world.serve(lease, FAST, after=1.1)
    return used


@pytest.mark.spec("SCHED-95")
def test_a_wait_that_nothing_explains_counts_for_a_minute() -> None:
    world = two_equal()
    assert shares(world) == 3
    waited = Timings(100, 100, 11.1, 0.0, 0.1, 1.0)
    world.serve(to_used(world), waited, after=11.1)
    assert shares(world, 40) == 0
    world.tick(60.0)
    assert shares(world) == 3


@pytest.mark.spec("SCHED-95")
def test_a_wait_that_the_load_explains_does_not_count() -> None:
    world = two_equal()
    world.serve(to_used(world), Timings(100, 100, 11.1, 10.0, 0.1, 1.0), after=11.1)
    assert shares(world) == 3


@pytest.mark.spec("SCHED-95")
def test_a_prompt_whose_client_left_is_read_to_its_end_or_until_the_agent_answers() -> None:
    world = two_equal()
    for answers in (False, True):
        lease = world.send(prompt_tokens=60_000, excluded=frozenset({"idle"}))  # 60 s
        world.now += 1.0
        world.end(lease, Result.CANCELLED)
        assert shares(world) == 0
        if answers:
            world.serve(to_used(world), FAST, after=1.1)
        else:
            world.tick(60.0)
        assert shares(world) == 3


@pytest.mark.spec("SCHED-95")
def test_a_stream_that_was_given_up_without_a_byte_shows_a_wait() -> None:
    world = two_equal()
    lease = to_used(world)
    world.now += 10.0
    world.end(lease, Result.CANCELLED)
    assert shares(world) == 0


@pytest.mark.spec("SCHED-95")
def test_reports_count_what_is_not_ours_and_are_forgotten() -> None:
    world = two_equal()
    world.tick(6.0)
    ours = to_used(world)
    agent = world.registry.get(ours.agent_id)
    assert agent.report is not None
    for active, others in ((1, 0), (2, 1)):
        agent.report = structs.replace(agent.report, active_requests=active)
        assert machine_of(world, "used").not_ours(world.now) == others
    world.end(ours, timings=FAST)
    assert machine_of(world, "used").not_ours(world.now) == 1
    world.scheduler.reported(agent.id, world.now)
    assert shares(world) == 0
    world.tick(30.0)
    assert shares(world) == 3
