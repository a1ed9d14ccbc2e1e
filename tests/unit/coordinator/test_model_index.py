"""Which content of a name counts, and when two copies are one content."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_coordinator.registry import AvailableRow
from ollama_coordinator.registry.model_index import contents, preferred, shown_content
from ollama_coordinator_common.types import AgentId, AvailableModel


def _row(digest: str, content: str = "", blob: str = "w") -> AvailableRow:
    return AvailableRow("k", AvailableModel("m", digest), b"{}", blob, content)


def _copies(*rows: AvailableRow) -> dict[AgentId, AvailableRow]:
    return {AgentId(str(number)): row for number, row in enumerate(rows)}


def _groups(*rows: AvailableRow) -> list[list[str]]:
    return sorted(sorted(group) for group in contents(_copies(*rows)))


@pytest.mark.spec("SURFACE-12")
def test_the_same_layers_or_the_same_manifest_are_the_same_content() -> None:
    assert _groups(_row("d1", "c1"), _row("d2", "c1")) == [["0", "1"]]
    assert _groups(_row("d1", "c1"), _row("d1")) == [["0", "1"]]
    # The same weights are not enough: the system prompt may be another one.
    assert _groups(_row("d1"), _row("d2")) == [["0"], ["1"]]
    assert _groups(_row("d1", "c1"), _row("d2", "c2")) == [["0"], ["1"]]
    shown = {"d1": "s", "d2": "s", "d3": "t"}
    groups = contents(_copies(_row("d1"), _row("d2", "c2"), _row("d3")), shown)
    assert [sorted(group) for group in groups] == [["0", "1"], ["2"]]


@pytest.mark.spec("SURFACE-12")
def test_what_show_says_is_the_same_on_every_machine() -> None:
    def said(*parameters: str, **more: str) -> str:
        shown = {
            "modelfile": f"# FROM m\nFROM /home/a/blobs/sha256-{'ab' * 32}\nTEMPLATE x",
            "template": "x",
            "parameters": "\n".join(parameters),
            **more,
        }
        return shown_content(msgspec.json.encode(shown))

    one = said("stop   x", "num_ctx      8192")
    elsewhere = f"FROM C:\\models\\blobs\\sha256-{'ab' * 32}\r\n"
    assert said("num_ctx 8192", "stop x", modelfile=elsewhere) == one
    weights = f"FROM /home/a/blobs/sha256-{'cd' * 32}"
    adapter = f"FROM /x/sha256-{'ab' * 32}\nADAPTER /x/sha256-{'ef' * 32}"
    others = [
        said("num_ctx 4096", "stop x"),
        said("num_ctx 8192", "stop x", system="You are a pirate."),
        said("num_ctx 8192", "stop x", template="y"),
        said("num_ctx 8192", "stop x", modelfile=weights),
        said("num_ctx 8192", "stop x", modelfile=adapter),
    ]
    assert len({one, *others}) == 6
    assert said(modelfile="FROM llama3") == ""


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
def test_one_machine_with_many_agents_outvotes_nobody() -> None:
    copies = _copies(_row("d1"), _row("d1"), _row("d2"), _row("d2"), _row("d2"))
    everybody = [AgentId(str(number)) for number in range(5)]
    hosts = dict(zip(everybody, ("a", "b", "c", "c", "c"), strict=True))
    assert set(preferred(copies, everybody, hosts=hosts)) == {"0", "1"}
    assert set(preferred(copies, everybody)) == {"2", "3", "4"}


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
