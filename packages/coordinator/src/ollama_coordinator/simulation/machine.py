"""What a simulated fleet consists of: machines with speed and memory, models, outages."""

from msgspec import Struct

from ollama_coordinator.scheduler.rates import TYPICAL_BYTES
from ollama_coordinator_common.names import model_key

GIB = 2**30


class ModelSpec(Struct, frozen=True):
    """A model: the size of its weights, and whether it only embeds."""

    name: str
    size_bytes: int
    embeds: bool = False

    @property
    def key(self) -> str:
        """Its routing key."""
        return model_key(self.name)

    @property
    def memory_bytes(self) -> int:
        """What it takes in memory, context included."""
        return int(self.size_bytes * 1.15) + 300_000_000


class MachineSpec(Struct, frozen=True, kw_only=True):
    """One machine; rates are for a model of `TYPICAL_BYTES` and fall as models grow.

    `reports_memory` and `reports_slots`: whether its agent reports them; a bare Ollama has neither.
    """

    name: str
    models: tuple[ModelSpec, ...]
    memory_bytes: int = 24 * GIB
    slots: int = 1
    prefill_tokens_per_second: float = 1500.0
    decode_tokens_per_second: float = 40.0
    load_bytes_per_second: float = 1.5e9
    load_overhead_seconds: float = 1.0
    unload_seconds: float = 0.6
    batch_factor: float = 0.4
    has_gpu: bool = True
    reports_memory: bool = True
    reports_slots: bool = True

    def load_seconds(self, model: ModelSpec) -> float:
        """From disk into memory."""
        return self.load_overhead_seconds + model.size_bytes / self.load_bytes_per_second

    def prefill_seconds(self, model: ModelSpec, tokens: float) -> float:
        """Reading a prompt with nothing else running."""
        return tokens * model.size_bytes / TYPICAL_BYTES / self.prefill_tokens_per_second

    def decode_seconds(self, model: ModelSpec, tokens: float) -> float:
        """Writing an answer with nothing else running."""
        return tokens * model.size_bytes / TYPICAL_BYTES / self.decode_tokens_per_second

    def slow_down(self, in_runner: int, runners: int) -> float:
        """How much slower each of `in_runner` requests is while so many runners are at work."""
        return runners * (1 + self.batch_factor * (in_runner - 1))


class Outage(Struct, frozen=True):
    """A machine is down from `at` for `seconds`."""

    machine: str
    at: float
    seconds: float


class Fleet(Struct, frozen=True, kw_only=True):
    """The machines of a simulation, what goes wrong, and how well the coordinator is informed.

    `report_seconds` is the age that reports reach. `timing_factors` multiplies the durations that a
    machine reports, by "machine model".
    """

    machines: tuple[MachineSpec, ...]
    outages: tuple[Outage, ...] = ()
    report_seconds: float = 10.0
    probe_seconds: float = 1.0
    timing_factors: dict[str, float] = {}
