"""One run of the benchmark: a policy, a load, a seed, and what goes wrong."""

from random import Random

from msgspec import Struct, structs

from ollama_coordinator.registry import Registry
from ollama_coordinator.scheduler import Request, Scheduler, create_scheduler
from ollama_coordinator.scheduler.predicted import PredictedScheduler
from ollama_coordinator.scheduler.rates import OutputLengths
from ollama_coordinator.simulation import Fleet, Simulation, Summary, TraceRequest, summarise

from .fleet import home_fleet, mixed_fleet, with_outages, with_wrong_timings, without_slowest
from .home import make_home_trace
from .workload import Mix, make_trace

ORACLE = "predicted, lengths known"
MAX_QUEUE = 100_000
"""The benchmark measures waiting, not refusing: clients leave by themselves after two minutes."""


MIXED = "mixed"
PARTLY = "mixed, partly unstreamed"
HOME = "home"
WITHOUT_SLOWEST = "without the slowest machine"
WORKLOADS = (MIXED, PARTLY, HOME)
UNSTREAMED = 0.35
"""The share of the chats' requests that are short and unstreamed, in the second workload."""


class Run(Struct, frozen=True):
    """What is simulated for how long; the first `warm_up` seconds are not counted."""

    policy: str
    load: float
    seed: int
    seconds: float = 2400.0
    warm_up: float = 300.0
    scenario: str = ""
    workload: str = MIXED


class KnownLengths(OutputLengths):
    """An oracle: a request's limit is exactly the length of its answer."""

    def expected(self, request: Request) -> float:
        """The true length."""
        return float(request.output_limit or 0)


class WrongLengths(OutputLengths):
    """Every expectation is off by two, for each client and model always in the same direction."""

    def expected(self, request: Request) -> float:
        """Half or twice what was learned."""
        lots = Random(f"{request.client} {request.model}")
        return super().expected(request) * lots.choice((0.5, 2.0))


def simulate(run: Run) -> Summary:
    """Play the run."""
    fleet = _fleet(run)
    trace = _trace(run)
    if run.policy == ORACLE:
        trace = [structs.replace(one, output_limit=one.output_tokens) for one in trace]
    replay = Simulation(fleet, lambda registry: _scheduler(run, registry)).run(trace)
    return summarise(replay, fleet, after=run.warm_up)


def _trace(run: Run) -> list[TraceRequest]:
    if run.workload == HOME:
        return make_home_trace(home_fleet(), run.load, run.seconds, run.seed)
    mix = Mix(unstreamed=UNSTREAMED) if run.workload == PARTLY else Mix()
    return make_trace(mixed_fleet(), run.load, run.seconds, run.seed, mix)


def _scheduler(run: Run, registry: Registry) -> Scheduler:
    lengths: OutputLengths | None = KnownLengths() if run.policy == ORACLE else None
    if run.scenario == "lengths wrong by 2x" and run.policy == "predicted":
        lengths = WrongLengths()
    if lengths is not None:
        return PredictedScheduler(registry, max_queue=MAX_QUEUE, lengths=lengths)
    return create_scheduler(run.policy, registry, max_queue=MAX_QUEUE)


def _fleet(run: Run) -> Fleet:
    """The machines; to policies that count they tell no slots, so that these forward at once."""
    predicts = run.policy.startswith("predicted")
    build = home_fleet if run.workload == HOME else mixed_fleet
    fleet = build(reports_slots=predicts)
    match run.scenario:
        case "stale reports (30 s)":
            return structs.replace(fleet, report_seconds=30.0)
        case "timings wrong by 2x":
            return with_wrong_timings(fleet, run.seed)
        case "every machine fails once":
            return with_outages(fleet, run.seconds, run.seed)
        case "agents tell nothing":
            return build(reports_slots=False, reports_memory=False)
        case _ if run.scenario == WITHOUT_SLOWEST:
            return without_slowest(fleet)
        case _:
            return fleet
