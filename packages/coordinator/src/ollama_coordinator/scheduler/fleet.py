"""The agents as the scheduler sees them: places for models, what runs there, what it costs.

A `Place` is one model on one agent's disk (two names of the same weights share it), a `Machine`
the agent with its memory. Both mirror the registry and add what only leases can tell.
"""

from dataclasses import dataclass, field
from enum import Enum
from math import exp

from msgspec import Struct

from ollama_coordinator.registry import AgentState
from ollama_coordinator_common.types import AgentId

from .learning import Rates
from .memory import Memory
from .priors import Quantity, prior
from .slots import Slots, Usual
from .types import Lease, LeaseId, RunnerOptions

TROUBLE_SECONDS = 0.5
TROUBLE_HALF_LIFE = 10.0
SPILL_FACTOR = 8.0
OCCUPANCY_GAIN = 0.2
NEVER = float("-inf")


@dataclass(slots=True, eq=False)
class Place:
    """One model on one agent: in memory or not, its slots, its requests, its learned costs.

    `ends` is the sum of the predicted ends of what runs here, so that the time left is known
    without a loop, and `pace` how much slower than alone they were taken to run when these were
    predicted; `crowd` their number summed over time. `awaited` is how many people wait for a slot
    here: those of its lines, shared among the places that may serve them. `prefill` and `decode`
    are seconds per token, `load` the seconds of a load. `measured`: its `memory_bytes` were seen.
    `blocked`: its load was taken to be over, and then found to wait there.
    """

    machine: "Machine"
    model: str
    weights: str
    disk_bytes: int
    memory_bytes: int
    slots: Slots
    measured: bool = False
    names: set[str] = field(default_factory=set)
    resident: bool = False
    loading_until: float | None = None
    loading_since: float = NEVER
    blocked: bool = False
    options: RunnerOptions | None = None
    context: int | None = None
    loaded_at: float = NEVER
    touched_at: float = NEVER
    unloaded_at: float = NEVER
    last_used: int = 0
    draining_until: float = NEVER
    running: "dict[LeaseId, Running]" = field(default_factory=dict)
    ends: float = 0.0
    pace: float = 1.0
    awaited: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    load: float = 0.0
    solo: int = 0
    occupancy: float | None = None
    crowd: float = 0.0
    crowd_at: float = 0.0
    priors: "tuple[tuple[int, int | None, bool], tuple[float, float, float]] | None" = None
    room: "tuple[int, float, Room] | None" = None

    def prior(self, quantity: Quantity) -> float:
        """What is believed before anything was measured."""
        machine = self.machine
        known_for = (self.memory_bytes, machine.memory.total, machine.has_gpu)
        if self.priors is None or self.priors[0] != known_for:
            slower = 1 + SPILL_FACTOR * self._spilled()
            values = [prior(one, self.disk_bytes, has_gpu=machine.has_gpu) for one in Quantity]
            self.priors = (known_for, (values[0] / slower, values[1] / slower, values[2]))
        return self.priors[1][quantity]

    def _spilled(self) -> float:
        """The share of the model that the GPU has no memory for."""
        total = self.machine.memory.total
        return 0.0 if total is None else max(0.0, 1 - total / max(self.memory_bytes, 1))

    def rate(self, rates: Rates) -> None:
        """Take over everything learned since the last time."""
        for quantity in Quantity:
            believed = self.prior(quantity)
            self.rate_one(quantity, rates.rate(quantity, self.machine.id, self.model, believed))

    def rate_one(self, quantity: Quantity, rate: float) -> None:
        """What is believed of one quantity, in tokens per second, of a load in seconds."""
        if quantity is Quantity.LOAD:
            self.load = rate
        elif quantity is Quantity.DECODE:
            self.decode = 1 / rate
        else:
            self.prefill = 1 / rate

    def count_crowd(self, now: float) -> float:
        """The number of requests here, summed over all time until now."""
        self.crowd += len(self.running) * (now - self.crowd_at)
        self.crowd_at = now
        return self.crowd

    def held(self, seconds: float) -> None:
        """A request held its slot for so long."""
        before = seconds if self.occupancy is None else self.occupancy
        self.occupancy = before + OCCUPANCY_GAIN * (seconds - before)

    def remaining(self, now: float) -> float:
        """The predicted time until nothing runs here."""
        return max((run.remaining(now) for run in self.running.values()), default=0.0)


