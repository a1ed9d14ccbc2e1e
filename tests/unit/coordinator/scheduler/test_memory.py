"""What fits, who leaves, who makes way."""

import msgspec
import pytest
from msgspec import UNSET, Raw, structs

from ollama_coordinator.registry import AgentState
from ollama_coordinator.scheduler import Kind, Result, RunnerOptions, Timings
from ollama_coordinator.scheduler.memory import Fit, MemoryLimits, memory_of
from ollama_coordinator.scheduler.types import normal, serves
from ollama_coordinator_common.names import model_key
from ollama_coordinator_common.protocol import HealthReport
from ollama_coordinator_common.types import AgentId, Gpu, RunnerSettings
from unit.coordinator.scheduler.world import GB, World

SHORT = Timings(100, 100, 2.0, 0.0, 0.1, 1.9)


@pytest.mark.spec("SCHED-40")
def test_victims_are_idle_and_named_on_the_lease() -> None:
    world = World()
    models = {"busy": 4 * GB, "idle": 4 * GB, "new": 4 * GB}
    world.agent("a", models=models, loaded=["busy", "idle"], slots=1, memory=12 * GB)
    world.send("busy")
    lease = world.send("new")
    assert lease.unload == (model_key("idle"),)


@pytest.mark.spec("SCHED-40")
def test_nothing_leaves_when_all_fits() -> None:
    world = World()
    models = {"one": 4 * GB, "new": 4 * GB}
    world.agent("a", models=models, loaded=["one"], slots=1, memory=24 * GB)
    assert world.send("new").unload == ()


@pytest.mark.spec("SCHED-41")
def test_the_model_that_is_missed_least_leaves() -> None:
    world = World()
    models = {"often": 4 * GB, "seldom": 4 * GB, "new": 4 * GB}
    world.agent("a", models=models, loaded=["often", "seldom"], slots=1, memory=12 * GB)
    for _ in range(20):
        world.end(world.send("often"), timings=SHORT)
    world.now += 10.0
    assert world.send("new").unload == (model_key("seldom"),)


@pytest.mark.spec("SCHED-42")
def test_of_an_agent_that_tells_no_memory_eviction_is_left_to_ollama() -> None:
    world = World()
    models = {"one": 4 * GB, "two": 4 * GB, "new": 4 * GB}
    world.agent("a", models=models, loaded=["one", "two"])
    assert world.send("new").unload == ()


@pytest.mark.spec("SCHED-42")
def test_what_fitted_fits_and_what_pushed_another_out_does_not() -> None:
    memory = MemoryLimits()
    assert memory.fit(5 * GB, 5 * GB, 2) is Fit.MAYBE
    memory.fitted(5 * GB, 5 * GB, 2)
    assert memory.fit(4 * GB, 6 * GB, 2) is Fit.YES
    memory.pushed_out(5 * GB, 10 * GB)
    assert memory.fit(6 * GB, 10 * GB, 2) is Fit.NO
    assert memory.fit(5 * GB, 7 * GB, 2) is Fit.MAYBE


@pytest.mark.spec("SCHED-42")
def test_the_share_of_free_memory_that_ollama_fills_is_learned() -> None:
    memory = MemoryLimits(total=20 * GB)
    assert memory.fit(8 * GB, 10 * GB, 2) is Fit.YES
    assert memory.fit(9 * GB, 10 * GB, 2) is Fit.MAYBE
    assert memory.fit(11 * GB, 10 * GB, 2) is Fit.NO
    memory.fitted(9 * GB, 10 * GB, 2)
    assert memory.fit(9 * GB, 10 * GB, 2) is Fit.YES
    memory.pushed_out(7 * GB, 10 * GB)
    assert memory.fit(7 * GB, 10 * GB, 2) is Fit.NO


@pytest.mark.spec("SCHED-42")
def test_a_model_that_perhaps_does_not_fit_is_tried_only_while_nothing_runs_there() -> None:
    models = {"one": 10 * GB, "new": 9 * GB}
    world = World()
    world.agent("a", models=models, loaded=["one"], slots=1, memory=22 * GB)
    assert world.send("new").unload == ()

    world = World()
    world.agent("a", models=models, loaded=["one"], slots=1, memory=22 * GB)
    running = world.send("one")
    world.submit("new")
    assert world.plan() == []
    (lease,) = world.end(running, timings=SHORT)
    assert lease.request.name == "new"


@pytest.mark.spec("SCHED-44")
def test_a_model_that_perhaps_does_not_fit_gets_a_drain_too() -> None:
    world = World(max_queue=1000)
    models = {"busy": 10 * GB, "starved": 9 * GB}
    world.agent("a", models=models, loaded=["busy"], slots=2, memory=22 * GB)
    leases = [world.send("busy"), world.send("busy")]
    starved = world.submit("starved")
    for _ in range(200):
        world.submit("busy")
    while not any(lease.request is starved for lease in leases):
        world.now += 1.0
        assert world.now <= 60.0
        leases += world.end(leases.pop(0), timings=SHORT)
        leases += world.plan()


