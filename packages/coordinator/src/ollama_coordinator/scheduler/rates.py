"""Rates and output lengths, learned from answers: decaying means that outliers hardly move.

Of each (agent, model) the logarithm of the rate itself is kept, as the prior may change. For pairs
never seen, each agent and each model keeps a factor: the logarithm of its ratio to the prior.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from enum import IntEnum
from functools import lru_cache
from math import exp, log
from typing import NamedTuple

from msgspec import Struct

from ollama_coordinator_common.types import AgentId

from .types import Form, Request

TYPICAL_BYTES = 4_900_000_000  # an 8B model in 4 bits: the size at which the rates below are stated
# A machine with a middle GPU and an SSD, until three answers replace them:
PREFILL_TOKENS_PER_SECOND = 800.0
DECODE_BYTES_PER_SECOND = 150e9
LOAD_OVERHEAD_SECONDS = 1.0
LOAD_BYTES_PER_SECOND = 1.5e9
# Ollama waits for the GPU to report its memory free before it loads the next model.
UNLOAD_SECONDS = 0.6
OUTPUT_TOKENS = 150.0  # the length of an answer before any was seen: a paragraph
# How much one more request slows each other one: batches on GPUs cost 0.2 to 0.6.
BATCH_FACTOR = 0.4
# `BATCH_FACTOR` counts as two observations; an outlier as 1.5, all as twenty at most:
BATCH_PRIOR_SAMPLES = 2
BATCH_MOST = 1.5
BATCH_MOST_SAMPLES = 20
# Reading is arithmetic, where a CPU is farther behind; writing is memory, where it is less so:
WITHOUT_GPU_PREFILL = 1 / 15
WITHOUT_GPU_DECODE = 1 / 5
SPILL_FACTOR = 8.0  # a model outside the GPU is so much slower: memory of 50 beside 400 GB/s
# The newest of some four answers count: a lasting change is learned within a dozen requests.
SLOWEST_GAIN = 0.25
FACTOR_GAIN = 0.1  # factors stand for many models or agents, and so move more slowly
# In logarithms: one answer is at most 4.5 times off the mean, the first one 400 times:
LONGEST_STEP = 1.5
FIRST_STEP = 6.0
MOST_CLIENTS = 4096  # clients whose output lengths are kept, some 1 MB; an address costs one
# From so many on a mean stands for itself; before, it leans on what is known of others.
ENOUGH_SAMPLES = 3
# Prior and factors count as half a sample: the first own answer has two thirds of the weight.
FACTOR_WEIGHT = 0.5
# Lengths scatter by themselves: a mean of fifty answers of a model, of ten of a client:
LENGTH_GAIN_MODEL = 0.02
LENGTH_GAIN_CLIENT = 0.1
# One answer counts as at most so many times the mean, and `OUTPUT_TOKENS` more.
LENGTH_MOST_FACTOR = 4


class Quantity(IntEnum):
    """What is learned of a model on an agent."""

    PREFILL = 0
    DECODE = 1
    LOAD = 2


def prior(quantity: Quantity, size: int, *, has_gpu: bool = True) -> float:
    """Tokens per second read or written, or the seconds of a load, for weights of `size` bytes."""
    weight = size if size > 0 else TYPICAL_BYTES
    if quantity is Quantity.PREFILL:
        rate = PREFILL_TOKENS_PER_SECOND * TYPICAL_BYTES / weight
        return rate if has_gpu else rate * WITHOUT_GPU_PREFILL
    if quantity is Quantity.DECODE:
        rate = DECODE_BYTES_PER_SECOND / weight
        return rate if has_gpu else rate * WITHOUT_GPU_DECODE
    return LOAD_OVERHEAD_SECONDS + weight / LOAD_BYTES_PER_SECOND


class Priors(NamedTuple):
    """The prior of each `Quantity`, which is the index, and their logarithms."""

    values: tuple[float, float, float]
    logs: tuple[float, float, float]


@lru_cache(maxsize=4096)
def priors(size: int, *, has_gpu: bool, outside: float) -> Priors:
    """Those of weights of `size` bytes on a machine where so much of the model is outside the GPU.

    It is slower by that share.
    """
    prefill, decode, load = (prior(quantity, size, has_gpu=has_gpu) for quantity in Quantity)
    slower = 1 + SPILL_FACTOR * outside
    values = (prefill / slower, decode / slower, load)
    return Priors(values, (log(values[0]), log(values[1]), log(load)))


class Mean(Struct):
    """A decaying mean with its number of samples."""

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
"""Logarithms, one for each `Quantity`, which is the index."""


def _unseen() -> Means:
    return Mean(), Mean(), Mean()


UNSEEN = _unseen()
"""Stands for a pair of which nothing is known; never changed."""


class Rates:
    """The rates of each (agent, model), the factors of agents and models, the batch factors."""

    def __init__(self) -> None:
        self.pairs: defaultdict[tuple[AgentId, str], Means] = defaultdict(_unseen)
        self.agents: defaultdict[AgentId, Means] = defaultdict(_unseen)
        self.models: defaultdict[str, Means] = defaultdict(_unseen)
        self.batches: dict[AgentId, Mean] = {}

    def rate(self, quantity: Quantity, agent: AgentId, model: str, prior: float) -> float:
        """Tokens per second, or seconds of a load; a pair seen seldom leans on the factors."""
        own = self.pairs.get((agent, model), UNSEEN)[quantity]
        of_agent = self.agents.get(agent, UNSEEN)[quantity]
        of_model = self.models.get(model, UNSEEN)[quantity]
        return _rate(own, of_agent, of_model, log(prior))

    def all(self, agent: AgentId, model: str, assumed: Iterable[float]) -> list[float]:
        """The rates of every quantity, given the logarithm of each prior."""
        own = self.pairs.get((agent, model), UNSEEN)
        of_agent, of_model = self.agents.get(agent, UNSEEN), self.models.get(model, UNSEEN)
        return list(map(_rate, own, of_agent, of_model, assumed))

    def leans(self, agent: AgentId, model: str) -> bool:
        """Whether the factors change the rates of this pair."""
        own = self.pairs.get((agent, model))
        return own is None or any(mean.samples < ENOUGH_SAMPLES for mean in own)

    def observe(
        self, quantity: Quantity, agent: AgentId, model: str, seen: float, prior: float
    ) -> float:
        """So much was measured where `prior` was assumed at first: what `rate` is now."""
        if not 0 < seen < float("inf"):
            return self.rate(quantity, agent, model, prior)
        own, assumed = self.pairs[agent, model][quantity], log(prior)
        of_agent, of_model = self.agents[agent][quantity], self.models[model][quantity]
        away = log(seen) - assumed
        of_agent.learn(away - of_model.value, FACTOR_GAIN)
        of_model.learn(away - of_agent.value, FACTOR_GAIN)
        if not own.samples:
            own.value = assumed
        own.learn(assumed + away)
        return _rate(own, of_agent, of_model, assumed)

    def batch_factor(self, agent: AgentId) -> float:
        """How much one more request in the same runner slows each of the others."""
        mean = self.batches.get(agent)
        if mean is None:
            return BATCH_FACTOR
        weighted = BATCH_FACTOR * BATCH_PRIOR_SAMPLES + mean.value * mean.samples
        return weighted / (BATCH_PRIOR_SAMPLES + mean.samples)

    def observe_batch(self, agent: AgentId, factor: float) -> None:
        """A request was slowed by `factor` for each of the others beside it."""
        mean = self.batches.setdefault(agent, Mean())
        mean.learn(min(max(factor, 0.0), BATCH_MOST), FACTOR_GAIN)
        mean.samples = min(mean.samples, BATCH_MOST_SAMPLES)

    def forget(self, agent: AgentId) -> None:
        """The agent was removed."""
        self.agents.pop(agent, None)
        self.batches.pop(agent, None)
        for pair in [pair for pair in self.pairs if pair[0] == agent]:
            del self.pairs[pair]


def _rate(own: Mean, of_agent: Mean, of_model: Mean, assumed: float) -> float:
    """The rate of a pair seen often enough; else prior and factors count as half a sample.

    A model's factor counts fully only once some agents have measured it. `assumed` is the prior's
    logarithm.
    """
    samples = own.samples
    if samples >= ENOUGH_SAMPLES:
        return exp(own.value)
    by_model = of_model.samples
    others = assumed + of_agent.value + of_model.value * (by_model / (by_model + ENOUGH_SAMPLES))
    if not samples:
        return exp(others)
    return exp((own.value * samples + others * FACTOR_WEIGHT) / (samples + FACTOR_WEIGHT))


class OutputLengths:
    """How long answers are, by model, form and client.

    A chat page asks for answers of 200 tokens, and unstreamed for titles of 20 behind each. The
    least recently used clients are forgotten.
    """

    def __init__(self) -> None:
        self.models: dict[tuple[str, Form], Mean] = {}
        self.clients: OrderedDict[tuple[str, str, Form], Mean] = OrderedDict()

    def expected(self, request: Request) -> float:
        """The expected tokens of the answer."""
        client, model, form = request.client, request.model, request.form
        of_model, limit = self.models.get((model, form)), request.output_limit
        length = of_model.value if of_model is not None else OUTPUT_TOKENS
        own = self.clients.get((client, model, form))
        if own is not None:
            lean = max(ENOUGH_SAMPLES - own.samples, 0)
            length = (own.value * own.samples + length * lean) / (own.samples + lean)
        return length if limit is None or limit < 0 else min(length, limit)

    def observe(self, request: Request, tokens: int) -> None:
        """The answer had so many tokens."""
        model, form = request.model, request.form
        _learn_length(self.models.setdefault((model, form), Mean()), tokens, LENGTH_GAIN_MODEL)
        own = self.clients.setdefault((request.client, model, form), Mean())
        _learn_length(own, tokens, LENGTH_GAIN_CLIENT)
        self.clients.move_to_end((request.client, model, form))
        if len(self.clients) > MOST_CLIENTS:
            self.clients.popitem(last=False)


def _learn_length(mean: Mean, tokens: int, slowest: float) -> None:
    """Lengths are averaged as they are: a wait is a sum of lengths, not of their logarithms."""
    gain = max(slowest, 1 / (mean.samples + 1))
    most = mean.value * LENGTH_MOST_FACTOR + OUTPUT_TOKENS if mean.samples else float("inf")
    mean.value += gain * (min(tokens, most) - mean.value)
    mean.samples += 1
