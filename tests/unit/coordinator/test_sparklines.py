"""The points of the sparklines, and what remains of them after a restart."""

import msgspec
import pytest

from ollama_coordinator.journal import SavedSparklines, Sparklines
from ollama_coordinator_common.types import AgentId

A, IDLE = AgentId("a"), AgentId("idle")


def filled() -> Sparklines:
    sparklines = Sparklines()
    for point in range(70):
        sparklines.take(point * 5.0, 10 * point, {A: 5 * point}, (A, IDLE))
    return sparklines


def test_the_last_minutes_are_kept_of_each_agent() -> None:
    sparklines = filled()
    assert sparklines.number == 69
    assert not sparklines.is_due(349.0)
    assert sparklines.is_due(350.0)
    assert list(sparklines.fleet) == [2.0 * point for point in range(10, 70)]
    assert list(sparklines.agents[A]) == [1.0 * point for point in range(10, 70)]
    sparklines.forget(A)
    assert list(sparklines.agents) == [IDLE]


@pytest.mark.spec("DASH-33")
def test_a_restart_goes_on_with_the_same_points_and_a_gap_of_nothing() -> None:
    kept = msgspec.json.decode(msgspec.json.encode(filled().export()), type=SavedSparklines)
    assert list(kept.agents) == [A]
    sparklines = Sparklines()
    sparklines.restore(kept, 349.0 + 3 * 5, {A, IDLE})
    assert list(sparklines.fleet) == [*(2.0 * point for point in range(13, 70)), 0, 0, 0]
    assert list(sparklines.agents[A])[-4:] == [69.0, 0, 0, 0]
    assert not sparklines.is_due(349.0 + 3 * 5)


@pytest.mark.spec("DASH-33")
@pytest.mark.parametrize("at", [349.0 + 60 * 5, 100.0])
def test_points_of_another_time_are_not_taken_over(at: float) -> None:
    sparklines = Sparklines()
    sparklines.restore(filled().export(), at, {A, IDLE})
    assert not sparklines.fleet
    assert not sparklines.agents


@pytest.mark.spec("DASH-33")
def test_points_of_agents_that_are_gone_are_dropped() -> None:
    sparklines = Sparklines()
    sparklines.restore(filled().export(), 349.0, {IDLE})
    assert list(sparklines.fleet) == list(filled().fleet)
    assert not sparklines.agents
