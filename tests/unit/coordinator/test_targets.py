"""Placements: read, and applied to agents."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from ollama_coordinator import operations
from ollama_coordinator.operations import Placement, WrongPlacement, choose
from ollama_coordinator.registry import AgentSettings, AgentState
from ollama_coordinator_common.protocol import HealthReport, RegisterRequest
from ollama_coordinator_common.types import AgentId

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def _agent(name: str, *, labels: list[str] | None = None, free: int | None = None) -> AgentState:
    registration = RegisterRequest(name, "127.0.0.1", "0.33.0", 11434)
    agent = AgentState(AgentId(f"id-{name}"), registration, registered_at=NOW, heard_at=0.0)
    agent.settings = AgentSettings(labels=labels or [])
    if free is not None:
        agent.report = HealthReport(agent.id, 0, 0, 0, disk_free_bytes=free)
    return agent


def _named(agents: object) -> list[str]:
    return [agent.name for agent in agents]  # type: ignore[attr-defined]


@pytest.mark.spec("SURFACE-16")
@pytest.mark.parametrize("text", ["all", "2", "label:gpu", "agents:a,b"])
def test_a_placement_is_written_as_it_is_read(text: str) -> None:
    assert Placement.parse(text).text == text


@pytest.mark.spec("SURFACE-16")
@pytest.mark.parametrize("text", ["0", "-1", "some", "label:", "agents:,", "2.5", "²", "9" * 40])
def test_a_text_that_is_no_placement_is_refused_with_what_is_expected(text: str) -> None:
    with pytest.raises(WrongPlacement, match="a number of agents"):
        Placement.parse(text)


@pytest.mark.spec("SURFACE-16")
def test_a_number_keeps_the_holders_and_fills_up_where_the_most_disk_is_free() -> None:
    holder, full, roomy, away = (
        _agent("holder"), _agent("full", free=10), _agent("roomy", free=99), _agent("away"),
    )  # fmt: skip
    everybody = [away, full, holder, roomy]
    reachable = [full, holder, roomy]
    found = choose(Placement.parse("2"), everybody, [holder], reachable)
    assert (_named(found.chosen), _named(found.spare)) == (["holder", "roomy"], ["full"])
    found = choose(Placement.parse("1"), everybody, [holder, away], reachable)
    assert _named(found.chosen) == ["away", "holder"]


@pytest.mark.spec("SURFACE-16")
def test_labels_and_names_mean_agents_that_are_away_too() -> None:
    first, second = _agent("first", labels=["gpu"]), _agent("second")
    by_label = choose(Placement.parse("label:gpu,tpu"), [first, second], [], [])
    assert _named(by_label.chosen) == ["first"]
    by_name = choose(Placement.parse("agents:second,id-first"), [first, second], [], [])
    assert _named(by_name.chosen) == ["first", "second"]


@pytest.mark.spec("SURFACE-16")
def test_a_draining_agent_gets_nothing_new() -> None:
    draining = _agent("draining")
    draining.settings = AgentSettings(draining=True)
    for text in ("all", "1"):
        assert not choose(Placement.parse(text), [draining], [], [draining]).chosen
    assert choose(Placement.parse("all"), [draining], [draining], [draining]).chosen


@pytest.mark.spec("SURFACE-16")
@pytest.mark.parametrize("module", ["targets", "progress", "types"])
def test_modules_that_decide_do_no_io(module: str) -> None:
    source = Path(operations.__file__).with_name(f"{module}.py").read_text("utf-8")
    for name in ("asyncio", "aiohttp", "starlette", "time", "logging"):
        assert f"import {name}" not in source
        assert f"from {name}" not in source
