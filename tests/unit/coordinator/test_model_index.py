"""Which content of a name counts, and when two copies are one content."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_coordinator.registry import AvailableRow, contents
from ollama_coordinator.registry.model_index import preferred
from ollama_coordinator_common.types import AgentId, AvailableModel


def _row(digest: str, blob: str = "") -> AvailableRow:
    return AvailableRow("k", AvailableModel("m", digest), b"{}", blob)


def _copies(*rows: AvailableRow) -> dict[AgentId, AvailableRow]:
    return {AgentId(str(number)): row for number, row in enumerate(rows)}


def _groups(*rows: AvailableRow) -> list[list[str]]:
    return sorted(sorted(group) for group in contents(_copies(*rows)))


@pytest.mark.spec("SURFACE-12")
def test_the_same_weights_or_the_same_manifest_are_the_same_content() -> None:
    assert _groups(_row("d1", "b1"), _row("d2", "b1")) == [["0", "1"]]
    assert _groups(_row("d1", "b1"), _row("d1")) == [["0", "1"]]
    assert _groups(_row("d1"), _row("d2")) == [["0"], ["1"]]
    assert _groups(_row("d1", "b1"), _row("d2", "b2")) == [["0"], ["1"]]


@pytest.mark.spec("SURFACE-12")
def test_a_copy_can_link_two_others() -> None:
    assert _groups(_row("d1", "b1"), _row("d2", "b2"), _row("d1", "b2")) == [["0", "1", "2"]]


@pytest.mark.spec("SURFACE-11")
def test_the_living_outvote_those_that_are_away() -> None:
    copies = _copies(_row("d1"), _row("d1"), _row("d2"))
    assert set(preferred(copies, [AgentId("2")])) == {"2"}
    assert set(preferred(copies, [])) == {"0", "1"}
    assert preferred({}, []) == {}


@pytest.mark.spec("SURFACE-11")
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["", "x", "y"])), min_size=1),
    st.sets(st.integers(0, 9)),
)
def test_a_model_that_a_living_agent_has_is_never_unreachable(
    rows: list[tuple[str, str]], living: set[int]
) -> None:
    copies = _copies(*(_row(digest, blob) for digest, blob in rows))
    alive = {AgentId(str(number)) for number in living}
    chosen = preferred(copies, alive)
    assert sorted(agent for group in contents(copies) for agent in group) == sorted(copies)
    assert bool(chosen.keys() & alive) == bool(copies.keys() & alive)
