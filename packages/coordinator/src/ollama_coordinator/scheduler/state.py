"""Machines, places and running leases: the one module that writes their fields.

A `Place` is one model on one agent's disk (two names of the same weights share it). A `Machine` is
the agent with its memory. Other modules read every field, and change them by the methods here, each
named for what happened. `DESIGN.md` lists the fields, and the module that calls each transition.
"""

from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from math import exp
from typing import NamedTuple

from msgspec import Struct

from ollama_coordinator.registry import AgentState
from ollama_coordinator_common.types import AgentId, RunnerSettings

from .memory import MemoryLimits
from .rates import BATCH_FACTOR, OUTPUT_TOKENS, Priors, Quantity, Rates, priors
from .slots import AgentSlots, OwnerUse, Slots
from .types import Lease, LeaseId, RunnerOptions

# What one recent failure adds to a cost: an equal place wins, a much slower one does not.
TROUBLE_SECONDS = 0.5
# A machine that failed once counts as the others within a minute: a restart takes as long.
TROUBLE_HALF_LIFE_SECONDS = 10.0
LEAST_TROUBLE_SECONDS = 0.01  # costs this close are equal (`choose.TIE_SECONDS`)
# Some twenty requests count; one failure alone costs no more than what counts as equal.
FAILING_GAIN = 0.05
FAILING_HALF_LIFE_SECONDS = 300.0  # some tries of an avoided place
SERVICE_GAIN = 0.2  # the last five requests count: how long answers are changes with the client
# A load that is late is expected after a quarter more of its age, a second at least:
LOAD_DELAY_SHARE = 0.25
SHORTEST_LOAD_DELAY_SECONDS = 1.0
SMALLEST_PREFERENCE = 0.01  # an operator's 0 must not divide: it means "only if no other can"

# A report counts requests up to so many seconds ago: some that have ended since were ours.
REPORT_AGE_SECONDS = 5.0
MOST_ENDS = 64  # where more end in five seconds, some of ours are taken for others'
USED_PERCENT = 50.0  # of a GPU: a desktop takes less, a model at work more

NEVER = float("-inf")


class Eviction(Struct, frozen=True):
    """What has to leave so that a model fits, and what that costs in seconds."""

    victims: tuple["Place", ...] = ()
    penalty: float = 0.0


NO_EVICTION = Eviction()


class KnownEviction(NamedTuple):
    """The cheapest eviction for a place, found at this time in this epoch of its machine."""

    epoch: int
    at: float
    eviction: Eviction


class Full(NamedTuple):
    """In this epoch and until this time a machine has no room for a model of so many bytes."""

    epoch: int
    until: float
    memory_bytes: int


NOT_FULL = Full(-1, NEVER, 0)


class FitTrial(NamedTuple):
    """A load beside other models: the next list of loaded models shows whether all of them fit."""

    place: "Place"
    beside: tuple["Place", ...]


