"""The mixed load: chats of several turns, agents and RAG, batch, embeddings; in bursts."""

from collections.abc import Callable, Iterator
from itertools import count
from math import log
from random import Random

from msgspec import Struct, structs

from ollama_coordinator.scheduler.types import Form, Kind, Lane
from ollama_coordinator.simulation import Fleet, MachineSpec, ModelSpec, TraceRequest

from .fleet import EMBEDDERS, HOME_MODELS, MODELS

ZIPF_EXPONENT = 1.1
BURST_EVERY_SECONDS = 60.0
BURST_SECONDS = 10.0
BURST_FACTOR = 3.0
CLIENTS = 40
PIECES = 100


class Mix(Struct, frozen=True):
    """Shares of the arrivals that start something; a chat goes on for several turns.

    `unstreamed`: the share of requests of chats that are short and come in one piece. Where there
    are any, batch comes in one piece too.
    """

    chat: float = 0.40
    rag: float = 0.20
    batch: float = 0.10
    embedding: float = 0.30
    unstreamed: float = 0.0


def make_trace(
    fleet: Fleet, load: float, seconds: float, seed: int, mix: Mix | None = None
) -> list[TraceRequest]:
    """A trace whose work is this share of what the fleet could do with all models in memory."""
    return scaled(fleet, load, seconds, lambda rate: _draw(seconds, seed, mix or Mix(), rate))


def scaled(
    fleet: Fleet, load: float, seconds: float, draw: Callable[[float], list[TraceRequest]]
) -> list[TraceRequest]:
    """What is drawn at the rate of arrivals a second that makes for this load."""
    work = offered(fleet, draw(4.0)) / seconds
    return draw(4.0 * load / work)


def offered(fleet: Fleet, trace: list[TraceRequest]) -> float:
    """The seconds that the busiest machine needs for a trace when work is spread as well as can be.

    No loads, no waits, full batches: what no scheduler can beat. Models that few machines hold are
    placed first, each in small pieces where the machine ends up least busy.
    """
    by_name = {model.name: model for model in MODELS + EMBEDDERS + HOME_MODELS}
    work: dict[str, list[TraceRequest]] = {}
    for request in trace:
        work.setdefault(request.model, []).append(request)
    busy = dict.fromkeys((machine.name for machine in fleet.machines), 0.0)
    holders = {
        name: [machine for machine in fleet.machines if by_name[name] in machine.models]
        for name in work
    }
    for name in sorted(work, key=lambda name: (len(holders[name]), name)):
        costs = {
            machine.name: _seconds(machine, by_name[name], work[name]) / PIECES
            for machine in holders[name]
        }
        for _ in range(PIECES):
            least = min(costs, key=lambda name: busy[name] + costs[name])
            busy[least] += costs[least]
    return max(busy.values())


def _seconds(machine: MachineSpec, model: ModelSpec, requests: list[TraceRequest]) -> float:
    """What one machine alone needs for all of them, with full batches."""
    alone = sum(
        machine.prefill_seconds(model, request.prompt_tokens)
        + machine.decode_seconds(model, request.output_tokens)
        for request in requests
    )
    return alone / _gain(1 if model.embeds else machine.slots, machine.batch_factor)


def _gain(slots: int, batch_factor: float) -> float:
    return slots / (1 + batch_factor * (slots - 1))


def _draw(seconds: float, seed: int, mix: Mix, rate: float) -> list[TraceRequest]:
    lots = Random(seed)
    numbers = count(1)
    trace: list[TraceRequest] = []
    for at in arrivals(lots, rate, seconds):
        kind = lots.choices(
            (_chat, _rag, _batch, _embedding), (mix.chat, mix.rag, mix.batch, mix.embedding)
        )[0]
        trace += kind(lots, at, next(numbers), seconds)
    trace.sort(key=lambda request: request.at)
    return _unstreamed(trace, mix.unstreamed, Random(seed)) if mix.unstreamed else trace


def _unstreamed(trace: list[TraceRequest], share: float, lots: Random) -> list[TraceRequest]:
    """The same load with a share of the chats' requests short and in one piece, and all batch."""
    changed = []
    for request in trace:
        if request.lane is Lane.BATCH:
            request = structs.replace(request, form=Form.WHOLE)
        elif request.kind is Kind.CHAT and lots.random() < share:
            tokens = lots.randint(20, 60)
            request = structs.replace(request, form=Form.WHOLE, output_tokens=tokens)
        changed.append(request)
    return changed


def arrivals(lots: Random, rate: float, seconds: float) -> Iterator[float]:
    """Poisson, three times as dense in a burst of ten seconds about once a minute."""
    mean_factor = 1 + (BURST_FACTOR - 1) * BURST_SECONDS / BURST_EVERY_SECONDS
    at, calm = 0.0, rate / mean_factor
    bursts = lots.uniform(0, BURST_EVERY_SECONDS)
    while at < seconds:
        dense = (at + bursts) % BURST_EVERY_SECONDS < BURST_SECONDS
        at += lots.expovariate(calm * (BURST_FACTOR if dense else 1.0))
        yield at


def _model(lots: Random) -> ModelSpec:
    weights = [1 / (rank + 1) ** ZIPF_EXPONENT for rank in range(len(MODELS))]
    return lots.choices(MODELS, weights)[0]


def length_of(lots: Random, mean: float, spread: float = 0.7) -> int:
    return max(1, int(lots.lognormvariate(log(mean) - spread**2 / 2, spread)))


def _client(lots: Random) -> str:
    return f"client-{lots.randrange(CLIENTS)}"


def _chat(lots: Random, at: float, number: int, seconds: float) -> list[TraceRequest]:
    """Two to eight turns; each prompt holds everything said before."""
    model, client = _model(lots), _client(lots)
    tokens, links, turns = 150, [hash((model.name, "system"))], []
    for turn in range(lots.randint(2, 8)):
        tokens += length_of(lots, 80)
        output = length_of(lots, 220)
        links.append(hash((number, turn)))
        turns.append(
            TraceRequest(
                at=at, model=model.name, client=client, prompt_tokens=tokens,
                output_tokens=output, prefix=tuple(links),
            )
        )  # fmt: skip
        tokens += output
        at += output / 60 + lots.expovariate(1 / 20.0)
    return [turn for turn in turns if turn.at < seconds]


def _rag(lots: Random, at: float, number: int, seconds: float) -> list[TraceRequest]:
    return [
        TraceRequest(
            at=at, model=_model(lots).name, client=_client(lots),
            prompt_tokens=length_of(lots, 2500), output_tokens=length_of(lots, 200),
            prefix=(hash((number, "rag")),),
        )
    ]  # fmt: skip


def _batch(lots: Random, at: float, number: int, seconds: float) -> list[TraceRequest]:
    """A handful at once."""
    model, client = _model(lots), _client(lots)
    return [
        TraceRequest(
            at=at, model=model.name, client=client, kind=Kind.GENERATE, lane=Lane.BATCH,
            prompt_tokens=length_of(lots, 700), output_tokens=length_of(lots, 250),
            prefix=(hash((number, index)),),
        )
        for index in range(lots.randint(1, 6))
    ]  # fmt: skip


def _embedding(lots: Random, at: float, number: int, seconds: float) -> list[TraceRequest]:
    model = EMBEDDERS[0] if lots.random() < 0.8 else EMBEDDERS[1]
    return [
        TraceRequest(
            at=at, model=model.name, client=_client(lots), kind=Kind.EMBED,
            lane=Lane.EMBEDDING, prompt_tokens=length_of(lots, 400),
        )
    ]  # fmt: skip