@dataclass(slots=True, eq=False)
class Machine:
    """One agent: whether it may be used, its memory, and what all its places do together.

    `epoch` grows when a model comes, goes, or changes between idle and in use.
    `reserved` is the place for which others are drained, `ends` the sum of all predicted ends.
    `busy` are the places where something runs.
    `full`: in that epoch and until then, there is no room for a model of so many bytes.
    `has_gpu` until it is known better; `used_gpu`: a model was seen in the memory of one.
    `sized`: whether its memory is known. `unsettled`: when the list was read that is another thing
    than what happened a moment before; a later one will tell.
    """

    id: AgentId
    agent: AgentState
    memory: Memory
    routable: bool = False
    places: dict[str, Place] = field(default_factory=dict)
    residents: dict[Place, None] = field(default_factory=dict)
    loading: Place | None = None
    trial: "Trial | None" = None
    reserved: Place | None = None
    drain_from: float = NEVER
    running: int = 0
    busy: dict[Place, None] = field(default_factory=dict)
    ends: float = 0.0
    has_gpu: bool = True
    used_gpu: bool = False
    sized: bool = False
    unsettled: float | None = None
    batch: float = 0.4
    epoch: int = 0
    full: tuple[int, float, int] = (-1, NEVER, 0)
    offered_at: float = NEVER
    awaited: float = 0.0
    preference: float = 1.0
    trouble: float = 0.0
    trouble_at: float = 0.0
    seen: tuple[object, ...] = ()
    down_since: float | None = None
    context_length: int | None = None
    usual: Usual = field(default_factory=Usual)

    def is_full(self, memory_bytes: int, now: float) -> bool:
        """Whether it was found a moment ago that nothing of this size can come."""
        full = self.full
        return full[0] == self.epoch and now < full[1] and memory_bytes >= full[2]

    def failed(self, now: float) -> None:
        """A request failed here."""
        self.trouble = self._trouble(now) + 1.0
        self.trouble_at = now

    def served(self, now: float) -> None:
        """A request was served here: half of what went wrong is forgotten."""
        if self.trouble:
            self.trouble = self._trouble(now) / 2
            self.trouble_at = now

    def penalty(self, now: float) -> float:
        """Seconds that recent failures add to an estimate."""
        seconds = self._trouble(now) * TROUBLE_SECONDS
        return seconds if seconds > 0.01 else 0.0

    def _trouble(self, now: float) -> float:
        if not self.trouble:
            return 0.0
        return self.trouble * exp((self.trouble_at - now) * 0.693 / TROUBLE_HALF_LIFE)


class Room(Struct, frozen=True):
    """What has to leave so that a model fits, and what that costs in seconds."""

    victims: tuple[Place, ...] = ()
    penalty: float = 0.0


NOTHING_LEAVES = Room()


class Action(Enum):
    """What a request does at a place."""

    GO = "go"
    LOAD = "load"
    WAIT = "wait"


class Choice(Struct):
    """One possibility and its cost; `wait` until a slot is free, `run` once it is there."""

    action: Action
    place: Place | None
    cost: float
    wait: float = 0.0
    run: float = 0.0
    cached: int = 0
    room: Room = NOTHING_LEAVES
    others: "tuple[Choice, ...]" = ()


@dataclass(slots=True, frozen=True)
class Trial:
    """A load beside other models: the next list of loaded models tells whether all of them fit."""

    place: Place
    beside: tuple[Place, ...]


class Running(Struct, eq=False):
    """A lease with what was predicted of it, and what was seen since.

    `loads`: it made the agent load the model; `tries`: it was sent beyond the proven slots.
    `rank` counts the requests of its place when it was granted, itself included. `saw_end_at` is
    when one of the earlier ones last ended, `beside` how many of those there were then; `company`
    how many ran beside it on average, once it has ended. `adopted`: another scheduler granted it,
    so what it ran beside is not known.
    """

    lease: Lease
    place: Place
    number: int
    ends_at: float
    loads: bool
    tries: bool
    rank: int
    cached: int
    output: float
    choice: Choice
    crowd: float = 0.0
    company: float = 0.0
    began_at: float | None = None
    saw_end_at: float | None = None
    beside: int = 0
    adopted: bool = False

    def remaining(self, now: float) -> float:
        """The predicted time left; never less than a quarter of its age."""
        left = self.ends_at - now
        least = (now - self.lease.granted_at) / 4
        return max(least, left)
