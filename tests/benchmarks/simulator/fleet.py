"""The fleets of the benchmark: a mixed one of eight machines, and one of a home with four."""

from random import Random

from msgspec import structs

from ollama_coordinator.simulation import Fleet, MachineSpec, ModelSpec, Outage
from ollama_coordinator.simulation.machine import GIB

GB = 1_000_000_000

# Most popular first: the workload's Zipf ranks follow this order.
MODELS = (
    ModelSpec("llama3.1:8b", int(4.9 * GB)),
    ModelSpec("qwen3:4b", int(2.6 * GB)),
    ModelSpec("qwen3:14b", int(9.3 * GB)),
    ModelSpec("gemma3:12b", int(8.1 * GB)),
    ModelSpec("qwen3:0.6b", int(0.5 * GB)),
    ModelSpec("mistral:7b", int(4.1 * GB)),
    ModelSpec("llama3.2:1b", int(1.3 * GB)),
    ModelSpec("gpt-oss:20b", int(14 * GB)),
    ModelSpec("qwen3:32b", int(20 * GB)),
    ModelSpec("llama3.3:70b", int(40 * GB)),
)
EMBEDDERS = (
    ModelSpec("nomic-embed-text", int(0.3 * GB), embeds=True),
    ModelSpec("mxbai-embed-large", int(0.7 * GB), embeds=True),
)


def _holding(largest_bytes: float) -> tuple[ModelSpec, ...]:
    return tuple(model for model in MODELS + EMBEDDERS if model.size_bytes <= largest_bytes)


BIG = MachineSpec(
    name="big", models=_holding(40 * GB), memory_bytes=64 * GIB, slots=4,
    prefill_tokens_per_second=3000, decode_tokens_per_second=80, load_bytes_per_second=2.5e9,
)  # fmt: skip
MIDDLE = MachineSpec(
    name="middle", models=_holding(9.5 * GB), memory_bytes=16 * GIB, slots=2,
    prefill_tokens_per_second=1200, decode_tokens_per_second=40, load_bytes_per_second=1.5e9,
)  # fmt: skip
LAPTOP = MachineSpec(
    name="laptop", models=_holding(5 * GB), memory_bytes=10 * GIB, slots=1,
    prefill_tokens_per_second=300, decode_tokens_per_second=20, load_bytes_per_second=1.2e9,
)  # fmt: skip
CPU = MachineSpec(
    name="cpu", models=_holding(5 * GB), memory_bytes=24 * GIB, slots=1, has_gpu=False,
    prefill_tokens_per_second=40, decode_tokens_per_second=7, load_bytes_per_second=0.6e9,
)  # fmt: skip


def mixed_fleet(**changes: bool) -> Fleet:
    """Two machines of each class."""
    return Fleet(
        machines=tuple(
            structs.replace(kind, name=f"{kind.name}-{number}", **changes)
            for kind in (BIG, MIDDLE, LAPTOP, CPU)
            for number in (1, 2)
        )
    )


# At home: the chat's model first, then the one its page uses for titles and tags, then the others.
HOME_CHAT = ModelSpec("llama3.1:8b", int(4.9 * GB))
HOME_SMALL = ModelSpec("qwen3:4b", int(2.6 * GB))
HOME_CODER = ModelSpec("qwen3-coder:14b", int(9.0 * GB))
HOME_TINY = ModelSpec("llama3.2:1b", int(1.3 * GB))
HOME_EMBEDDER = ModelSpec("nomic-embed-text", int(0.3 * GB), embeds=True)
HOME_MODELS = (HOME_CHAT, HOME_SMALL, HOME_CODER, HOME_TINY, HOME_EMBEDDER)
HOME_LIGHT = (HOME_CHAT, HOME_SMALL, HOME_TINY, HOME_EMBEDDER)


def home_fleet(**changes: bool) -> Fleet:
    """One fast machine, one medium one, a laptop and a box without a GPU; one slot each."""
    machines = (
        MachineSpec(
            name="fast", models=HOME_MODELS, memory_bytes=24 * GIB,
            prefill_tokens_per_second=4000, decode_tokens_per_second=114,
            load_bytes_per_second=2.5e9,
        ),
        MachineSpec(
            name="medium", models=HOME_MODELS, memory_bytes=16 * GIB,
            prefill_tokens_per_second=1200, decode_tokens_per_second=40,
            load_bytes_per_second=1.5e9,
        ),
        MachineSpec(
            name="laptop", models=HOME_LIGHT, memory_bytes=12 * GIB,
            prefill_tokens_per_second=350, decode_tokens_per_second=15,
            load_bytes_per_second=1.2e9,
        ),
        MachineSpec(
            name="box", models=HOME_LIGHT, memory_bytes=24 * GIB, has_gpu=False,
            prefill_tokens_per_second=40, decode_tokens_per_second=6,
            load_bytes_per_second=0.6e9,
        ),
    )  # fmt: skip
    return Fleet(machines=tuple(structs.replace(one, **changes) for one in machines))


def without_slowest(fleet: Fleet) -> Fleet:
    """The same fleet less the machine that writes slowest."""
    slowest = min(fleet.machines, key=lambda machine: machine.decode_tokens_per_second)
    return structs.replace(
        fleet, machines=tuple(one for one in fleet.machines if one.name != slowest.name)
    )


def with_wrong_timings(fleet: Fleet, seed: int) -> Fleet:
    """Every machine's report of every model is off by two, always in the same direction."""
    lots = Random(seed)
    factors = {
        f"{machine.name} {model.key}": lots.choice((0.5, 2.0))
        for machine in fleet.machines
        for model in machine.models
    }
    return structs.replace(fleet, timing_factors=factors)


def with_outages(fleet: Fleet, seconds: float, seed: int) -> Fleet:
    """Each machine is down for a minute once in the time, at a moment of its own."""
    lots = Random(seed)
    outages = tuple(
        Outage(machine.name, lots.uniform(0.1, 0.9) * seconds, 60.0) for machine in fleet.machines
    )
    return structs.replace(fleet, outages=outages)
