"""Rates and output lengths, learned from what ended: decaying means that outliers hardly move.

Of each (agent, model) the logarithm of the rate itself is kept: what is believed before may change.
To judge pairs never seen, its ratio to that is kept for each agent and each model.
"""

from collections import OrderedDict, defaultdict
from math import exp, log

from msgspec import Struct

from ollama_coordinator_common.types import AgentId

from .priors import BATCH_FACTOR, OUTPUT_TOKENS, Quantity

SLOWEST_GAIN = 0.25
KIN_GAIN = 0.1
LONGEST_STEP = 1.5
FIRST_STEP = 6.0
MOST_CLIENTS = 4096
ENOUGH_SAMPLES = 3


class Mean(Struct):
    """A decaying mean of logarithms with its number of samples."""

    value: float = 0.0
    samples: int = 0

    def learn(self, seen: float, slowest: float = SLOWEST_GAIN) -> None:
        """Move towards `seen`: at once at first, then by a quarter, never by more than a step."""
        samples = self.samples = self.samples + 1
        step = LONGEST_STEP if samples > 1 else FIRST_STEP
        away = seen - self.value
        if not -step < away < step:
            away = step if away > 0 else -step
        self.value += away * max(slowest, 1 / samples)


Means = tuple[Mean, Mean, Mean]
"""One for each quantity."""


def _unseen() -> Means:
    return Mean(), Mean(), Mean()


UNSEEN = _unseen()
"""Stands for a pair of which nothing is known; never changed."""


class Rates:
    """What is known of each pair of agent and model, and how far their kin is from the prior."""

    def __init__(self) -> None:
        self.pairs: defaultdict[tuple[AgentId, str], Means] = defaultdict(_unseen)
        self.agents: defaultdict[AgentId, Means] = defaultdict(_unseen)
        self.models: defaultdict[str, Means] = defaultdict(_unseen)
        self.batch: dict[AgentId, Mean] = {}

    def rate(self, quantity: Quantity, agent: AgentId, model: str, prior: float) -> float:
        """What is believed; a pair seen once or twice leans on the prior and on its kin."""
        own = self.pairs.get((agent, model), UNSEEN)[quantity]
        of_agent = self.agents.get(agent, UNSEEN)[quantity]
        of_model = self.models.get(model, UNSEEN)[quantity]
        return _rate(own, of_agent, of_model, prior)

    def leans(self, agent: AgentId, model: str) -> bool:
        """Whether what is known of other pairs changes what is believed of this one."""
        return any(own.samples < ENOUGH_SAMPLES for own in self.pairs.get((agent, model), UNSEEN))

    def observe(
        self, quantity: Quantity, agent: AgentId, model: str, seen: float, prior: float
    ) -> float:
        """So much was measured where `prior` was believed at first: what `rate` is now."""
        if not 0 < seen < float("inf"):
            return self.rate(quantity, agent, model, prior)
        own, believed = self.pairs[agent, model][quantity], log(prior)
        of_agent, of_model = self.agents[agent][quantity], self.models[model][quantity]
        away = log(seen) - believed
        of_agent.learn(away - of_model.value, KIN_GAIN)
        of_model.learn(away - of_agent.value, KIN_GAIN)
        if not own.samples:
            own.value = believed
        own.learn(believed + away)
        return _rate(own, of_agent, of_model, prior)

    def batch_factor(self, agent: AgentId) -> float:
        """How much slower one more request in the same runner makes each of them."""
        mean = self.batch.get(agent)
        if mean is None:
            return BATCH_FACTOR
        return (BATCH_FACTOR * 2 + mean.value * mean.samples) / (2 + mean.samples)

    def observe_batch(self, agent: AgentId, factor: float) -> None:
        """A request among others was slowed by `factor` for each of the others."""
        mean = self.batch.setdefault(agent, Mean())
        mean.learn(min(max(factor, 0.0), 1.5), KIN_GAIN)
        mean.samples = min(mean.samples, 20)

    def forget(self, agent: AgentId) -> None:
        """The agent is gone for good."""
        self.agents.pop(agent, None)
        self.batch.pop(agent, None)
        for pair in [pair for pair in self.pairs if pair[0] == agent]:
            del self.pairs[pair]


def _rate(own: Mean, of_agent: Mean, of_model: Mean, prior: float) -> float:
    """That of a pair seen often enough; else what its kin tells counts as half a sample."""
    if own.samples >= ENOUGH_SAMPLES:
        return exp(own.value)
    lean = of_model.samples / (of_model.samples + ENOUGH_SAMPLES)
    kin = log(prior) + of_agent.value + of_model.value * lean
    return exp((own.value * own.samples + kin * 0.5) / (own.samples + 0.5))


class Lengths:
    """How long answers are, by client and model; the least recently used clients are forgotten."""

    def __init__(self) -> None:
        self.models: dict[str, Mean] = {}
        self.clients: OrderedDict[tuple[str, str], Mean] = OrderedDict()

    def expected(self, client: str, model: str, limit: int | None) -> float:
        """The tokens an answer will probably have."""
        of_model = self.models.get(model)
        length = of_model.value if of_model is not None else OUTPUT_TOKENS
        own = self.clients.get((client, model))
        if own is not None:
            lean = max(ENOUGH_SAMPLES - own.samples, 0)
            length = (own.value * own.samples + length * lean) / (own.samples + lean)
        return length if limit is None or limit < 0 else min(length, limit)

    def observe(self, client: str, model: str, tokens: int) -> None:
        """An answer had so many tokens."""
        _learn_length(self.models.setdefault(model, Mean()), tokens, slowest=0.02)
        own = self.clients.setdefault((client, model), Mean())
        _learn_length(own, tokens, slowest=0.1)
        self.clients.move_to_end((client, model))
        if len(self.clients) > MOST_CLIENTS:
            self.clients.popitem(last=False)


def _learn_length(mean: Mean, tokens: int, *, slowest: float) -> None:
    """Lengths are averaged as they are: a wait is a sum of lengths, not of their logarithms."""
    gain = max(slowest, 1 / (mean.samples + 1))
    most = mean.value * 4 + OUTPUT_TOKENS if mean.samples else float("inf")
    mean.value += gain * (min(tokens, most) - mean.value)
    mean.samples += 1
