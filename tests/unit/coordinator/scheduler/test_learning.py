"""Estimates: priors, what is learned, how long it is kept."""

from random import Random
from typing import Any

import msgspec
import pytest
from msgspec import UNSET, Raw, structs

from ollama_coordinator.scheduler import Kind, Timings
from ollama_coordinator.scheduler.eviction import wanted_again
from ollama_coordinator.scheduler.export import Estimate, Learned
from ollama_coordinator.scheduler.prompt_cache import PromptCaches
from ollama_coordinator.scheduler.queue import FadingRate
from ollama_coordinator.scheduler.queues import DEMAND_MEMORY_SECONDS
from ollama_coordinator.scheduler.rates import OutputLengths, Quantity, Rates, prior
from ollama_coordinator.scheduler.types import Form, Request
from ollama_coordinator_common.types import AgentId
from unit.coordinator.scheduler.world import GB, M, World

A, B = AgentId("a"), AgentId("b")


def estimate(world: World, agent: str = "a", model: str = M) -> Estimate:
    (found,) = [
        one for one in world.scheduler.estimates() if (one.agent_id, one.model) == (agent, model)
    ]
    return found


def taught(**fields: float) -> World:
    """A world whose one agent has answered ten requests at the same speed."""
    world = World()
    world.agent("a", slots=1)
    timings = Timings(**{"prompt_tokens": 400, "output_tokens": 100, "total_seconds": 6.0,
                         "load_seconds": 0.01, "prompt_seconds": 2.0, "output_seconds": 4.0,
                         **fields})  # type: ignore[arg-type]  # fmt: skip
    for _ in range(10):
        world.serve(world.send(), timings, after=6.0)
    return world


@pytest.mark.spec("SCHED-50")
def test_rates_are_learned_from_what_ollama_reports() -> None:
    world = World()
    world.agent("a", slots=1)
    world.plan()
    before = estimate(world)
    assert before.decode_tokens_per_second == pytest.approx(
        prior(Quantity.DECODE, 4 * GB), rel=0.01
    )
    after = estimate(taught())
    assert after.prefill_tokens_per_second == pytest.approx(200, rel=0.1)
    assert after.decode_tokens_per_second == pytest.approx(25, rel=0.1)


@pytest.mark.spec("SCHED-50")
def test_load_seconds_are_learned_from_loads_only() -> None:
    world = World()
    world.agent("a", slots=1)
    lease = world.send()
    world.serve(lease, Timings(100, 100, 14.0, 12.0, 0.1, 1.9), after=14.0)
    assert estimate(world).load_seconds == pytest.approx(12.0, rel=0.35)
    learned = estimate(world).load_seconds
    world.serve(world.send(), Timings(100, 100, 2.0, 0.02, 0.1, 1.9), after=2.0)
    assert estimate(world).load_seconds == learned


@pytest.mark.spec("SCHED-51")
def test_streams_without_durations_teach_by_the_clock() -> None:
    world = World()
    world.agent("a", loaded=["m"], slots=1)
    for _ in range(10):
        lease = world.send()
        world.now += 2.0
        world.began(lease)
        world.now += 4.0
        world.end(lease, timings=Timings(prompt_tokens=400, output_tokens=100))
    learned = estimate(world)
    assert learned.decode_tokens_per_second == pytest.approx(25, rel=0.1)
    assert learned.prefill_tokens_per_second == pytest.approx(200, rel=0.1)


@pytest.mark.spec("SCHED-51")
def test_an_answer_in_one_piece_without_durations_teaches_no_rate() -> None:
    world = World()
    world.agent("a", loaded=["m"], slots=1)
    world.plan()
    before = estimate(world).decode_tokens_per_second
    for _ in range(5):
        lease = world.send()
        world.now += 6.0
        world.began(lease)
        world.end(lease, timings=Timings(prompt_tokens=400, output_tokens=100))
    assert estimate(world).decode_tokens_per_second == pytest.approx(before)


@pytest.mark.spec("SCHED-52")
def test_one_outlier_hardly_moves_a_rate() -> None:
    world = taught()
    world.serve(world.send(), Timings(400, 100, 600.0, 0.0, 200.0, 400.0), after=600.0)
    assert estimate(world).decode_tokens_per_second > 15


@pytest.mark.spec("SCHED-52")
def test_a_changed_speed_is_learned_within_a_dozen_requests() -> None:
    world = taught()
    for _ in range(12):
        world.serve(world.send(), Timings(400, 100, 3.0, 0.0, 1.0, 2.0), after=3.0)
    assert estimate(world).decode_tokens_per_second == pytest.approx(50, rel=0.1)


