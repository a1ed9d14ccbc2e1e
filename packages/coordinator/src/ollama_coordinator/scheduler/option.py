"""The possibilities of one request, as they are compared."""

from collections.abc import Hashable
from enum import Enum

from msgspec import Struct

from .fleet import Place
from .room import NOTHING_LEAVES, Room

NO_PLACE = float("inf")

Hits = dict[Hashable, int] | None
"""Prompt tokens expected in the cache, by place."""


class Action(Enum):
    """What a request does at a place."""

    GO = "go"
    LOAD = "load"
    WAIT = "wait"


class Choice(Struct):
    """One possibility and its cost; `wait` until a slot is free, `run` once it is there."""

    action: Action
    place: Place | None
    cost: float
    wait: float = 0.0
    run: float = 0.0
    cached: int = 0
    room: Room = NOTHING_LEAVES
    others: "tuple[Choice, ...]" = ()
