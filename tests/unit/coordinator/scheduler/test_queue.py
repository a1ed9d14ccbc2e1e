"""The waiting queue: limit, order, deadlines, leaving."""

import pytest

from ollama_coordinator.scheduler import Lane, QueueFull, Timings
from unit.coordinator.scheduler.world import World

TWO_SECONDS = Timings(100, 100, 2.0, 0.0, 0.1, 1.9)


def busy_world(max_queue: int = 100, policy: str = "predicted") -> World:
    """One agent with one slot, taken."""
    world = World(max_queue=max_queue, policy=policy)
    world.agent("a", loaded=["m"], slots=1)
    world.send()
    return world


@pytest.mark.spec("SCHED-10")
def test_a_full_queue_is_answered_like_ollama_with_a_time_to_come_back() -> None:
    world = busy_world(max_queue=2)
    world.submit()
    world.submit()
    with pytest.raises(QueueFull) as caught:
        world.submit()
    assert str(caught.value) == "server busy, please try again.  maximum pending requests exceeded"
    assert 1.0 <= caught.value.retry_after_seconds <= 60.0


@pytest.mark.spec("SCHED-10")
def test_the_time_to_come_back_follows_the_rate_of_grants() -> None:
    def refusal(seconds: float) -> float:
        world = busy_world(max_queue=20)
        (lease,) = world.scheduler.leases()
        for _ in range(20):
            world.submit()
        for _ in range(10):
            world.submit() if len(world.scheduler.waiting(world.now)) < 20 else None
            (lease,) = world.serve(lease, TWO_SECONDS, after=seconds)
        world.submit()
        with pytest.raises(QueueFull) as caught:
            world.submit()
        return caught.value.retry_after_seconds

    assert refusal(0.5) < refusal(5.0)


@pytest.mark.spec("SCHED-18")
@pytest.mark.parametrize("policy", ["predicted", "round-robin"])
def test_the_client_with_most_in_a_full_queue_gives_up_its_last_place(policy: str) -> None:
    world = busy_world(max_queue=5, policy=policy)
    flood = [world.submit(client="flood") for _ in range(4)]
    world.submit(client="other")
    for _ in range(2):
        world.submit(client="new")
    assert world.plan() == []
    assert list(world.refused) == [flood[3].id, flood[2].id]
    assert all(isinstance(error, QueueFull) for error in world.refused.values())
    for client in ("flood", "new"):  # they have most of it themselves
        with pytest.raises(QueueFull):
            world.submit(client=client)
    assert world.scheduler.waiting_count() == 5


@pytest.mark.spec("SCHED-18")
def test_clients_with_one_place_each_keep_it() -> None:
    world = busy_world(max_queue=3)
    for client in "abc":
        world.submit(client=client)
    with pytest.raises(QueueFull):
        world.submit(client="new")


@pytest.mark.spec("SCHED-18")
def test_a_repeated_request_gives_up_no_place() -> None:
    world = busy_world(max_queue=3)
    first = world.submit(client="flood")
    for _ in range(2):
        world.submit(client="flood", admitted=True)
    world.submit(client="new")
    world.plan()
    assert list(world.refused) == [first.id]


@pytest.mark.spec("SCHED-11")
def test_a_full_queue_of_one_model_refuses_no_request_that_need_not_wait() -> None:
    world = World(max_queue=1)
    world.agent("a", models=["m", "idle"], loaded=["m", "idle"], slots=1)
    world.send("m")
    world.submit("m")
    assert world.send("idle").agent_id == "a"


@pytest.mark.spec("SCHED-11")
@pytest.mark.parametrize("max_queue", [0, 1])
def test_a_full_queue_refuses_no_request_that_an_idle_agent_can_load(max_queue: int) -> None:
    world = World(max_queue=max_queue)
    world.agent("a", loaded=["m"], slots=1)
    world.agent("b", models=["cold"], slots=1)
    world.send("m")
    for _ in range(max_queue):
        world.submit("m")
    assert world.send("cold").agent_id == "b"
    with pytest.raises(QueueFull):
        world.submit("cold")
    with pytest.raises(QueueFull):
        world.submit("m")


