"""What leader and fronts tell each other, and versions that differ."""

from typing import Any

import msgspec
import pytest

from ollama_coordinator.carry.messages import (
    NEWEST_WIRE,
    OLDEST_WIRE,
    WIRE,
    Abort,
    Hello,
    Order,
    Told,
    abort,
    carries,
    encoded,
    framed,
    is_understood,
    messages,
    read_carries,
)
from ollama_coordinator.upstream import AgentLost, Cut, LostTwice, TakenBack

OF_THE_FIRST_WIRE = [
    "attempt",
    7,
    {
        "url": "http://a/api/chat",
        "route": "/api/chat",
        "headers": [["a", "b"]],
        "way": {"agent_id": "a", "agent": "one", "request_id": "r", "name": "m"},
    },
    None,
    1.0,
]


async def told(*pieces: bytes) -> list[Told]:
    async def chunks() -> Any:
        for piece in pieces:
            yield piece

    return [one async for one in messages(chunks())]


@pytest.mark.spec("CLUSTER-14")
async def test_an_order_of_the_version_before_has_nothing_for_the_next_leader() -> None:
    body = msgspec.msgpack.encode(OF_THE_FIRST_WIRE)
    [order] = await told(len(body).to_bytes(4, "big") + body)
    assert isinstance(order, Order)
    assert (order.id, order.grant) == (7, b"")


@pytest.mark.spec("CLUSTER-14")
async def test_fields_that_a_later_version_has_are_passed_over() -> None:
    body = msgspec.msgpack.encode([*OF_THE_FIRST_WIRE, b"grant", "later", 1])
    [order] = await told(len(body).to_bytes(4, "big") + body)
    assert isinstance(order, Order)
    assert order.grant == b"grant"
    hello = msgspec.msgpack.decode(
        msgspec.msgpack.encode(
            [WIRE + 1, "id", 3, [[1, b"", 2.0, None, 0, None, 0.0, "later"]], 9]
        ),
        type=Hello,
    )
    assert (hello.waiting, hello.carrying[0].seconds) == (3, 2.0)


@pytest.mark.spec("CLUSTER-14")
def test_versions_that_follow_each_other_understand_each_other() -> None:
    assert OLDEST_WIRE >= WIRE - 1
    assert NEWEST_WIRE == WIRE + 1
    assert all(is_understood(wire) for wire in (WIRE - 1, WIRE, WIRE + 1))
    assert not is_understood(WIRE + 2)
    assert not is_understood(OLDEST_WIRE - 1)


@pytest.mark.spec("CLUSTER-12")
@pytest.mark.parametrize(
    ("value", "read"),
    [
        (carries(1.5, is_early=True), (WIRE, 1.5, True)),
        (carries(0.0, is_early=False), (WIRE, 0.0, False)),
        ("1", (1, 0.0, False)),  # as the version before has it
        ("9 250 soon later", (9, 0.25, False)),
        ("x -1", (0, 0.0, False)),
    ],
)
def test_how_long_a_request_waited_is_read(value: str, read: tuple[int, float, bool]) -> None:
    assert read_carries(value) == read


async def test_messages_come_whole_however_they_are_cut() -> None:
    sent = framed(Abort(1, "AgentLost", "gone")) + framed(Abort(2, "TakenBack", "slow"))
    assert await told(*(sent[at : at + 1] for at in range(len(sent)))) == [
        Abort(1, "AgentLost", "gone"),
        Abort(2, "TakenBack", "slow"),
    ]


async def test_what_is_no_message_ends_the_reading() -> None:
    for sent in (b"\x00\x00\x00\x01\xc1", b"\xff\xff\xff\xff"):
        with pytest.raises(Cut):
            await told(sent)


def test_an_attempt_ends_with_an_error_that_its_front_knows() -> None:
    assert abort(1, TakenBack("slow")).kind == "TakenBack"
    assert abort(1, LostTwice("gone")).kind == AgentLost.__name__
    assert encoded(abort(1, AgentLost("x"))) == encoded(["abort", 1, "AgentLost", "x"])