@pytest.mark.spec("SCHED-43")
def test_an_agent_loads_one_model_at_a_time() -> None:
    world = World()
    world.agent("a", models=["one", "two"], slots=1, memory=48 * GB)
    first = world.send("one")
    world.submit("two")
    assert world.plan() == []
    world.now += 4.0
    world.began(first)
    (second,) = world.plan()
    assert second.request.name == "two"


@pytest.mark.spec("SCHED-44")
def test_a_model_that_starves_behind_busy_ones_gets_a_drain() -> None:
    world = World(max_queue=1000)
    models = {"busy": 8 * GB, "starved": 8 * GB}
    world.agent("a", models=models, loaded=["busy"], slots=2, memory=12 * GB)
    leases = [world.send("busy"), world.send("busy")]
    starved = world.submit("starved")
    for _ in range(200):
        world.submit("busy")
    served_at = None
    for _ in range(80):
        world.now += 1.0
        leases += world.end(leases.pop(0), timings=SHORT)
        leases += world.plan()
        if any(lease.request is starved for lease in leases):
            served_at = world.now
            break
    assert served_at is not None
    assert served_at <= 60.0


@pytest.mark.spec("SCHED-44")
def test_an_agent_that_rests_after_a_drain_is_drained_again_later() -> None:
    world = World(max_queue=1000)
    models = dict.fromkeys(("busy", "first", "second"), 8 * GB)
    world.agent("a", models=models, loaded=["busy"], slots=2, memory=12 * GB)
    leases = [world.send("busy"), world.send("busy")]
    served = []
    for name in ("first", "second"):
        starved = world.submit(name)
        for _ in range(20):
            world.submit("busy")
        until = world.now + 300.0
        while starved not in [lease.request for lease in leases]:
            assert world.now < until
            world.submit("busy")
            leases += world.end(leases.pop(0), timings=SHORT) if leases else []
            leases += world.tick(1.0)
        served.append(world.now)
    assert served[0] <= 60.0
    assert served[1] > served[0] + 60.0


@pytest.mark.spec("SCHED-45")
def test_requests_whose_options_would_reload_count_as_a_load() -> None:
    world = World()
    for name in "ab":
        world.agent(name, slots=4)
    small = RunnerOptions(num_ctx=4096)
    large = RunnerOptions(num_ctx=8192)
    loading = Timings(100, 100, 5.0, 3.0, 0.1, 1.9)
    one = world.send(options=small)
    world.serve(one, loading, after=5.0)
    two = world.send(options=large)
    world.serve(two, loading, after=5.0)
    assert one.agent_id != two.agent_id
    for _ in range(6):
        assert world.send(options=small).agent_id == one.agent_id
        assert world.send(options=large).agent_id == two.agent_id
        for lease in list(world.scheduler.leases()):
            world.end(lease, timings=SHORT)


@pytest.mark.spec("SCHED-46")
@pytest.mark.parametrize(
    ("loaded", "wanted", "same"),
    [
        (RunnerOptions(), RunnerOptions(), True),
        (RunnerOptions(num_ctx=4096), RunnerOptions(num_ctx=4096), True),
        (RunnerOptions(num_ctx=4096), RunnerOptions(), False),
        (RunnerOptions(), RunnerOptions(num_ctx=4096), False),
        (RunnerOptions(num_ctx=2), RunnerOptions(num_ctx=4), True),
        (RunnerOptions(num_gpu=10), RunnerOptions(), True),
        (RunnerOptions(num_gpu=10), RunnerOptions(num_gpu=-1), True),
        (RunnerOptions(), RunnerOptions(num_gpu=10), False),
        (RunnerOptions(num_batch=512), RunnerOptions(), True),
        (RunnerOptions(num_thread=4), RunnerOptions(), False),
        (RunnerOptions(shift=True), RunnerOptions(), True),
        (RunnerOptions(shift=False), RunnerOptions(), False),
    ],
)
def test_the_options_that_reload_a_runner(
    loaded: RunnerOptions, wanted: RunnerOptions, same: bool
) -> None:
    assert serves(normal(loaded), normal(wanted)) is same


@pytest.mark.spec("SCHED-46")
def test_an_explicit_context_equal_to_the_default_does_not_reload() -> None:
    assert serves(RunnerOptions(), RunnerOptions(num_ctx=4096), default_context=4096)
    assert serves(None, RunnerOptions(num_ctx=8192), context=8192)
    assert not serves(None, RunnerOptions(num_ctx=4096), context=8192)


