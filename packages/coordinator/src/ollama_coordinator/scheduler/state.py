"""What was learned, as plain rows that survive a restart and can be shown."""

from msgspec import Struct

from ollama_coordinator_common.types import AgentId

from .fleet import Place
from .learning import Lengths, Mean, Rates
from .mirror import Mirror

Triple = tuple[Mean, Mean, Mean]


class LearnedRates(Struct, frozen=True):
    """A pair of agent and model: logarithms of tokens per second read and written, and of a load.

    The last one is of seconds.
    """

    agent_id: AgentId
    model: str
    means: Triple


class LearnedKin(Struct, frozen=True):
    """An agent, or a model: logarithms of the ratios of the same to what is believed at first.

    The other one of the two is empty.
    """

    agent_id: AgentId
    model: str
    means: Triple


class LearnedBatch(Struct, frozen=True):
    """How much one more request in the same runner slows the others of an agent."""

    agent_id: AgentId
    mean: Mean


class LearnedLength(Struct, frozen=True):
    """The mean output tokens of a client's requests to a model; of everybody's without a client."""

    model: str
    mean: Mean
    client: str | None = None


class LearnedSlots(Struct, frozen=True):
    """How many requests of a model were seen to run at once on an agent.

    `failures` counts the attempts in vain to run more.
    """

    agent_id: AgentId
    model: str
    proven: int
    failures: int = 0


class Estimate(Struct, frozen=True):
    """What is predicted of a model on an agent, for people; `samples` of the three in order."""

    agent_id: AgentId
    model: str
    load_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    slots: int
    slots_told: bool
    samples: tuple[int, int, int] = (0, 0, 0)


class Learned(Struct, frozen=True):
    """Everything that a scheduler learned."""

    pairs: list[LearnedRates] = []
    kin: list[LearnedKin] = []
    batch: list[LearnedBatch] = []
    lengths: list[LearnedLength] = []
    slots: list[LearnedSlots] = []


def export_learned(mirror: Mirror, rates: Rates, lengths: Lengths) -> Learned:
    """The rows of what is known: those of rates and lengths are live, and go on learning.

    There may be a hundred thousand of them, and copies take several times as long.
    """
    nobody = AgentId("")
    return Learned(
        pairs=[LearnedRates(agent, model, means) for (agent, model), means in rates.pairs.items()],
        kin=[
            *(LearnedKin(agent, "", means) for agent, means in rates.agents.items()),
            *(LearnedKin(nobody, model, means) for model, means in rates.models.items()),
        ],
        batch=[LearnedBatch(agent, mean) for agent, mean in rates.batch.items()],
        lengths=[
            *(LearnedLength(model, mean) for model, mean in lengths.models.items()),
            *(LearnedLength(m, mean, c) for (c, m), mean in lengths.clients.items()),
        ],
        slots=[
            LearnedSlots(machine.id, name, place.slots.proven, place.slots.failures)
            for machine in mirror.machines.values()
            for name, place in machine.places.items()
            if place.slots.fixed is None and place.slots.is_seen
        ],
    )


def import_learned(learned: Learned, mirror: Mirror, rates: Rates, lengths: Lengths) -> None:
    """Take over the rows; they replace what is known of the same pairs."""
    for row in learned.pairs:
        rates.pairs[row.agent_id, row.model] = _copy(row.means)
    for kin in learned.kin:
        if kin.agent_id:
            rates.agents[kin.agent_id] = _copy(kin.means)
        else:
            rates.models[kin.model] = _copy(kin.means)
    for batch in learned.batch:
        rates.batch[batch.agent_id] = _one(batch.mean)
    for length in learned.lengths:
        if length.client is None:
            lengths.models[length.model] = _one(length.mean)
        else:
            lengths.clients[length.client, length.model] = _one(length.mean)
    for slots in learned.slots:
        mirror.known_slots[slots.agent_id, slots.model] = slots.proven, slots.failures
    mirror.relearn()


def estimates(mirror: Mirror, rates: Rates) -> list[Estimate]:
    """What is predicted of every model on every agent."""
    return [
        _estimate(name, place, rates)
        for machine in mirror.machines.values()
        for name, place in machine.places.items()
    ]


def estimate(mirror: Mirror, rates: Rates, agent_id: AgentId, model: str) -> Estimate | None:
    """What is predicted of this model on this agent; `None` if it does not have it."""
    machine = mirror.machines.get(agent_id)
    place = machine.places.get(model) if machine is not None else None
    return None if place is None else _estimate(model, place, rates)


def _estimate(name: str, place: Place, rates: Rates) -> Estimate:
    return Estimate(
        agent_id=place.machine.id,
        model=name,
        load_seconds=place.load,
        prefill_tokens_per_second=1 / place.prefill,
        decode_tokens_per_second=1 / place.decode,
        slots=place.slots.count,
        slots_told=place.slots.fixed is not None,
        samples=_samples(rates.pairs.get((place.machine.id, place.model))),
    )


def _samples(means: Triple | None) -> tuple[int, int, int]:
    if means is None:
        return (0, 0, 0)
    return (means[0].samples, means[1].samples, means[2].samples)


def _copy(means: Triple) -> Triple:
    return (_one(means[0]), _one(means[1]), _one(means[2]))


def _one(mean: Mean) -> Mean:
    return Mean(mean.value, mean.samples)