@pytest.mark.spec("SCHED-11")
@pytest.mark.parametrize("policy", ["loaded-first", "least-connections", "round-robin"])
@pytest.mark.parametrize("max_queue", [0, 1])
def test_the_policies_that_count_refuse_no_request_that_has_a_slot(
    policy: str, max_queue: int
) -> None:
    world = World(max_queue=max_queue, policy=policy)
    world.agent("a", slots=1)
    world.agent("b", models=["idle"], slots=1)
    world.send("m")
    for _ in range(max_queue):
        world.submit("m")
    assert world.plan() == []
    assert world.send("idle").agent_id == "b"
    with pytest.raises(QueueFull):
        world.submit("m")


@pytest.mark.spec("SCHED-12")
def test_interactive_requests_go_before_batch_until_the_batch_is_due() -> None:
    world = busy_world()
    (lease,) = world.scheduler.leases()
    batch = world.submit(lane=Lane.BATCH)
    chat = world.submit()
    assert [waiting.request for waiting in world.scheduler.waiting(world.now)] == [chat, batch]
    world.now += 85.0
    late = world.submit()
    (lease,) = world.end(lease)
    assert lease.request is chat
    (lease,) = world.end(lease)
    assert lease.request is batch
    (lease,) = world.end(lease)
    assert lease.request is late


@pytest.mark.spec("SCHED-8")
def test_clients_take_turns_by_predicted_work() -> None:
    world = busy_world()
    (lease,) = world.scheduler.leases()
    for _ in range(5):
        world.submit(client="greedy")
    world.submit(client="polite")
    order = []
    for _ in range(6):
        (lease,) = world.end(lease)
        order.append(lease.request.client)
    assert order.index("polite") <= 1


@pytest.mark.spec("SCHED-13")
def test_a_clients_weight_is_its_share() -> None:
    world = World()
    world.agent("a", loaded=["m"], slots=1)
    lease = world.send(client="other")
    for _ in range(12):
        world.submit(client="double", weight=2.0)
        world.submit(client="single")
    order = []
    for _ in range(12):
        (lease,) = world.end(lease)
        order.append(lease.request.client)
    assert order.count("double") in (7, 8, 9)


@pytest.mark.spec("SCHED-14")
@pytest.mark.parametrize("policy", ["predicted", "least-connections"])
def test_a_deadline_ends_the_wait(policy: str) -> None:
    world = busy_world(policy=policy)
    request = world.submit(deadline=world.now + 3.0)
    assert world.scheduler.wake_at(world.now) is not None
    world.tick(2.9)
    assert request.id not in world.refused
    world.tick(0.2)
    assert isinstance(world.refused[request.id], QueueFull)
    assert world.scheduler.waiting(world.now) == []


@pytest.mark.spec("SCHED-15")
def test_a_request_that_leaves_the_queue_is_never_served_and_gives_back_its_turn() -> None:
    world = busy_world()
    (lease,) = world.scheduler.leases()
    for request in [world.submit(client="left") for _ in range(20)]:
        world.scheduler.withdraw(request.id, world.now)
    world.scheduler.withdraw(request.id, world.now)
    first = world.submit(client="left")
    world.submit(client="new")
    (lease,) = world.end(lease)
    assert lease.request is first


@pytest.mark.spec("SCHED-16")
def test_the_line_tells_positions_and_predicted_starts() -> None:
    world = World()
    world.agent("a", loaded=["m"], slots=1)
    lease = world.send(output_limit=100)
    for _ in range(8):
        world.serve(lease, TWO_SECONDS, after=2.0)
        lease = world.send(output_limit=100)
    for _ in range(3):
        world.submit(output_limit=100)
    world.plan()
    queue = world.scheduler.waiting(world.now)
    assert [waiting.position for waiting in queue] == [1, 2, 3]
    starts = [waiting.start_in_seconds for waiting in queue]
    assert starts == pytest.approx([2.0, 4.0, 6.0], rel=0.35)


@pytest.mark.spec("SCHED-17")
def test_an_idle_scheduler_wants_no_waking() -> None:
    world = busy_world()
    assert world.scheduler.wake_at(world.now) is None
    world.submit()
    world.plan()
    wake = world.scheduler.wake_at(world.now)
    assert wake is not None
    assert world.now <= wake <= world.now + 0.5