@dataclass(slots=True, eq=False)
class Place:
    """One model on one agent: in memory or not, its slots, its leases, its rates.

    `options` are those of its runner, `None` when somebody else loaded it. `blocked`: its load was
    assumed to be over and then found to wait for memory. `ends` is the sum of the predicted ends of
    its leases, so that the time left is known without a loop, and `slow_down` the factor by which
    they were predicted to be slower than alone, `owner` what holds its slots and is not ours.
    `waiting_load` is its share of the interactive requests that wait, `failing` the share of its
    requests that failed. `prefill` and `decode` are seconds per token, `load` the seconds of a
    load; `factors` are the machine's that they lean on.
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
    slow_down: float = 1.0
    waiting_load: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    load: float = 0.0
    factors: int = 0
    solo: int = 0
    mean_service: float | None = None
    failing: float = 0.0
    failing_at: float | None = None
    concurrency_seconds: float = 0.0
    counted_at: float = 0.0
    known_eviction: KnownEviction | None = None
    owner: OwnerUse = field(default_factory=OwnerUse)

    # ── rates ─────────────────────────────────────────────────────────────────────────────────

    @property
    def priors(self) -> Priors:
        """What is assumed before anything was measured, with the share that its GPU cannot hold."""
        total, needed = self.machine.memory.total, self.memory_bytes
        outside = 0.0 if total is None or total >= needed else 1 - total / needed
        return priors(self.disk_bytes, has_gpu=self.machine.has_gpu, outside=outside)

    def take_rates(self, rates: Rates) -> None:
        """Take over everything learned since the last time."""
        machine = self.machine
        self.factors = machine.factors
        assumed = self.priors.logs
        prefill, decode, self.load = rates.all(machine.id, self.model, assumed)
        self.prefill, self.decode = 1 / prefill, 1 / decode

    def take_rate(self, quantity: Quantity, rate: float) -> None:
        """The newest rate of one quantity: tokens per second, or seconds of a load."""
        if quantity is Quantity.LOAD:
            self.load = rate
        elif quantity is Quantity.DECODE:
            self.decode = 1 / rate
        else:
            self.prefill = 1 / rate

    def confirm_decode(self, *, most: int) -> None:
        """An answer ran alone, so that `decode` is that of one request, or it fits that."""
        self.solo = min(self.solo + 1, most)

    def doubt_decode(self) -> None:
        """An answer was slower or faster than those beside it explain."""
        self.solo -= 1

    def served_for(self, seconds: float) -> None:
        """A request held its slot for so long."""
        before = seconds if self.mean_service is None else self.mean_service
        self.mean_service = before + SERVICE_GAIN * (seconds - before)

    def owner_wait(self, ours: int, now: float) -> float:
        """The seconds that a request beside `ours` is expected to wait for what is not ours."""
        service = self.mean_service or OUTPUT_TOKENS * self.decode
        return self.owner.wait(ours, self.slots.count, service, now)

    # ── failures ──────────────────────────────────────────────────────────────────────────────

    def judged(self, now: float, *, failed: bool) -> None:
        """A request failed here or was served."""
        if failed or self.failing:
            share = self.failing_share(now)
            self.failing = share + FAILING_GAIN * (failed - share)
            self.failing_at = now

    def remember_failing(self, share: float) -> None:
        """Take over the share of before a restart; it fades from its first use on."""
        self.failing, self.failing_at = share, None

    def failing_share(self, now: float) -> float:
        """The probability that a request has to be repeated elsewhere."""
        if self.failing_at is None:
            self.failing_at = now
        return self.failing * exp((self.failing_at - now) * 0.693 / FAILING_HALF_LIFE_SECONDS)

    # ── memory ────────────────────────────────────────────────────────────────────────────────

    def measure(self, memory_bytes: int, context: int | None) -> None:
        """Ollama lists the model as loaded, with its memory and the runner's context."""
        self.memory_bytes, self.measured, self.context = memory_bytes, True, context

    def expect_bytes(self, memory_bytes: int) -> None:
        """The memory it will probably take, by what other models take there."""
        self.memory_bytes = memory_bytes

    def begin_load(self, options: RunnerOptions, seconds: float, now: float) -> None:
        """The agent begins to load the model, which takes its memory from now on."""
        machine = self.machine
        machine.loading = self
        machine.fit_trial = FitTrial(self, tuple(machine.residents))
        if machine.reserved is self:
            machine.reserved = None
        self.options = options
        self.loading_since, self.blocked = now, False
        self.loading_until = self.loaded_at = now + seconds

    def delay_load(self, now: float) -> None:
        """The load should be over by now and is not."""
        more = (now - self.loading_since) * LOAD_DELAY_SHARE
        self.loading_until = now + max(more, SHORTEST_LOAD_DELAY_SECONDS)

    def block_load(self, now: float) -> None:
        """The load was assumed to be over, and the agent does not list the model."""
        self.resident, self.blocked = False, True
        self.delay_load(now)
        self.machine.loading = self.machine.loading or self
        self.machine.epoch += 1

    def load_ended(self, next_load: "Place | None", *, at: float | None) -> None:
        """The load ended: the model is in memory since `at`, or never came there (`None`).

        `next_load` is another load on the same machine.
        """
        if self.machine.loading is self:
            self.machine.loading = next_load
        if at is None:
            self.loading_until = None
        else:
            self.loaded_at = at

    def enter_memory(self) -> bool:
        """The model takes memory, loaded or being loaded. Whether it took none before."""
        machine = self.machine
        machine.epoch += 1
        is_new = self not in machine.residents
        if is_new:
            machine.residents[self] = None
        return is_new

    def ready(self, options: RunnerOptions | None) -> None:
        """The model is in memory, loaded with these options."""
        self.resident, self.loading_until, self.options = True, None, options

    def runs_elsewhere(self) -> None:
        """A cloud model needs no memory here and no load."""
        self.resident = True

    def leave_memory(self) -> bool:
        """The model is no longer in memory. Whether it took any."""
        machine = self.machine
        self.resident, self.options = False, None
        machine.epoch += 1
        took = self in machine.residents
        if took:
            del machine.residents[self]
        return took

    def evicted(self, now: float) -> None:
        """Its agent was asked to unload it."""
        self.unloaded_at = now

    def keep_eviction(self, eviction: Eviction, now: float) -> None:
        """The cheapest eviction for this model, valid while nothing changes on the machine."""
        self.known_eviction = KnownEviction(self.machine.epoch, now, eviction)

    # ── leases ────────────────────────────────────────────────────────────────────────────────

    def remaining(self, now: float) -> float:
        """The predicted seconds until nothing runs here."""
        return max((run.remaining(now) for run in self.running.values()), default=0.0)

    def current_slow_down(self) -> float:
        """By how much what runs here now is slower than alone on its machine."""
        machine = self.machine
        return len(machine.busy) * (1 + machine.batch * (len(self.running) - 1))

    def begin(self, run: "Running", now: float) -> None:
        """A lease begins."""
        machine = self.machine
        run.concurrency_seconds = self._count(now)
        if not self.running:
            machine.epoch += 1
            machine.busy[self] = None
            self.slow_down = len(machine.busy)
        self.running[run.lease.id] = run
        self.ends += run.ends_at
        self.touched_at = now
        self.last_used = run.number
        machine.running += 1
        machine.ends += run.ends_at

    def end(self, run: "Running", now: float) -> None:
        """A lease ends."""
        machine = self.machine
        beside = self._count(now) - run.concurrency_seconds
        run.mean_beside = max(beside / max(now - run.lease.granted_at, 1e-6) - 1, 0.0)
        del self.running[run.lease.id]
        self.touched_at = now
        self.ends -= run.ends_at
        machine.running -= 1
        machine.ended.append(now)
        machine.ends -= run.ends_at
        if not self.running:
            machine.epoch += 1
            del machine.busy[self]
            self.ends = 0.0
        if not machine.running:
            machine.ends = 0.0

    def _count(self, now: float) -> float:
        """The number of requests here, summed over all time until now."""
        self.concurrency_seconds += len(self.running) * (now - self.counted_at)
        self.counted_at = now
        return self.concurrency_seconds

    def slow_down_changed(self, slow_down: float) -> None:
        """Other requests run beside those here than when their ends were predicted."""
        self.slow_down = slow_down

    def delay_end(self, run: "Running", seconds: float) -> None:
        """A lease is predicted to end later, or sooner where `seconds` are negative."""
        run.ends_at += seconds
        self.ends += seconds
        self.machine.ends += seconds

    def wait_for(self, more: float) -> None:
        """So many more interactive requests wait for a slot here; fewer if negative."""
        self.waiting_load += more
        self.machine.waiting_load += more

    # ── drains ────────────────────────────────────────────────────────────────────────────────

    def drain(self, until: float) -> None:
        """Only requests that are predicted to end before this time may begin here."""
        self.draining_until = until


