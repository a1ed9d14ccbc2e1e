"""What the live comparison's clients send, and what it makes of what they see."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from benchmarks.simulator.fleet import mixed_fleet
from benchmarks.simulator.workload import make_trace
from benchmarks.traffic.clients import ClientRecord, Target
from benchmarks.traffic.dialects import TOKEN, Dialect
from benchmarks.traffic.figures import Figures, by_trace, figures, table
from benchmarks.traffic.fleet import RunningFleet
from benchmarks.traffic.machines import LENGTH, WORDS, answer, stand_in
from benchmarks.traffic.run import Conditions, run
from benchmarks.traffic.writer import Writer
from ollama_coordinator.api.http.dialects import INFERENCE_ROUTES
from ollama_coordinator.api.inference.request import read_routing
from ollama_coordinator.scheduler import Kind, Lane
from ollama_coordinator.simulation import TraceRequest
from support.ollama import Model, Request

TRACE = make_trace(mixed_fleet(), 0.7, 120.0, 1)
LONGEST_TURN = max(TRACE, key=lambda request: len(request.prefix))


@pytest.mark.parametrize("request_", TRACE[:40], ids=lambda request: request.kind.value)
def test_a_prompt_has_as_many_tokens_as_the_trace_says(request_: TraceRequest) -> None:
    path, body = Writer(TRACE, Dialect.OLLAMA).ask(request_)
    route = next(one for one in INFERENCE_ROUTES if one.path == path)
    routing = read_routing(route, msgspec.json.encode(body))
    per_message = 3
    most = per_message * (2 * len(request_.prefix) + 1)
    assert abs(routing.prompt_tokens - request_.prompt_tokens) <= most
    assert routing.output_limit is None


def test_an_answer_that_was_heard_is_in_the_next_turn() -> None:
    writer = Writer(TRACE, Dialect.OLLAMA)
    last = TraceRequest(**{**_fields(LONGEST_TURN), "prefix": LONGEST_TURN.prefix[:-1]})
    before = writer.ask(last)[1]["messages"]
    said = b'{"message":{"content":"as"}}\n{"message":{"content":" ever"},"done":true}\n'
    writer.heard(last, said)
    messages = writer.ask(LONGEST_TURN)[1]["messages"]
    assert messages[: len(before)] == before
    assert messages[len(before)] == {"role": "assistant", "content": "as ever"}


def test_a_message_says_how_long_its_answer_is_to_be() -> None:
    for dialect in Dialect:
        _, body = Writer(TRACE, dialect).ask(LONGEST_TURN)
        found = LENGTH.search(body["messages"][-1]["content"])
        assert found is not None
        assert int(found[1]) == LONGEST_TURN.output_tokens


@pytest.mark.parametrize("tokens_per_line", range(1, len(WORDS)))
def test_no_line_of_an_answer_repeats_the_one_before(tokens_per_line: int) -> None:
    """A proxy may end an answer that does: its tokens would be missing, and its times too good."""
    said = answer(Request(Model("m"), "", last_user="=300=")).content
    assert {len(token) for token in said} == {4}
    lines = ["".join(said[n : n + tokens_per_line]) for n in range(0, 300, tokens_per_line)]
    assert all(one != other for one, other in pairwise(lines))


async def test_turns_grow_as_the_trace_says() -> None:
    turns = [one for one in TRACE if one.prefix[:2] == LONGEST_TURN.prefix[:2]]
    big = mixed_fleet().machines[0]
    writer = Writer(TRACE, Dialect.OLLAMA)
    async with stand_in(big, 1000.0, 12) as machine, aiohttp.ClientSession() as http:
        for turn in turns:
            path, body = writer.ask(turn)
            async with http.post(machine.url + path, json=body) as response:
                heard = await response.read()
            last = msgspec.json.decode(heard.splitlines()[-1])
            assert last["eval_count"] == turn.output_tokens
            assert abs(last["prompt_eval_count"] - turn.prompt_tokens) <= 6 * len(turn.prefix)
            writer.heard(turn, heard)


def _fields(request: TraceRequest) -> dict[str, Any]:
    return {name: getattr(request, name) for name in request.__struct_fields__}


@pytest.mark.parametrize(
    ("line", "is_token"),
    [
        (b'{"message":{"role":"assistant","content":"So"}}', True),
        (b'{"response":"So","done":false}', True),
        (b'{"embeddings":[[0.1]]}', True),
        (b'data: {"choices":[{"delta":{"content":"So"}}]}', True),
        (b'data: {"data":[{"object":"embedding","embedding":[0.1]}]}', True),
        (b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}', False),
        (b": ping", False),
        (b'{"error":"no such model"}', False),
    ],
)
def test_a_first_token_is_told_from_a_sign_of_life(line: bytes, *, is_token: bool) -> None:
    assert bool(TOKEN.search(line)) is is_token


def test_what_came_in_the_warm_up_is_not_counted_and_who_got_nothing_waited_longest() -> None:
    def record(at: float, seconds: float | None, lane: Lane = Lane.INTERACTIVE) -> ClientRecord:
        return ClientRecord(TraceRequest(at=at, model="m", lane=lane), first_token=seconds)

    everything = [
        record(5, 99.0),
        record(10, 1.0),
        record(20, None),
        record(30, 7.0, Lane.BATCH),
    ]
    everything[2].gave_up = True
    found = figures(everything, after=10, loads=2, seconds=60, lag_seconds=0.01)
    assert (found.requests, found.mean, found.in_time) == (3, 60.5, 0.5)
    assert (found.loads_per_hour, found.batch_p95, found.gave_up) == (120, 7.0, 1)
    assert "| 60.50 |" in table([("one", [found])])


def test_a_run_whose_clients_were_late_is_marked() -> None:
    late = figures([], after=0, loads=0, seconds=60, lag_seconds=0.06)
    assert "INVALID" in table([("one", [late])])


def test_systems_are_compared_on_each_trace() -> None:
    def p95(seconds: float) -> Figures:
        record = ClientRecord(TraceRequest(at=0, model="m"), first_token=seconds)
        return figures([record], after=0, loads=0, seconds=60, lag_seconds=0)

    page = by_trace((1, 2), [("one", [p95(3.0), p95(4.0)]), ("other", [p95(9.0), p95(8.0)])])
    assert page.splitlines()[2:] == [
        "| one | 3.0 | 4.0 | 4.0 |",
        "| other | 9.0 | 8.0 | 9.0 |",
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="the machines are asked to end by a signal")
async def test_every_request_of_a_trace_reaches_a_machine_and_is_answered() -> None:
    @asynccontextmanager
    async def first_machine(folder: Path, fleet: RunningFleet) -> AsyncIterator[Target]:
        yield Target(fleet.machines[0].url)

    conditions = Conditions(load=0.3, seconds=20.0, warm_up=0.0, speed=20.0, max_loaded=12)
    counted, records = await run(first_machine, 1, conditions, asyncio.Lock())
    assert counted.errors == 0
    assert counted.requests == len(records) > 0
    assert counted.loads_per_hour > 0
    kinds = {one.request.kind for one in records if one.first_token is not None}
    assert Kind.CHAT in kinds