@pytest.mark.spec("SCHED-53")
def test_a_pair_never_seen_is_judged_by_its_agent_and_its_model() -> None:
    rates = Rates()
    for _ in range(10):
        rates.observe(Quantity.DECODE, A, "one", 10.0, prior=40.0)
    assert rates.rate(Quantity.DECODE, A, "two", prior=80.0) == pytest.approx(20.0, rel=0.3)
    for agent in ("b", "c", "d"):
        for _ in range(10):
            rates.observe(Quantity.DECODE, AgentId(agent), "mixture", 120.0, prior=40.0)
            rates.observe(Quantity.DECODE, AgentId(agent), "plain", 40.0, prior=40.0)
    mixture, plain = (rates.rate(Quantity.DECODE, A, one, 40.0) for one in ("mixture", "plain"))
    assert mixture > plain


@pytest.mark.spec("SCHED-54")
def test_output_lengths_are_learned_by_client_model_and_form() -> None:
    lengths, world = OutputLengths(), World()

    def of(client: str, **fields: Any) -> Request:
        return world.request(client=client, **fields)

    assert lengths.expected(of("c")) == 150
    for _ in range(20):
        lengths.observe(of("short"), 10)
        lengths.observe(of("long"), 1000)
        lengths.observe(of("long", form=Form.WHOLE), 30)
    assert lengths.expected(of("short")) == pytest.approx(10)
    assert lengths.expected(of("long")) == pytest.approx(1000)
    assert lengths.expected(of("long", form=Form.WHOLE)) == pytest.approx(30)
    assert lengths.expected(of("new", form=Form.WHOLE)) == pytest.approx(30)
    assert lengths.expected(of("long", form=Form.TOOLS)) == 150
    assert 100 < lengths.expected(of("new")) < 900
    assert lengths.expected(of("long", output_limit=64)) == 64


@pytest.mark.spec("SCHED-55")
def test_company_is_learned_to_slow_down_by_as_much_as_it_does() -> None:
    world = World()
    world.agent("a", loaded=["m"], slots=2)
    alone = Timings(400, 100, 6.0, 0.0, 2.0, 4.0)
    for _ in range(5):
        world.serve(world.send(), alone, after=6.0)
    for _ in range(20):
        pair = [world.send(), world.send()]
        world.now += 6.0
        for lease in pair:
            world.began(lease)
        for lease in pair:
            world.end(lease, timings=Timings(400, 100, 6.2, 0.0, 2.0, 4.2))
    state = world.scheduler.export_state()
    assert state.batch[0].mean.value < 0.2


