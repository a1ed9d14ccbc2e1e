"""Which requests are a batch by what their client does."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.simulator.page import PAGE, SCRIPT, classed
from ollama_coordinator.api.http.dialects import INFERENCE_ROUTES
from ollama_coordinator.api.inference.request import read_routing
from ollama_coordinator.batches import CLIENTS, HEADS, IN_A_ROW, PEOPLE_SECONDS, Batches, Opening

HEAD = Opening(head=7)
BY_PATH = {route.path: route for route in INFERENCE_ROUTES}


def series(
    batches: Batches,
    count: int,
    *,
    gap: float = 0.5,
    start: float = 0.0,
    opening: Opening = HEAD,
    is_read: bool = False,
) -> list[bool]:
    """So many requests one after the other; each takes two seconds."""
    seen, now = [], start
    for _ in range(count):
        seen.append(batches.arrived("client", opening, now, is_read=is_read))
        now += 2.0
        batches.ended("client", opening, now, is_read=is_read, is_whole=True)
        now += gap
    return seen


@pytest.mark.spec("SCHED-100")
@pytest.mark.parametrize("is_read", [False, True])
def test_from_the_tenth_in_a_row_on_it_is_a_batch_until_it_stops(is_read: bool) -> None:
    batches = Batches()
    assert series(batches, 14, is_read=is_read) == [False] * (IN_A_ROW - 1) + [True] * 5
    assert series(batches, 3, start=1000.0, is_read=is_read) == [False] * 3


@pytest.mark.spec("SCHED-100")
def test_requests_at_once_are_a_batch_too() -> None:
    batches = Batches()
    assert [batches.arrived("c", HEAD, 0.0, is_read=False) for _ in range(12)][-3:] == [True] * 3


@pytest.mark.spec("SCHED-100")
def test_a_pause_another_head_or_a_client_that_leaves_begins_anew() -> None:
    assert not any(series(Batches(), 30, gap=1.5))
    mixed = Batches()
    assert not any(
        mixed.arrived("c", Opening(head=number), number / 10, is_read=False)
        for number in range(1, 30)
    )
    typing = Batches()  # a completion is dropped with each key
    for number in range(30):
        assert not typing.arrived("c", HEAD, number / 5, is_read=False)
        typing.ended("c", HEAD, number / 5 + 0.1, is_read=False, is_whole=False)


@pytest.mark.spec("SCHED-101")
def test_an_address_with_several_conversations_is_not_classed_for_an_hour() -> None:
    batches = Batches()
    for conversation in (1, 2):
        batches.arrived("client", Opening(conversation=conversation), 0.0, is_read=True)
        batches.ended(
            "client", Opening(conversation=conversation), 0.0, is_read=True, is_whole=True
        )
    assert not any(series(batches, 30, start=1.0))
    assert any(series(batches, 30, start=PEOPLE_SECONDS + 1))


@pytest.mark.spec("SCHED-101")
def test_one_conversation_beside_a_script_does_not_hide_it() -> None:
    batches = Batches()
    batches.arrived("client", Opening(conversation=1), 0.0, is_read=True)
    batches.ended("client", Opening(conversation=1), 0.0, is_read=True, is_whole=True)
    assert series(batches, 12)[-1]


@pytest.mark.spec("SCHED-101")
def test_chats_that_are_read_at_once_are_several_people() -> None:
    batches = Batches()
    assert not any(batches.arrived("page", HEAD, n / 10, is_read=True) for n in range(30))
    assert not any(batches.arrived("page", Opening(head=9), 3.0, is_read=False) for _ in range(30))


@pytest.mark.spec("SCHED-101")
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_chat_page_of_thirty_people_is_never_classed_and_a_script_is(seed: int) -> None:
    found = classed(seed)
    assert found[PAGE].requests > 1000
    assert found[PAGE].batch == 0
    assert found[SCRIPT].batch > 0.9 * found[SCRIPT].requests


STEPS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.floats(0, 2), st.booleans(), st.booleans()),
    max_size=200,
)


@pytest.mark.spec("SCHED-100")
@given(STEPS)
def test_a_batch_has_nine_before_it_that_each_follow_within_a_second(
    steps: list[tuple[int, int, float, bool, bool]],
) -> None:
    batches, now = Batches(), 0.0
    arrivals: list[tuple[str, int]] = []
    for client, head, pause, is_read, ends in steps:
        now += pause
        name, opening = str(client), Opening(head=head)
        if batches.arrived(name, opening, now, is_read=is_read):
            assert head
            assert sum((name, head) == one for one in arrivals) >= IN_A_ROW - 1
        arrivals.append((name, head))
        if ends:
            batches.ended(name, opening, now, is_read=is_read, is_whole=True)


def test_what_is_kept_is_bounded() -> None:
    batches = Batches()
    for number in range(CLIENTS + 10):
        batches.arrived(str(number), HEAD, 0.0, is_read=False)
    for number in range(1, HEADS + 10):
        batches.arrived("one", Opening(head=number, conversation=number), 0.0, is_read=False)
    assert len(batches._clients) == CLIENTS
    assert len(batches._clients["one"].runs) == HEADS


# ── how a prompt begins ───────────────────────────────────────────────────────────────────────


def opening(path: str, **body: Any) -> Opening:
    return read_routing(BY_PATH[path], json.dumps({"model": "m", **body}).encode()).opening


def said(*texts: str, roles: tuple[str, ...] = ("user", "assistant")) -> list[dict[str, str]]:
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


@pytest.mark.spec("SCHED-100")
def test_prompts_with_the_same_first_words_have_one_head() -> None:
    one, two = "Summarise this text: one", "Summarise this text: two"
    for path, field in (("/api/generate", "prompt"), ("/v1/responses", "input")):
        assert opening(path, **{field: one}) == opening(path, **{field: two})
        assert opening(path, **{field: one}).head != opening(path, **{field: "Translate!"}).head
    chat = opening("/api/chat", messages=said(one))
    assert chat.head
    assert chat == opening("/api/chat", messages=said(two))
    parts = [{"role": "user", "content": [{"type": "text", "text": one}]}]
    assert opening("/v1/chat/completions", messages=parts) == chat


@pytest.mark.spec("SCHED-100")
def test_earlier_turns_completions_of_code_and_embeddings_have_no_head() -> None:
    talk = opening("/api/chat", messages=said("a", "b", "c"))
    assert (talk.head, bool(talk.conversation)) == (0, True)
    assert opening("/api/chat", messages=said("a", "b", "c", "d", "e")) == talk
    assert opening("/api/chat", messages=said("x", "b", "c")) != talk
    assert opening("/api/generate", prompt="def f(", suffix="return 1") == Opening()
    assert opening("/api/embed", input="Summarise this text") == Opening()
    went_on = opening("/api/generate", prompt="and then?", context=[1, 2, 3])
    assert (went_on.head, bool(went_on.conversation)) == (0, True)
