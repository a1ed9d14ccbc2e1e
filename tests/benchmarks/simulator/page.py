"""Who is taken for a batch: a chat page of 30 people behind one address, and a script beside it."""

from collections.abc import Iterator
from random import Random

from msgspec import Struct

from ollama_coordinator.batches import Batches, Opening
from ollama_coordinator.registry import Registry
from ollama_coordinator.scheduler import Scheduler, create_scheduler
from ollama_coordinator.scheduler.types import Form, Kind
from ollama_coordinator.simulation import Simulation, TraceRequest

from .fleet import HOME_CHAT, HOME_SMALL, home_fleet
from .workload import length_of

PEOPLE = 30
SECONDS = 1200.0
SCRIPT = "script"
PAGE = "page"


class Classed(Struct, frozen=True):
    """How many requests an address sent, and how many of them were taken for a batch."""

    requests: int
    batch: int


def classed(seed: int) -> dict[str, Classed]:
    """Play the page and the script on the home fleet, and class them at their real times."""
    asked = sorted([*_page(Random(seed)), *_script(Random(seed))], key=lambda one: one[0].at)

    def create(registry: Registry) -> Scheduler:
        return create_scheduler("predicted", registry, max_queue=100_000)

    replay = Simulation(home_fleet(), create).run([request for request, _ in asked])
    events: list[tuple[float, int, bool]] = []
    for record in replay.records:
        events.append((record.request.at, record.number, True))
        events.append((record.request.at + record.end_seconds, record.number, False))
    batches, found = Batches(), {PAGE: [0, 0], SCRIPT: [0, 0]}
    for at, number, comes in sorted(events, key=lambda event: (event[0], not event[2])):
        request, opening = asked[number]
        read = request.form is Form.STREAM and request.kind is Kind.CHAT
        if comes:
            found[request.client][0] += 1
            found[request.client][1] += batches.arrived(request.client, opening, at, is_read=read)
        else:
            batches.ended(request.client, opening, at, is_read=read, is_whole=True)
    return {name: Classed(*counts) for name, counts in found.items()}


def _page(lots: Random) -> Iterator[tuple[TraceRequest, Opening]]:
    """All open the page within a minute, under one system prompt; each turn has two side calls."""
    for person in range(PEOPLE):
        at, turn, tokens = lots.uniform(0, 60), 0, 250
        while at < SECONDS:
            conversation = (
                Opening(conversation=hash((person, "first"))) if turn else Opening(head=1)
            )
            tokens, output = tokens + length_of(lots, 80), length_of(lots, 200)
            yield _chat(at, HOME_CHAT.name, tokens, output, Form.STREAM), conversation
            tokens, turn, at = tokens + output, turn + 1, at + output / 60 + 1.0
            for task in (2, 3):
                yield _chat(at, HOME_SMALL.name, 600, 30, Form.WHOLE), Opening(head=task)
            at += output / 15 + lots.expovariate(1 / 40.0)


def _chat(at: float, model: str, tokens: int, output: int, form: Form) -> TraceRequest:
    return TraceRequest(
        at=at, model=model, client=PAGE, form=form, prompt_tokens=tokens, output_tokens=output
    )


def _script(lots: Random) -> Iterator[tuple[TraceRequest, Opening]]:
    """A text every half second or so, until all are summarised."""
    at = 300.0
    for _ in range(200):
        at += lots.uniform(0.3, 0.9)
        yield (
            TraceRequest(
                at=at, model=HOME_SMALL.name, client=SCRIPT, kind=Kind.GENERATE, form=Form.WHOLE,
                prompt_tokens=length_of(lots, 400), output_tokens=length_of(lots, 60),
            ),
            Opening(head=4),
        )  # fmt: skip