class RegistryFacts(NamedTuple):
    """What was last read of an agent in the registry; while it is equal, nothing has changed."""

    routable: bool
    settings: object
    runner: RunnerSettings | None
    available: object
    available_count: int
    loaded_list: object
    loaded: tuple[str, ...]
    lacks_gpu: bool
    foreign_bytes: int
    cooldowns: tuple[tuple[str, object], ...]
    offered: tuple[str, ...]


@dataclass(slots=True, eq=False)
class Machine:
    """One agent: whether it may be used, its memory, and what all its places do together.

    `epoch` grows when a model comes, goes, or changes between idle and in use. `residents` take
    memory, loaded or being loaded. `reserved` is the place for which others are drained. `has_gpu`
    is assumed until a report says otherwise; `used_gpu`: a model was seen in a GPU's memory.
    `unsettled` is the time of a list of loaded models that contradicts what happened a moment
    before; a later one decides. `batch` is how much one more request in a runner slows each other.
    `factors` grows when what is learned of the machine changes the rates of all its places.
    `ended` are the times of the last ends of leases.
    """

    id: AgentId
    agent: AgentState
    memory: MemoryLimits
    routable: bool = False
    places: dict[str, Place] = field(default_factory=dict)
    residents: dict[Place, None] = field(default_factory=dict)
    loading: Place | None = None
    fit_trial: FitTrial | None = None
    reserved: Place | None = None
    drain_from: float = NEVER
    running: int = 0
    busy: dict[Place, None] = field(default_factory=dict)
    ends: float = 0.0
    has_gpu: bool = True
    used_gpu: bool = False
    sized: bool = False
    unsettled: float | None = None
    batch: float = BATCH_FACTOR
    factors: int = 0
    epoch: int = 0
    full: Full = NOT_FULL
    offered_at: float = NEVER
    waiting_load: float = 0.0
    preference: float = 1.0
    backup: float = 0.0
    trouble: float = 0.0
    trouble_at: float = 0.0
    facts: RegistryFacts | None = None
    down_since: float | None = None
    context_length: int | None = None
    agent_slots: AgentSlots = field(default_factory=AgentSlots)
    ended: deque[float] = field(default_factory=lambda: deque(maxlen=MOST_ENDS))

    # ── failures ──────────────────────────────────────────────────────────────────────────────

    def failed(self, now: float) -> None:
        """A request failed here."""
        self.trouble = self._trouble(now) + 1.0
        self.trouble_at = now

    def succeeded(self, now: float) -> None:
        """A request was served here: half of what went wrong is forgotten."""
        if self.trouble:
            self.trouble = self._trouble(now) / 2
            self.trouble_at = now

    def penalty(self, now: float) -> float:
        """Seconds that recent failures add to a cost."""
        seconds = self._trouble(now) * TROUBLE_SECONDS if self.trouble else 0.0
        return seconds if seconds > LEAST_TROUBLE_SECONDS else 0.0

    def _trouble(self, now: float) -> float:
        return self.trouble * exp((self.trouble_at - now) * 0.693 / TROUBLE_HALF_LIFE_SECONDS)

    def factors_changed(self) -> None:
        """The rates of its places that lean on its factors are to be taken anew before use."""
        self.factors += 1

    def not_ours(self, now: float) -> int:
        """How many requests that are not ours its agent reports: by connections in use, or by a
        GPU that computes while nothing of ours runs. The report may be some seconds old.
        """
        report = self.agent.report
        if report is None:
            return 0
        ours = self.running + sum(now - at < REPORT_AGE_SECONDS for at in self.ended)
        others = report.other_requests
        if others is None:  # only Linux shows which connections are in use
            platform = self.agent.registration.platform or "Linux"
            is_exact = platform.startswith("Linux")
            others = max(report.active_requests - ours, 0) if is_exact else 0
        if not (others or ours):
            others = int(
                any((gpu.utilization_percent or 0) >= USED_PERCENT for gpu in self.agent.cards)
            )
        return others

    # ── what the registry says ────────────────────────────────────────────────────────────────

    def read(self, facts: RegistryFacts) -> None:
        """Something that the registry knows of the agent has changed."""
        self.facts = facts
        self.epoch += 1
        self.preference = max(self.agent.settings.preference, SMALLEST_PREFERENCE)
        self.backup = self.agent.settings.backup_seconds
        self.context_length = facts.runner.context_length if facts.runner is not None else None
        self.memory.read(self.agent)

    def in_rotation(self, *, routable: bool, down: bool, now: float) -> bool:
        """Whether it may be used, and whether its Ollama is down; whether it went down just now.

        A machine that comes back starts without its earlier failures.
        """
        if routable and not self.routable:
            self.trouble = 0.0
        if down:
            self.down_since = now
        self.routable = routable
        return self.down_since == now

    def list_places(self, places: dict[str, Place]) -> None:
        """These models are on its disk, by every name they have there."""
        for name in self.places.keys() - places.keys():
            self.places[name].names.discard(name)
        for name, place in places.items():
            place.names.add(name)
        self.places = places
        self.agent_slots.keep({place.slots for place in places.values()})

    def judge(self, *, used_gpu: bool, lacks_gpu: bool) -> bool:
        """Whether it has a GPU and known memory; whether that changed, and its priors with it."""
        self.used_gpu = self.used_gpu or used_gpu
        has_gpu = self.used_gpu or not lacks_gpu
        sized = self.memory.total is not None
        if (has_gpu, sized) == (self.has_gpu, self.sized):
            return False
        self.has_gpu, self.sized = has_gpu, sized
        return True

    def fit_judged(self) -> None:
        """A list of loaded models showed the outcome of the load beside others."""
        self.fit_trial = None

    def reconcile(self, unsettled: float | None) -> None:
        """A list of loaded models was read; it is `unsettled` where a later one must decide."""
        self.unsettled = unsettled
        self.epoch += 1

    # ── decisions ─────────────────────────────────────────────────────────────────────────────

    def is_full(self, memory_bytes: int, now: float) -> bool:
        """Whether it was found a moment ago that no model of this size can come."""
        full = self.full
        return full.epoch == self.epoch and now < full.until and memory_bytes >= full.memory_bytes

    def found_full(self, memory_bytes: int, until: float) -> None:
        """There is no room for a model of so many bytes while nothing changes, until this time."""
        self.full = Full(self.epoch, until, memory_bytes)

    def reserve(self, place: Place) -> None:
        """Others are drained so that this place can be loaded."""
        self.reserved = place

    def drain_ended(self, place: Place, drain_from: float) -> None:
        """The drain for this place is over; the next one may begin at this time."""
        if self.reserved is place:
            self.reserved = None
        self.drain_from = drain_from

    def offered(self, now: float) -> None:
        """The queues of other models were offered what is idle here."""
        self.offered_at = now

    def take_batch(self, batch: float) -> None:
        """The newest estimate of how much requests in one runner slow each other down."""
        self.batch = batch


