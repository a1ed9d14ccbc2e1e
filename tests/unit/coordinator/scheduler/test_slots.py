"""How many requests an agent gets at once when it does not report how many it runs."""

import pytest
from msgspec import structs

from ollama_coordinator.registry import Registry
from ollama_coordinator.scheduler import Kind, Learned, Result, Timings
from ollama_coordinator.scheduler.predicted import PredictedScheduler
from ollama_coordinator.scheduler.slots import AgentSlots, LearnedSlots, Slots
from ollama_coordinator.simulation import Fleet, MachineSpec, ModelSpec, Simulation, TraceRequest
from ollama_coordinator_common.names import model_key
from ollama_coordinator_common.types import AgentId
from unit.coordinator.scheduler.world import World

M = ModelSpec("m", 4_000_000_000)
SILENT = MachineSpec(name="silent", models=(M,), reports_memory=False, reports_slots=False)


def most_in_flight(slots: int, machines: int, requests: int, seconds: float) -> int:
    """How many streams are open after so long, on agents that tell nothing of themselves."""
    machine = structs.replace(SILENT, slots=slots, batch_factor=0.01)
    fleet = Fleet(
        machines=tuple(structs.replace(machine, name=f"a{number}") for number in range(machines))
    )

    def create(registry: Registry) -> PredictedScheduler:
        return PredictedScheduler(registry, max_queue=10_000)

    simulation = Simulation(fleet, create)
    for name in fleet.machines:
        simulation.nodes[name.name].advance(0.0)  # type: ignore[index]
    simulation.run_until(1.0)
    for number in range(machines):
        request = TraceRequest(at=1.0, model="m", prompt_tokens=50, output_tokens=10)
        simulation.arrive(number, request, 1.0)
    simulation.run_until(30.0)
    simulation.most_in_flight = 0
    for number in range(requests):
        request = TraceRequest(at=30.0, model="m", prompt_tokens=50, output_tokens=2000)
        simulation.arrive(1000 + number, request, 30.0)
    simulation.run_until(30.0 + seconds)
    return len(list(simulation.scheduler.leases()))


@pytest.mark.spec("SCHED-20")
def test_agents_that_tell_nothing_and_run_many_are_filled_within_two_seconds() -> None:
    assert most_in_flight(slots=64, machines=5, requests=500, seconds=2.0) >= 300


@pytest.mark.spec("SCHED-21")
def test_an_agent_that_runs_one_is_never_sent_more_than_one_beyond() -> None:
    assert most_in_flight(slots=1, machines=1, requests=50, seconds=0.5) == 2


@pytest.mark.spec("SCHED-21")
def test_trials_that_fail_are_repeated_at_ever_longer_intervals() -> None:
    world = World(max_queue=1000)
    world.agent("a", loaded=["m"])
    first = world.send()
    for _ in range(400):
        world.submit()
    leases = [first, *world.plan()]
    trials = []
    assert len(leases) == 2
    for _ in range(300):
        world.now += 2.0
        lease = leases.pop(0)
        world.began(lease)
        timings = Timings(100, 100, world.now - lease.granted_at, 0.0, 0.1, 1.9)
        leases += world.end(lease, timings=timings)
        assert 1 <= len(leases) <= 2
        if len(leases) == 2:
            trials.append(world.now)
    assert len(trials) <= 8
    assert trials[-1] - trials[-2] > 200


@pytest.mark.spec("SCHED-22")
def test_a_first_byte_beside_others_proves_slots_and_a_slot_wait_disproves_them() -> None:
    slots = Slots()
    assert (slots.limit, slots.allowance(0.0)) == (1, 2)
    slots.prove(2)
    assert (slots.limit, slots.allowance(0.0)) == (2, 4)
    slots.refute(2, now=10.0)
    assert (slots.limit, slots.allowance(11.0)) == (2, 2)
    assert slots.allowance(71.0) == 4


@pytest.mark.spec("SCHED-22")
def test_answers_in_one_piece_prove_slots_by_the_absence_of_a_slot_wait() -> None:
    world = World()
    world.agent("a", loaded=["m"])
    first = world.send()
    world.submit()
    world.submit()
    (second,) = world.plan()
    world.now += 2.0
    world.began(first)
    assert world.end(first, timings=Timings(100, 100, 2.0, 0.0, 0.1, 1.9)) == []
    world.now += 0.1
    world.began(second)
    world.end(second, timings=Timings(100, 100, 2.1, 0.0, 0.1, 2.0))
    world.send()
    assert world.scheduler.in_flight(second.agent_id) == 2


@pytest.mark.spec("SCHED-23")
def test_nobody_is_sent_beyond_the_known_slots_while_another_agent_is_free() -> None:
    world = World()
    for name in "ab":
        world.agent(name, loaded=["m"])
    leases = [world.send(), world.send()]
    assert {lease.agent_id for lease in leases} == {"a", "b"}


@pytest.mark.spec("SCHED-24")
def test_reported_slots_are_believed() -> None:
    world = World()
    world.agent("a", loaded=["m"], slots=3)
    for _ in range(9):
        world.submit()
    assert len(world.plan()) == 3
    assert world.tick(30.0) == []


@pytest.mark.spec("SCHED-25")
def test_families_that_run_one_at_a_time_do_so_whatever_is_reported() -> None:
    world = World()
    world.agent("a", loaded=["m"], slots=4, details={"family": "qwen3next"})
    for _ in range(3):
        world.submit()
    assert len(world.plan()) == 1