@pytest.mark.spec("SCHED-47")
def test_a_model_that_fits_nowhere_by_the_figures_is_tried_all_the_same() -> None:
    world = World()
    world.agent("a", models={"huge": 40 * GB}, slots=1, memory=12 * GB)
    assert world.send("huge").agent_id == "a"


@pytest.mark.spec("SCHED-48")
def test_two_names_of_one_blob_share_what_is_loaded() -> None:
    world = World()
    agent = world.agent("a", models=["m", "copy"], loaded=["m"], slots=1)
    report = agent.report
    assert report is not None
    blobs = {"m": "sha256:1", "copy": "sha256:1"}
    world.registry.heartbeat(structs.replace(report, model_blobs=blobs), world.now)
    lease = world.send("copy")
    decision = world.scheduler.decision(lease.id)
    assert decision is not None
    assert decision.action == "go"
    world.submit("m")
    assert world.plan() == []
    (other,) = world.end(lease, Result.CANCELLED)
    assert other.request.name == "m"
    world.submit("m")
    assert world.plan() == []
    world.submit("copy", kind=Kind.EMBED)  # what embeds takes two more, under each of its names
    (embedding,) = world.plan()
    assert embedding.request.name == "copy"
    (another,) = world.tick(1.0)
    assert another.request.name == "m"


@pytest.mark.spec("SCHED-57")
def test_prompts_are_forgotten_with_the_model_that_read_them() -> None:
    world = World()
    caches = world.predictor._caches
    for name in ("deleted", "gone", "evicted"):
        world.agent(name, loaded=["m"], slots=1)
        world.end(world.send(prefix=(1, 2)), timings=SHORT)
        assert len(caches) == 2
        world.now += 10.0
        if name == "deleted":
            world.agent(name, models=["n"])
        elif name == "evicted":
            world.agent(name, loaded=[])
        else:
            world.registry.remove(AgentId(name))
        world.plan()
        assert len(caches) == 0
        if name == "deleted":
            world.registry.remove(AgentId(name))


def _listed(agent: AgentState, sizes: dict[str, int]) -> HealthReport:
    """The agent's next report, with these models in memory at these sizes."""
    assert agent.report is not None
    rows = [{"name": name, "digest": name, "size": size} for name, size in sizes.items()]
    body = Raw(msgspec.json.encode({"models": rows}))
    return structs.replace(agent.report, tags=UNSET, ps=body)


@pytest.mark.spec("SCHED-42")
def test_what_was_never_in_memory_there_takes_as_much_more_than_its_weights_as_what_was() -> None:
    world = World()
    agent = world.agent("a", models={"seen": 4 * GB, "new": 4 * GB}, memory=16 * GB, slots=1)
    world.registry.heartbeat(_listed(agent, {"seen": 8 * GB}), world.now)
    lease = world.send("new")
    assert lease.unload == (model_key("seen"),)


@pytest.mark.spec("SCHED-49")
def test_a_load_that_waits_there_for_room_keeps_others_away() -> None:
    world = World()
    models = {"busy": 4 * GB, "blocked": 4 * GB, "small": 1 * GB}
    agent = world.agent("a", models=models, loaded=["busy"], memory=16 * GB, slots=1)
    world.began(world.send("busy"))
    blocked = world.send("blocked")
    world.tick(8.0)
    world.registry.heartbeat(_listed(agent, {"busy": 4 * GB}), world.now)
    world.submit("small")
    world.submit("blocked")
    assert world.plan() == []
    assert world.tick(30.0) == []
    world.began(blocked)  # somebody has left, and so did what waited behind it
    (small,) = world.plan()
    assert small.request.name == "small"


@pytest.mark.spec("SCHED-49")
def test_a_load_that_is_listed_is_over_before_its_first_byte() -> None:
    world = World()
    models = {"slow": 4 * GB, "small": 1 * GB}
    agent = world.agent("a", models=models, memory=16 * GB, slots=1)
    world.send("slow", prompt_tokens=100_000)
    world.tick(8.0)
    world.registry.heartbeat(_listed(agent, {"slow": 4 * GB}), world.now)
    world.submit("small")
    assert len(world.plan()) == 1


@pytest.mark.spec("SCHED-49")
def test_what_ended_and_left_at_once_is_not_taken_to_be_in_memory() -> None:
    """The list that says so is so young that it could as well be older than the request."""
    world = World()
    agent = world.agent("a", models=["m"], loaded=["m"], slots=1)
    lease = world.send("m")
    world.now += 5.0
    world.end(lease)
    world.registry.heartbeat(_listed(agent, {}), world.now + 0.1)
    world.plan(after=0.2)
    assert world.scheduler.explain(world.request("m"), world.now).action == "go"
    world.registry.heartbeat(_listed(agent, {}), world.now + 10.0)
    world.plan(after=10.0)
    assert world.scheduler.explain(world.request("m"), world.now).action == "load"