def in_pairs(world: World, tokens_per_second: float, answers: int) -> None:
    """So many answers, two and two beside each other."""
    writing = 100 / tokens_per_second
    for _ in range(answers // 2):
        pair = [world.send(), world.send()]
        world.now += writing + 0.2
        for lease in pair:
            world.began(lease)
        for lease in pair:
            world.end(lease, timings=Timings(400, 100, writing + 0.2, 0.0, 0.2, writing))


@pytest.mark.spec("SCHED-102")
@pytest.mark.parametrize("change", [1 / 6, 6.0])
def test_a_speed_that_no_company_explains_is_learned_though_nothing_runs_alone(
    change: float,
) -> None:
    world = World()
    world.agent("a", loaded=["m"], slots=2)
    for _ in range(5):
        world.serve(world.send(), Timings(400, 100, 5.2, 0.0, 0.2, 5.0), after=5.2)
    in_pairs(world, 20 / 1.4, 30)
    assert estimate(world).decode_tokens_per_second == pytest.approx(20, rel=0.02)
    for speed in (20 * change, 20):
        in_pairs(world, speed / 1.4, 12)
        factor = world.scheduler.export_state().batch[0].mean.value
        learned = estimate(world).decode_tokens_per_second
        assert learned / (1 + factor) == pytest.approx(speed / 1.4, rel=0.15)
        assert learned == pytest.approx(speed, rel=0.3)


@pytest.mark.spec("SCHED-102")
def test_one_answer_that_company_does_not_explain_teaches_no_rate() -> None:
    world = World()
    world.agent("a", loaded=["m"], slots=2)
    for _ in range(5):
        world.serve(world.send(), Timings(400, 100, 5.2, 0.0, 0.2, 5.0), after=5.2)
    in_pairs(world, 20 / 1.4, 30)
    pair = [world.send(), world.send()]
    world.now += 100.0
    for lease, writing in zip(pair, (100.0, 7.0), strict=True):
        world.began(lease)
        world.end(lease, timings=Timings(400, 100, 100.0, 0.0, 0.2, writing))
    in_pairs(world, 20 / 1.4, 4)
    assert estimate(world).decode_tokens_per_second == pytest.approx(20, rel=0.02)


@pytest.mark.spec("SCHED-56")
def test_what_was_learned_survives_a_restart() -> None:
    world = taught()
    stored = msgspec.json.encode(world.scheduler.export_state())
    fresh = World()
    fresh.scheduler.import_state(msgspec.json.decode(stored, type=Learned))
    fresh.agent("a", slots=1)
    fresh.plan()
    assert estimate(fresh).decode_tokens_per_second == pytest.approx(
        estimate(world).decode_tokens_per_second
    )
    assert fresh.scheduler.export_state() == world.scheduler.export_state()


@pytest.mark.spec("SCHED-56")
def test_what_was_learned_means_the_same_before_the_first_report() -> None:
    """Models are known from the database first; the report that tells of no GPU comes later."""
    world = World()
    agent = world.agent("a", slots=1)
    assert agent.report is not None
    without_gpu = structs.replace(agent.report, memory_total_bytes=16 * GB)
    world.registry.heartbeat(without_gpu, world.now)
    for _ in range(6):
        world.serve(world.send(), Timings(400, 100, 60.0, 0.0, 40.0, 20.0), after=60.0)
    learned = estimate(world)
    assert learned.decode_tokens_per_second == pytest.approx(5.0, rel=0.1)
    fresh = World()
    fresh.scheduler.import_state(world.scheduler.export_state())
    restored = fresh.agent("a", slots=1)
    restored.report = None
    fresh.plan()
    assert structs.replace(estimate(fresh), slots_reported=True) == learned
    fresh.registry.heartbeat(structs.replace(without_gpu, tags=UNSET, ps=UNSET), fresh.now)
    fresh.plan()
    assert estimate(fresh) == learned


@pytest.mark.spec("SCHED-53")
def test_a_machine_without_gpu_is_believed_slow_until_a_model_is_seen_in_one() -> None:
    world = World()
    agent = world.agent("a", slots=1)
    world.plan()
    fast = estimate(world).decode_tokens_per_second
    report = agent.report
    assert report is not None
    report = structs.replace(report, memory_total_bytes=16 * GB, tags=UNSET)
    world.registry.heartbeat(report, world.now)
    world.plan(after=1.0)
    assert estimate(world).decode_tokens_per_second == pytest.approx(fast / 5)
    row = {"name": "m", "digest": "m", "size": 4 * GB, "size_vram": 4 * GB}
    listed = Raw(msgspec.json.encode({"models": [row]}))
    world.registry.heartbeat(structs.replace(report, ps=listed), world.now)
    world.plan(after=1.0)
    assert estimate(world).decode_tokens_per_second == pytest.approx(fast)


@pytest.mark.spec("SCHED-57")
def test_a_conversation_goes_back_to_its_prompt_cache_when_all_else_is_equal() -> None:
    world = World()
    for name in "ab":
        world.agent(name, loaded=["m"], slots=2)
    first = world.send(prompt_tokens=4000, prefix=(1, 2))
    world.serve(first, Timings(4000, 100, 7.0, 0.0, 5.0, 2.0), after=7.0)
    for _ in range(4):
        again = world.send(prompt_tokens=4200, prefix=(1, 2, 3))
        assert again.agent_id == first.agent_id
        decision = world.scheduler.decision(again.id)
        assert decision is not None
        assert decision.candidates[0].cached_tokens > 3000
        world.end(again, timings=Timings(4200, 100, 2.2, 0.0, 0.2, 2.0))


@pytest.mark.spec("SCHED-57")
def test_prompt_caches_remember_as_many_conversations_as_there_are_slots() -> None:
    caches = PromptCaches()
    caches.remember("place", (1, 2), 100, slots=1, arrived=0.0, now=0.0)
    caches.remember("place", (1, 2, 3), 200, slots=1, arrived=0.0, now=0.0)
    assert caches.expected((1, 2, 3, 4)) == {"place": 200}
    caches.remember("place", (9,), 50, slots=1, arrived=0.0, now=0.0)
    assert caches.expected((1, 2, 3)) == {}
    caches.forget("place")
    assert len(caches) == 0


@pytest.mark.spec("SCHED-57")
def test_prompt_caches_hold_no_more_than_what_is_remembered() -> None:
    caches, lots = PromptCaches(), Random(1)
    for _ in range(2000):
        chain = tuple(lots.randrange(50) for _ in range(lots.randrange(1, 6)))
        caches.remember(lots.randrange(3), chain, 100, slots=2, arrived=0.0, now=0.0)
    assert len(caches) <= 3 * 2 * 6
    for place in range(3):
        caches.forget(place)
    assert len(caches) == 0


@pytest.mark.spec("SCHED-41")
def test_demand_fades() -> None:
    demand = FadingRate(DEMAND_MEMORY_SECONDS)
    for second in range(60):
        demand.count(float(second))
    assert wanted_again(demand, 60.0) > 0.99
    assert wanted_again(demand, 1500.0) < 0.01


@pytest.mark.spec("SCHED-54")
def test_embeddings_teach_no_output_length() -> None:
    world = World()
    world.agent("a", loaded=["m"])
    lease = world.send(kind=Kind.EMBED)
    world.serve(lease, Timings(prompt_tokens=400, total_seconds=0.1), after=0.1)
    assert world.scheduler.export_state().lengths == []