@pytest.mark.spec("SCHED-26")
def test_embeddings_get_two_more_in_flight_than_run() -> None:
    world = World()
    world.agent("a", loaded=["m"], slots=4)
    for _ in range(9):
        world.submit(kind=Kind.EMBED)
    leases = world.plan()
    assert len(leases) == 3
    assert len(world.end(leases[0], Result.CANCELLED)) == 1


@pytest.mark.spec("SCHED-26")
def test_a_model_that_also_completes_embeds_with_all_its_slots() -> None:
    world = World()
    agent = world.agent("a", loaded=["m"], slots=4)
    for _ in range(9):
        world.submit(kind=Kind.EMBED)
    assert len(world.plan()) == 3
    # `/api/show` says so: the next ones need not wait, and no later list forgets it.
    world.registry.learn_capabilities("m", ["completion", "tools"])
    assert len(world.plan()) == 1
    world.agent("a", models=["m", "n"], loaded=["m"], slots=4)
    assert agent.inventory.available[model_key("m")].completes
    world.registry.learn_capabilities("n", ["embedding"])
    for _ in range(9):
        world.submit("n", kind=Kind.EMBED)
    leases = [lease.request.name for lease in (*world.plan(), *world.scheduler.leases())]
    assert leases.count("m") == 4
    assert agent.inventory.available[model_key("n")].embeds


@pytest.mark.spec("SCHED-27")
def test_what_one_model_runs_at_once_is_believed_of_the_agents_others() -> None:
    world = World()
    world.agent("a", models=["m", "n"], loaded=["m", "n"])
    world.send("m")
    world.submit("m")
    (second,) = world.plan()
    world.began(second)
    for _ in range(3):
        world.submit("n")
    leases = world.plan()
    assert len(leases) == 3


@pytest.mark.spec("SCHED-27")
def test_a_model_that_runs_fewer_than_is_usual_counts_for_itself() -> None:
    agent_slots = AgentSlots()
    one, two, three = Slots(agent_slots), Slots(agent_slots), Slots(agent_slots)
    one.prove(4)
    assert (two.limit, three.limit) == (4, 4)
    two.refute(1, now=10.0)
    assert (one.limit, two.limit, three.limit) == (4, 1, 4)


@pytest.mark.spec("SCHED-27")
def test_two_models_that_run_no_more_speak_for_the_others_until_one_shows_more() -> None:
    agent_slots = AgentSlots()
    one, two, three = Slots(agent_slots), Slots(agent_slots), Slots(agent_slots)
    assert three.allowance(0.0) == 2
    one.refute(1, now=0.0)
    assert three.allowance(0.0) == 2
    two.refute(1, now=0.0)
    assert three.allowance(0.0) == 1
    one.prove(2)
    assert (three.limit, three.allowance(0.0)) == (2, 4)


@pytest.mark.spec("SCHED-27")
def test_an_agent_that_was_set_to_run_fewer_is_believed_when_its_models_show_it() -> None:
    agent_slots = AgentSlots()
    one, two = Slots(agent_slots), Slots(agent_slots)
    one.prove(4)
    one.refute(2, now=0.0)
    assert (one.limit, two.limit) == (2, 2)


@pytest.mark.spec("SCHED-27")
def test_models_that_are_gone_leave_what_they_showed() -> None:
    agent_slots = AgentSlots()
    one, two = Slots(agent_slots), Slots(agent_slots)
    one.prove(2)
    agent_slots.keep({two})
    assert (agent_slots.members, two.limit) == ([two], 2)


@pytest.mark.spec("SCHED-27")
def test_a_model_that_was_deleted_while_it_ran_tells_nothing_of_the_others() -> None:
    world = World()
    world.agent("a", models=["m", "n"], loaded=["m"])
    first = world.send("m")
    world.submit("m")
    (second,) = world.plan()
    world.began(second)
    world.submit("m")
    (third,) = world.plan()
    world.agent("a", models=["n"])
    world.plan(30.0)
    waited = Timings(100, 100, 30.0, 0.0, 0.1, 1.9)
    for lease in (first, second, third):
        world.end(lease, timings=waited)
    assert world.scheduler.in_flight(first.agent_id) == 0
    agent_slots = AgentSlots()
    for _ in range(3):
        gone = Slots(agent_slots)
        agent_slots.keep(set())
        gone.refute(1, now=0.0)
    assert not agent_slots.is_settled


@pytest.mark.spec("SCHED-56")
def test_a_model_that_runs_one_at_a_time_is_known_to_after_a_restart() -> None:
    world = World()
    world.agent("a", models=["one", "many"], loaded=["one", "many"])
    world.plan()
    (machine,) = world.predictor._machines.by_agent.values()
    places = machine.places
    one, many = places[model_key("one")], places[model_key("many")]
    many.slots.prove(4)
    one.slots.refute(1, now=0.0)
    learned = world.scheduler.export_state()
    world = World()
    world.scheduler.import_state(learned)
    world.agent("a", models=["one", "many"], loaded=["one", "many"])
    world.plan()
    slots = {row.model: row.slots for row in world.scheduler.estimates()}
    assert slots == {model_key("one"): 1, model_key("many"): 4}


@pytest.mark.spec("SCHED-56")
def test_what_was_known_of_slots_counts_once() -> None:
    world = World()
    world.scheduler.import_state(Learned(slots=[LearnedSlots(AgentId("a"), model_key("m"), 4)]))
    world.agent("a", models=["m", "n"])
    world.plan()
    (machine,) = world.predictor._machines.by_agent.values()
    machine.places[model_key("m")].slots.refute(1, now=0.0)
    world.agent("a", models=["n"])
    world.plan()
    world.agent("a", models=["m", "n"])
    world.plan()
    assert {row.slots for row in world.scheduler.estimates()} == {1}
