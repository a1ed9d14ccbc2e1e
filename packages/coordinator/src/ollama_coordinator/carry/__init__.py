"""Attempts that a front carries out: the leader decides, the bytes pass between agent and client.

A front passes a request for inference on with `CARRIES`. The leader's answer is then a stream of
messages: an attempt to carry out, its end from outside, or an answer of the leader's own in pieces.
The front reports, in requests of its own, first bytes, progress and ends. So an answer outlives its
leader, and no token passes it. To a new leader each front says what it carries out.
"""

from .front import FrontAttempts
from .fronted import Fronted, follows
from .leader import Takeover
from .messages import (
    CARRIES,
    CONTENT_TYPE,
    FOLLOWS,
    FRONT,
    HELLO,
    MAY_LEAD,
    REPORTS,
    WIRE,
    Grant,
    Hello,
    carries,
    encoded,
)

__all__ = [
    "CARRIES",
    "CONTENT_TYPE",
    "FOLLOWS",
    "FRONT",
    "HELLO",
    "MAY_LEAD",
    "REPORTS",
    "WIRE",
    "FrontAttempts",
    "Fronted",
    "Grant",
    "Hello",
    "Takeover",
    "carries",
    "encoded",
    "follows",
]