class Action(Enum):
    """What a request does at a place."""

    GO = "go"
    LOAD = "load"
    WAIT = "wait"


class Choice(Struct):
    """One possibility and its cost in seconds.

    `wait` is the time until a slot is free, `run` the cost once it is there, `cached` the prompt
    tokens expected in the prompt cache, `failure` what recent failures add, `others` the best
    alternative of each kind. `slots_left` are the slots (when, number, place) that the requests
    before it were expected to leave, where it went before them.
    """

    action: Action
    place: Place | None
    cost: float
    wait: float = 0.0
    run: float = 0.0
    cached: int = 0
    failure: float = 0.0
    eviction: Eviction = NO_EVICTION
    others: "tuple[Choice, ...]" = ()
    slots_left: "tuple[tuple[float, int, Place], ...]" = ()


class Running(Struct, eq=False):
    """A lease with what was predicted of it, and what was seen since.

    `number` is its id. `loads`: it made the agent load the model; `tries`: it was sent beyond the
    proven slots. `rank` counts the leases of its place at its grant, itself included. `output` are
    the expected tokens of its answer. `saw_end_at` is when one of the earlier ones last ended,
    `beside` how many there were then; `mean_beside` how many ran beside it on average, once it has
    ended. `adopted`: another scheduler granted it, so what ran beside it is not known.
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
    concurrency_seconds: float = 0.0
    mean_beside: float = 0.0
    began_at: float | None = None
    saw_end_at: float | None = None
    beside: int = 0
    adopted: bool = False

    def remaining(self, now: float) -> float:
        """The predicted seconds left; never less than a quarter of its age."""
        left, least = self.ends_at - now, (now - self.lease.granted_at) / 4
        return left if left > least else least  # noqa: FURB136 - `max` takes three times as long

    def began(self, now: float) -> None:
        """The first byte of its answer came."""
        self.began_at = now

    def saw_end(self, beside: int, now: float) -> None:
        """One of the requests granted before it ended; so many had been there with it."""
        self.saw_end_at, self.beside = now, beside