@pytest.mark.spec("SCHED-97")
def test_what_other_programs_take_does_not_fit_any_more_and_is_shown() -> None:
    world = World()
    agent = world.agent("a", models={"m": 4 * GB}, slots=1, memory=24 * GB)
    before = world.registry.changes
    for _ in range(2):
        world.registry.heartbeat(_with_game(agent, 17 * GB), world.now)
    assert world.registry.changes > before
    assert 10 * GB < agent.foreign_bytes <= 11 * GB
    assert memory_of(agent) == 24 * GB - agent.foreign_bytes
    world.registry.heartbeat(_with_game(agent, 5 * GB), world.now)
    assert (agent.foreign_bytes, memory_of(agent)) == (0, 24 * GB)


@pytest.mark.spec("SCHED-97")
def test_one_reading_beside_another_moments_list_is_no_other_program() -> None:
    agent = World().agent("a", models={"m": 4 * GB}, slots=1, memory=24 * GB)
    agent.take(_with_game(agent, 17 * GB))
    agent.take(_with_game(agent, 1 * GB))
    agent.take(_with_game(agent, 17 * GB))
    assert agent.foreign_bytes == 0


@pytest.mark.spec("SCHED-97")
def test_without_a_gpu_main_memory_that_others_take_counts() -> None:
    agent = World().agent("a", models={"m": 4 * GB}, slots=1)
    for used in (15.0, 15.0, 70.0, 70.0):
        agent.inventory.read_ps(b'{"models":[]}')
        report = HealthReport(agent.id, 1.0, used, 0, memory_total_bytes=100 * GB)
        agent.take(report)
        if used < 20:
            assert memory_of(agent) == 80 * GB
    assert 29 * GB < (memory_of(agent) or 0) < 31 * GB


@pytest.mark.spec("SCHED-98")
def test_what_an_operator_says_of_a_machine_counts_until_it_is_cleared() -> None:
    world = World()
    agent = world.agent("a", models={"m": 4 * GB}, loaded=["m"], slots=1, memory=24 * GB)
    told = structs.replace(agent.settings, slots=2, memory_bytes=8 * GB, gpu="none")
    world.registry.update_settings(agent.id, told)
    assert (world.send("m").agent_id, world.send("m").agent_id) == (agent.id, agent.id)
    assert (memory_of(agent), agent.lacks_gpu) == (8 * GB, True)
    cleared = structs.replace(told, slots=None, memory_bytes=None, gpu=None)
    world.registry.update_settings(agent.id, cleared)
    assert (memory_of(agent), agent.lacks_gpu) == (24 * GB, False)
    assert agent.runner is not None
    assert agent.runner.num_parallel == 1


@pytest.mark.spec("SCHED-98")
def test_a_gpu_in_the_processor_is_none_until_a_model_is_seen_there() -> None:
    agent = World().agent("a", models={"m": 4 * GB})
    report = HealthReport(agent.id, 1.0, 10.0, 0, memory_total_bytes=100 * GB)
    agent.take(structs.replace(report, gpus=[Gpu("in the processor", integrated=True)]))
    assert agent.lacks_gpu
    agent.take(structs.replace(report, gpus=[Gpu("Apple M2")]))
    assert not agent.lacks_gpu


@pytest.mark.spec("SCHED-98")
def test_a_card_that_ollama_cannot_use_leaves_the_main_memory() -> None:
    world = World()
    agent = world.agent("a", models={"m": 4 * GB})
    report = HealthReport(agent.id, 1.0, 10.0, 0, memory_total_bytes=100 * GB)
    old = Gpu("old card", memory_total_bytes=4 * GB, utilization_percent=90.0)
    agent.take(structs.replace(report, gpus=[old]))
    assert (memory_of(agent), agent.cards) == (4 * GB, [old])
    settings = structs.replace(agent.settings, gpu="none")
    world.registry.update_settings(agent.id, settings)
    assert (memory_of(agent), agent.cards) == (80 * GB, [])


def _with_game(agent: AgentState, used: int) -> HealthReport:
    gpu = Gpu("card", memory_total_bytes=24 * GB, memory_used_bytes=used)
    ps = b'{"models":[{"name":"m","size":5000000000,"size_vram":5000000000}]}'
    tags = b'{"models":[{"name":"m","size":4000000000,"digest":"d"}]}'
    return HealthReport(
        agent.id, 1.0, 10.0, 0, gpus=[gpu], ps=Raw(ps), tags=Raw(tags),
        memory_total_bytes=100 * GB, runner=RunnerSettings(num_parallel=1),
    )  # fmt: skip
