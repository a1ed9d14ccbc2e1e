"""A home's load: a chat page, RAG, a coding agent, scripts and a nightly job, in bursts.

Behind each turn of a chat its page asks twice more, unstreamed: for a title and for tags. All
people of the page have one address.
"""

from collections.abc import Callable
from itertools import count
from random import Random

from ollama_coordinator.scheduler.types import Form, Kind, Lane
from ollama_coordinator.simulation import Fleet, TraceRequest

from .fleet import HOME_CHAT, HOME_CODER, HOME_EMBEDDER, HOME_SMALL, HOME_TINY
from .workload import arrivals, length_of, scaled

PAGE = "page"
READING_TOKENS_PER_SECOND = 15.0
SHARES = {"chat": 0.50, "rag": 0.16, "agent": 0.04, "script": 0.24, "batch": 0.06}
"""Of the arrivals that start something."""


def make_home_trace(fleet: Fleet, load: float, seconds: float, seed: int) -> list[TraceRequest]:
    """A trace whose work is this share of what the fleet could do with all models in memory."""
    return scaled(fleet, load, seconds, lambda rate: _draw(seconds, seed, rate))


def _draw(seconds: float, seed: int, rate: float) -> list[TraceRequest]:
    lots, numbers = Random(seed), count(1)
    starts: dict[str, Callable[[Random, float, int], list[TraceRequest]]] = {
        "chat": _chat, "rag": _rag, "agent": _agent, "script": _script, "batch": _batch,
    }  # fmt: skip
    trace: list[TraceRequest] = []
    for at in arrivals(lots, rate, seconds):
        kind = lots.choices(list(SHARES), list(SHARES.values()))[0]
        trace += starts[kind](lots, at, next(numbers))
    return sorted((one for one in trace if one.at < seconds), key=lambda request: request.at)


def _chat(lots: Random, at: float, number: int) -> list[TraceRequest]:
    """One to six turns, read before the next; each prompt holds everything said before."""
    model = lots.choices((HOME_CHAT, HOME_SMALL, HOME_CODER), (0.75, 0.15, 0.10))[0]
    tokens, links, turns = 250, [hash((model.name, "page"))], []
    for turn in range(lots.randint(1, 6)):
        tokens += length_of(lots, 80)
        output = length_of(lots, 280)
        links.append(hash((number, turn)))
        turns.append(
            TraceRequest(
                at=at, model=model.name, client=PAGE, prompt_tokens=tokens,
                output_tokens=output, prefix=tuple(links),
            )
        )  # fmt: skip
        tokens += output
        at += output / 40 + 1.0
        turns += [
            TraceRequest(
                at=at, model=model.name, client=PAGE, form=Form.WHOLE,
                prompt_tokens=min(tokens, 1500) + 200, output_tokens=lots.randint(12, 60),
                prefix=(hash((number, turn, task)),),
            )
            for task in ("title", "tags")
        ]  # fmt: skip
        at += output / READING_TOKENS_PER_SECOND + lots.expovariate(1 / 15.0)
    return turns


def _rag(lots: Random, at: float, number: int) -> list[TraceRequest]:
    """Some pieces of text are embedded; an answer from what was found follows."""
    pieces = [
        TraceRequest(
            at=at, model=HOME_EMBEDDER.name, client=PAGE, kind=Kind.EMBED, lane=Lane.EMBEDDING,
            form=Form.WHOLE, prompt_tokens=length_of(lots, 300),
        )
        for _ in range(lots.randint(1, 12))
    ]  # fmt: skip
    answer = TraceRequest(
        at=at + 1.5, model=HOME_CHAT.name, client=PAGE, prompt_tokens=length_of(lots, 3000),
        output_tokens=length_of(lots, 220), prefix=(hash((number, "rag")),),
    )  # fmt: skip
    return [*pieces, answer]


def _agent(lots: Random, at: float, number: int) -> list[TraceRequest]:
    """A coding agent: call upon call over a context that grows, answers short and with tools."""
    tokens, links, calls = length_of(lots, 9000, 0.4), [hash((number, "agent"))], []
    for call in range(lots.randint(6, 20)):
        output = length_of(lots, 140)
        links.append(hash((number, call)))
        calls.append(
            TraceRequest(
                at=at, model=HOME_CODER.name, client="agent", form=Form.TOOLS,
                prompt_tokens=tokens, output_tokens=output, prefix=tuple(links),
            )
        )  # fmt: skip
        tokens += output + length_of(lots, 600)
        at += output / 25 + 3.0 + lots.expovariate(1 / 4.0)
    return calls


def _script(lots: Random, at: float, number: int) -> list[TraceRequest]:
    """One question of a script, answered in one piece or as structured output."""
    model = lots.choices((HOME_SMALL, HOME_TINY, HOME_CHAT), (0.4, 0.35, 0.25))[0]
    return [
        TraceRequest(
            at=at, model=model.name, client=f"script-{lots.randrange(4)}", kind=Kind.GENERATE,
            form=lots.choice((Form.WHOLE, Form.FORMAT)), prompt_tokens=length_of(lots, 500),
            output_tokens=length_of(lots, 120), prefix=(hash((number, "script")),),
        )
    ]  # fmt: skip


def _batch(lots: Random, at: float, number: int) -> list[TraceRequest]:
    """A handful of texts to be summarised by whenever."""
    model = lots.choice((HOME_CHAT, HOME_SMALL))
    return [
        TraceRequest(
            at=at, model=model.name, client="nightly", kind=Kind.GENERATE, lane=Lane.BATCH,
            form=Form.WHOLE, prompt_tokens=length_of(lots, 900),
            output_tokens=length_of(lots, 200), prefix=(hash((number, index)),),
        )
        for index in range(lots.randint(2, 8))
    ]  # fmt: skip
