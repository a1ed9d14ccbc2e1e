"""Several agents' progress as one stream."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_coordinator.operations.operation import ProgressFeed
from ollama_coordinator.operations.progress import MOST_KEPT, Progress
from ollama_coordinator_common.types import AgentId

A, B = AgentId("a"), AgentId("b")


def _layer(completed: int, digest: str = "sha256:1", total: int = 100) -> dict[str, Any]:
    return {"status": f"pulling {digest}", "digest": digest, "total": total, "completed": completed}


def _two() -> Progress:
    progress = Progress()
    progress.begin(A)
    progress.begin(B)
    return progress


@pytest.mark.spec("SURFACE-17")
def test_a_layer_is_as_far_as_the_slowest_agent() -> None:
    progress = _two()
    assert [line.get("completed") for line in progress.feed(A, _layer(80))] == [None]
    assert [line["completed"] for line in progress.feed(B, _layer(30))] == [30]
    assert progress.feed(A, _layer(100)) == []
    assert progress.of(A) == (100, 100)
    assert progress.of(B) == (30, 100)


@pytest.mark.spec("SURFACE-17")
def test_a_late_step_is_reported_when_the_last_agent_has_reached_it() -> None:
    progress = _two()
    for agent in (A, B):
        progress.feed(agent, _layer(100))
    assert progress.feed(A, {"status": "verifying sha256 digest"}) == []
    assert progress.finish(A) == []
    told = progress.feed(B, {"status": "verifying sha256 digest"})
    assert told == [{"status": "verifying sha256 digest"}]
    assert progress.feed(B, {"status": "verifying sha256 digest"}) == []


@pytest.mark.spec("SURFACE-17")
def test_an_agent_that_reports_without_end_is_not_kept_without_end() -> None:
    progress = Progress()
    progress.begin(A)
    layers = [progress.feed(A, _layer(1, str(number))) for number in range(MOST_KEPT + 9)]
    steps = [progress.feed(A, {"status": str(number)}) for number in range(MOST_KEPT + 9)]
    assert sum(map(bool, layers)) == sum(map(bool, steps)) == MOST_KEPT
    assert progress.of(A) == (MOST_KEPT, 100 * MOST_KEPT)
    [line] = progress.feed(A, _layer(2, "0"))  # those that are kept go on
    assert line["completed"] == 2
    assert progress.feed(A, {"status": "writing manifest"})[-1] == {"status": "writing manifest"}


@pytest.mark.spec("SURFACE-17")
def test_a_name_without_end_is_none_of_a_step_or_a_layer() -> None:
    progress = Progress()
    progress.begin(A)
    long = "x" * 1001
    assert progress.feed(A, {"status": long}) == []
    assert progress.feed(A, _layer(1, long)) == []
    assert progress.feed(A, {**_layer(1, "0"), "status": long}) == []
    assert progress.of(A) == (0, 0)


@pytest.mark.spec("SURFACE-17")
def test_an_agent_that_is_not_waited_for_holds_nothing_up() -> None:
    progress = _two()
    progress.feed(A, _layer(100))
    progress.feed(A, {"status": "writing manifest"})
    progress.feed(B, _layer(10))
    told = progress.leave(B)
    assert [line["status"] for line in told] == ["pulling sha256:1", "writing manifest"]
    assert told[0]["completed"] == 100


@pytest.mark.spec("SURFACE-17")
def test_an_agent_that_starts_anew_does_not_set_the_bar_back() -> None:
    progress = _two()
    progress.feed(A, _layer(90))
    progress.feed(B, _layer(90))
    progress.begin(B)
    assert progress.feed(B, _layer(20)) == []
    assert progress.feed(B, _layer(95)) == []
    assert [line["completed"] for line in progress.feed(A, _layer(100))] == [95]


@pytest.mark.spec("SURFACE-17")
@given(st.lists(st.tuples(st.sampled_from([A, B]), st.integers(0, 100), st.sampled_from("12"))))
def test_no_order_of_events_sets_a_bar_back(events: list[tuple[AgentId, int, str]]) -> None:
    progress = _two()
    shown: dict[str, int] = {}
    for agent, completed, digest in events:
        if completed == 0:
            progress.begin(agent)
        for line in progress.feed(agent, _layer(completed, digest)):
            assert line["total"] == 100
            assert line.get("completed", 0) > shown.get(line["digest"], -1)
            shown[line["digest"]] = line.get("completed", 0)


@pytest.mark.spec("SURFACE-17")
@pytest.mark.parametrize("line", [{}, {"status": 7}, {"status": "x", "digest": 3, "total": "y"}])
def test_a_line_in_another_form_does_no_harm(line: dict[str, Any]) -> None:
    for told in _two().feed(A, line):
        assert told == {"status": "x"}


@pytest.mark.spec("SURFACE-18")
async def test_a_client_that_is_late_or_slow_gets_the_present_state() -> None:
    feed = ProgressFeed()
    feed.publish([{"status": "pulling manifest"}])
    following = feed.follow()
    assert await anext(following) == b'{"status":"pulling manifest"}\n'
    for completed in range(1, 50):
        feed.publish([_layer(completed)])
    assert (await anext(following)).count(b"\n") == 1
    feed.publish([{"status": "success"}])
    feed.end()
    late = b"".join([lines async for lines in feed.follow()])
    assert late == (
        b'{"status":"pulling manifest"}\n'
        b'{"status":"pulling sha256:1","digest":"sha256:1","total":100,"completed":49}\n'
        b'{"status":"success"}\n'
    )
    assert [lines async for lines in following] == [b'{"status":"success"}\n']
