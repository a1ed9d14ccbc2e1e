"""What was learned, as plain rows that survive a restart, and estimates for people."""

from collections.abc import Iterable

from msgspec import Struct, field

from ollama_coordinator_common.types import AgentId

from .memory import Fit, predicted_bytes
from .rates import Mean, Means, OutputLengths, Quantity, Rates, prior
from .slots import LearnedSlots
from .state import Place
from .sync import Machines
from .types import Form

LEAST_FAILING = 0.005  # one failure of ten minutes ago; less changes no choice


class LearnedMeans(Struct, frozen=True):
    """An agent and a model: logarithms of tokens/s read and written, and of a load's seconds.

    As factors, of an agent or of a model: the other one of the two is empty.
    """

    agent_id: AgentId
    model: str
    means: Means


class LearnedBatch(Struct, frozen=True):
    """The batch factor of an agent."""

    agent_id: AgentId
    mean: Mean


class LearnedLength(Struct, frozen=True):
    """The mean output tokens of a client's requests to a model in one form.

    Without a client, of all clients' requests.
    """

    model: str
    mean: Mean
    client: str | None = None
    form: Form = Form.STREAM


class LearnedFailing(Struct, frozen=True):
    """The share of a model's requests that failed on an agent."""

    agent_id: AgentId
    model: str
    share: float


class Estimate(Struct, frozen=True):
    """What is predicted of a model on an agent, for people.

    `slots_reported`: its agent reports them. `samples` are those of reading, writing and loading.
    """

    agent_id: AgentId
    model: str
    load_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    slots: int
    slots_reported: bool
    samples: tuple[int, int, int] = (0, 0, 0)


class Prospect(Struct, frozen=True):
    """What is predicted of a model on an agent, whether it has it on disk or not.

    Seconds for each token, and of a load. `is_measured`: it ran there before. `fits`: whether it
    fits in memory beside the given models; `None` where that is not known.
    """

    load: float
    prefill: float
    decode: float
    is_measured: bool
    fits: bool | None


class Learned(Struct, frozen=True):
    """Everything that a scheduler learned. Saved as `kin` before factors had that name."""

    pairs: list[LearnedMeans] = []
    factors: list[LearnedMeans] = field(default_factory=list, name="kin")
    batch: list[LearnedBatch] = []
    lengths: list[LearnedLength] = []
    slots: list[LearnedSlots] = []
    failing: list[LearnedFailing] = []


def export_learned(machines: Machines, rates: Rates, lengths: OutputLengths) -> Learned:
    """The rows of what is known. Those of rates and lengths are live, and go on learning.

    There may be a hundred thousand rows, and copies take several times as long.
    """
    nobody = AgentId("")
    return Learned(
        pairs=[LearnedMeans(agent, model, means) for (agent, model), means in rates.pairs.items()],
        factors=[
            *(LearnedMeans(agent, "", means) for agent, means in rates.agents.items()),
            *(LearnedMeans(nobody, model, means) for model, means in rates.models.items()),
        ],
        batch=[LearnedBatch(agent, mean) for agent, mean in rates.batches.items()],
        lengths=[
            *(LearnedLength(m, mean, None, f) for (m, f), mean in lengths.models.items()),
            *(LearnedLength(m, mean, c, f) for (c, m, f), mean in lengths.clients.items()),
        ],
        slots=[
            LearnedSlots(machine.id, name, place.slots.proven, place.slots.failures)
            for machine in machines.by_agent.values()
            for name, place in machine.places.items()
            if place.slots.fixed is None and place.slots.is_seen
        ],
        failing=[
            LearnedFailing(machine.id, name, share)
            for machine in machines.by_agent.values()
            for name, place in machine.places.items()
            if place.failing and (share := place.failing_share(machines.synced_at)) > LEAST_FAILING
        ],
    )


def import_learned(
    learned: Learned, machines: Machines, rates: Rates, lengths: OutputLengths
) -> None:
    """Take over the rows; they replace what is known of the same pairs."""
    for row in learned.pairs:
        rates.pairs[row.agent_id, row.model] = _copy(row.means)
    for factors in learned.factors:
        if factors.agent_id:
            rates.agents[factors.agent_id] = _copy(factors.means)
        else:
            rates.models[factors.model] = _copy(factors.means)
    for batch in learned.batch:
        rates.batches[batch.agent_id] = _one(batch.mean)
    for length in learned.lengths:
        if length.client is None:
            lengths.models[length.model, length.form] = _one(length.mean)
        else:
            lengths.clients[length.client, length.model, length.form] = _one(length.mean)
    failing = {(one.agent_id, one.model): one.share for one in learned.failing}
    machines.relearn(learned.slots, failing)


def estimates(machines: Machines, rates: Rates) -> list[Estimate]:
    """What is predicted of every model on every agent."""
    return [
        _estimate(name, place, rates)
        for machine in machines.by_agent.values()
        for name, place in machine.places.items()
    ]


def estimate(machines: Machines, rates: Rates, agent_id: AgentId, model: str) -> Estimate | None:
    """What is predicted of this model on this agent; `None` if it does not have it."""
    machine = machines.by_agent.get(agent_id)
    place = machine.places.get(model) if machine is not None else None
    return None if place is None else _estimate(model, place, rates)


def prospect(
    machines: Machines,
    rates: Rates,
    agent_id: AgentId,
    model: str,
    size: int,
    beside: Iterable[str],
) -> Prospect | None:
    """What is predicted of a model of `size` bytes there; `None` if there is no such agent."""
    machine = machines.by_agent.get(agent_id)
    if machine is None:
        return None
    place = machine.places.get(model)
    others = {machine.places[name] for name in beside if name in machine.places} - {place}
    machine.memory.read(machine.agent)
    new = place.memory_bytes if place is not None else predicted_bytes(size)
    used = sum(other.memory_bytes for other in others)
    fit = machine.memory.fit(new, used, len(others) + 1)
    samples = _samples(rates.pairs.get((agent_id, place.model if place is not None else model)))
    if place is not None:
        seconds = place.load, place.prefill, place.decode
    else:
        load, prefill, decode = (
            rates.rate(one, agent_id, model, prior(one, size, has_gpu=machine.has_gpu))
            for one in (Quantity.LOAD, Quantity.PREFILL, Quantity.DECODE)
        )
        seconds = load, 1 / prefill, 1 / decode
    fits = {Fit.YES: True, Fit.NO: False, Fit.MAYBE: None}[fit]
    return Prospect(*seconds, is_measured=samples[1] > 0, fits=fits)


def _estimate(name: str, place: Place, rates: Rates) -> Estimate:
    return Estimate(
        agent_id=place.machine.id,
        model=name,
        load_seconds=place.load,
        prefill_tokens_per_second=1 / place.prefill,
        decode_tokens_per_second=1 / place.decode,
        slots=place.slots.count,
        slots_reported=place.slots.fixed is not None,
        samples=_samples(rates.pairs.get((place.machine.id, place.model))),
    )


def _samples(means: Means | None) -> tuple[int, int, int]:
    if means is None:
        return (0, 0, 0)
    return (means[0].samples, means[1].samples, means[2].samples)


def _copy(means: Means) -> Means:
    return (_one(means[0]), _one(means[1]), _one(means[2]))


def _one(mean: Mean) -> Mean:
    return Mean(mean.value, mean.samples)
