"""The simulated node: what it does as Ollama does."""

import pytest

from ollama_coordinator.scheduler import RunnerOptions
from ollama_coordinator.simulation import MachineSpec, ModelSpec, TraceRequest
from ollama_coordinator.simulation.node import Job, Node

GB = 1_000_000_000
A, B, X = (ModelSpec(name, 6 * GB) for name in "abx")
SPEC = MachineSpec(name="s", models=(A, B, X), memory_bytes=22 * GB, slots=1)


def sent(node: Node, model: ModelSpec, tokens: int, at: float) -> Job:
    request = TraceRequest(at=at, model=model.name, prompt_tokens=10, output_tokens=tokens)
    job = Job(0, request, sent_at=at, options=RunnerOptions())
    node.send(model.key, job, at)
    return job


def node_with(*models: ModelSpec) -> Node:
    node = Node(SPEC)
    for number, model in enumerate(models):
        sent(node, model, 10, number * 60.0)
        node.advance((number + 1) * 60.0)
    return node


@pytest.mark.spec("SCHED-73")
def test_when_nobody_is_idle_one_model_is_waited_for_whoever_else_becomes_idle() -> None:
    node = node_with(A, B)
    long, short = sent(node, A, 1000, 120.0), sent(node, B, 100, 120.0)
    waiting = sent(node, X, 10, 121.0)
    node.advance(600.0)
    assert long.ended_at is not None
    assert short.ended_at is not None
    assert waiting.ready_at is not None
    assert short.ended_at < long.ended_at < waiting.ready_at
    assert set(node.runners) == {B.key, X.key}


@pytest.mark.spec("SCHED-73")
def test_who_was_waited_for_stays_when_the_request_is_gone() -> None:
    node = node_with(A, B)
    sent(node, A, 100_000, 120.0)
    sent(node, B, 100, 120.0)
    left = sent(node, X, 10, 121.0)
    node.cancel(left, 125.0)
    node.advance(300.0)
    later = sent(node, X, 10, 300.0)
    node.advance(330.0)
    assert later.first_token_at is not None
    assert set(node.runners) == {A.key, X.key}
