"""The benchmark's tables: means over seeds with their 95 % confidence intervals, in markdown."""

from collections.abc import Callable, Sequence

from benchmarks.intervals import cell, paired
from ollama_coordinator.scheduler import POLICIES
from ollama_coordinator.simulation import Summary

from .page import PAGE, PEOPLE, SCRIPT, Classed
from .runs import HOME, MIXED, ORACLE, WITHOUT_SLOWEST, WORKLOADS, Run

COMPARED = (POLICIES[0], ORACLE, *POLICIES[1:])
LOADS = (0.3, 0.5, 0.7, 0.9)
SCENARIOS = (
    "",
    "stale reports (30 s)",
    "timings wrong by 2x",
    "lengths wrong by 2x",
    "every machine fails once",
    "agents tell nothing",
)
SCENARIO_LOAD = 0.7
SCENARIO_POLICIES = ("predicted", "loaded-first", "least-connections")

Results = dict[Run, Summary]
Column = tuple[str, Callable[[Summary], float], str]

COLUMNS: tuple[Column, ...] = (
    ("felt s", lambda one: one.felt, ".2f"),
    ("felt p50", lambda one: one.felt_p50, ".2f"),
    ("felt p95", lambda one: one.felt_p95, ".1f"),
    ("end s", lambda one: one.end, ".2f"),
    ("mean TTFT s", lambda one: one.mean, ".2f"),
    ("p50", lambda one: one.p50, ".2f"),
    ("p95", lambda one: one.p95, ".1f"),
    ("p99", lambda one: one.p99, ".1f"),
    ("in 10 s", lambda one: 100 * one.goodput, ".1f"),
    ("slow-down", lambda one: one.slow_down, ".1f"),
    ("loads/h", lambda one: one.loads_per_hour, ".0f"),
    ("batch p95", lambda one: one.batch_p95, ".0f"),
    ("batch end", lambda one: one.batch_end, ".0f"),
    ("embed p95", lambda one: one.embedding_p95, ".2f"),
    ("errors", lambda one: one.failed, ".1f"),
)


def all_runs(seeds: Sequence[int], loads: Sequence[float], seconds: float) -> list[Run]:
    """Every run of the tables, longest first."""
    runs = [
        Run(policy, load, seed, seconds, workload=workload)
        for workload in WORKLOADS
        for load in loads
        for policy in COMPARED
        for seed in seeds
    ]
    runs += [
        Run(policy, SCENARIO_LOAD, seed, seconds, scenario=scenario)
        for scenario in SCENARIOS[1:]
        for policy in SCENARIO_POLICIES
        for seed in seeds
    ]
    runs += [
        Run(POLICIES[0], load, seed, seconds, scenario=WITHOUT_SLOWEST, workload=workload)
        for workload in (MIXED, HOME)
        for load in loads
        for seed in seeds
    ]
    return sorted(set(runs), key=lambda run: -run.load)


def render(results: Results, classed: Sequence[dict[str, Classed]], command: str) -> str:
    """The page; `classed` is who was taken for a batch, seed by seed."""
    runs = list(results)
    seeds = sorted({run.seed for run in runs})
    parts = [_introduction(seeds, runs[0].seconds, runs[0].warm_up, command)]
    for workload in WORKLOADS:
        loads = sorted({one.load for one in runs if not one.scenario and one.workload == workload})
        for load in loads:
            title = f"{workload[0].upper()}{workload[1:]}, load {load:.0%}"
            table = _table(_by_policy(results, load, workload))
            parts.append(f"\n## {title}\n\n{table}\n\n{_paired(results, load, workload)}")
    parts.append(f"\n## When things are wrong, at load {SCENARIO_LOAD:.0%}\n")
    parts.append(_table(_by_scenario(results)))
    parts.append(f"\n## What the slowest machine is good for\n\n{_slowest(results)}")
    parts.append(f"\n## Batches by what they do\n\n{_classed(classed)}")
    return "\n".join(parts) + "\n"


def _classed(seeds: Sequence[dict[str, Classed]]) -> str:
    """How many requests of each address were taken for a batch, over all seeds."""
    names = {PAGE: f"a chat page of {PEOPLE} people, titles and tags included", SCRIPT: "a script"}
    rows = ["Nobody marks the batch lane. One address each, on the home fleet.\n"]
    rows += ["| address | requests | in the batch lane |", "|---|---:|---:|"]
    for name, title in names.items():
        requests = sum(one[name].requests for one in seeds)
        rows.append(f"| {title} | {requests} | {sum(one[name].batch for one in seeds)} |")
    return "\n".join(rows)


def _paired(results: Results, load: float, workload: str) -> str:
    """How much less is felt than under each other policy: seed by seed, then the mean."""
    mine = _by_seed(results, COMPARED[0], load, "", workload)
    rows = ["| paired by seed: predicted less | felt s | felt p95 |", "|---|---:|---:|"]
    for policy in COMPARED[1:]:
        theirs = _by_seed(results, policy, load, "", workload)
        cells = [_difference(mine, theirs, value) for value in (_felt, _felt_p95)]
        rows.append(f"| {policy} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _slowest(results: Results) -> str:
    """The whole fleet less the fleet without its slowest machine, under the default policy."""
    rows = [
        "The whole fleet less the same without its slowest machine: below 0 it helps.\n",
        "| fleet and load | felt s | felt p95 |", "|---|---:|---:|",
    ]  # fmt: skip
    for workload in (MIXED, HOME):
        for load in sorted({run.load for run in results if run.scenario == WITHOUT_SLOWEST}):
            whole = _by_seed(results, COMPARED[0], load, "", workload)
            less = _by_seed(results, COMPARED[0], load, WITHOUT_SLOWEST, workload)
            cells = [_difference(whole, less, value) for value in (_felt, _felt_p95)]
            rows.append(f"| {workload}, {load:.0%} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _felt(one: Summary) -> float:
    return one.felt


def _felt_p95(one: Summary) -> float:
    return one.felt_p95


def _difference(
    mine: dict[int, Summary], theirs: dict[int, Summary], value: Callable[[Summary], float]
) -> str:
    return paired([value(mine[seed]) - value(theirs[seed]) for seed in mine], "+.2f")


def _by_seed(
    results: Results, policy: str, load: float, scenario: str, workload: str
) -> dict[int, Summary]:
    wanted = (policy, load, scenario, workload)
    return {
        run.seed: summary
        for run, summary in results.items()
        if (run.policy, run.load, run.scenario, run.workload) == wanted
    }


def _introduction(seeds: Sequence[int], seconds: float, warm_up: float, command: str) -> str:
    return f"""# Results of the simulator

Generated by `{command}`;
not edited by hand. Each cell is the mean over the seeds {_range(seeds)} ± half the width of
its 95 % confidence interval; {seconds:.0f} simulated seconds, the first {warm_up:.0f} not
counted. A mean of differences is taken seed by seed: the same trace under both.

*Mixed*: eight simulated machines (two each of: 64 GiB and four slots, 16 GiB and two slots, 10
GiB laptop, CPU only), twelve models of 0.3 to 40 GB, Zipf popularity, arrivals in bursts,
streamed chats of two to eight turns, RAG, batch and embeddings. *Partly unstreamed*: the same,
with 35 % of the chats' requests short and in one piece. *Home*: four machines with one slot
each (114, 40, 15 and 6 tokens a second), five models; streamed chats with two short unstreamed
calls behind each turn, RAG, a coding agent with long contexts, scripts, a nightly job.

*Felt*: how late an answer is for its receiver. Of a plain stream the largest, over its tokens
i, of (arrival of token i − i/15 s), from the request's arrival; of every other answer the time
to its end, and *end* is the mean of these alone. Felt delays, TTFT (time to the first token),
the share within 10 s and the slow-down are those of interactive requests; one whose client left
after 120 s counts as 120 s. Slow-down: whole time over the time on the fastest machine with
nothing to wait for. Load 100 % is what the busiest machine could do with all models in memory,
full batches and the work spread as well as can be: no scheduler reaches it. Policies that count
forward at once, as reverse proxies do."""


def _range(seeds: Sequence[int]) -> str:
    return f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else str(seeds[0])


def _by_policy(results: Results, load: float, workload: str) -> list[tuple[str, list[Summary]]]:
    found = [(policy, _of(results, policy, load, "", workload)) for policy in COMPARED]
    return [(policy, summaries) for policy, summaries in found if summaries]


def _by_scenario(results: Results) -> list[tuple[str, list[Summary]]]:
    return [
        (f"{scenario or 'as above'}: {policy}", found)
        for scenario in SCENARIOS
        for policy in SCENARIO_POLICIES
        if (found := _of(results, policy, SCENARIO_LOAD, scenario, MIXED))
    ]


def _of(results: Results, policy: str, load: float, scenario: str, workload: str) -> list[Summary]:
    return list(_by_seed(results, policy, load, scenario, workload).values())


def _table(rows: list[tuple[str, list[Summary]]]) -> str:
    lines = ["| policy | " + " | ".join(title for title, _, _ in COLUMNS) + " |"]
    lines.append("|---|" + "---:|" * len(COLUMNS))
    for name, summaries in rows:
        cells = [cell([value(one) for one in summaries], form) for _, value, form in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
