"""What a replay keeps of each request, and of the whole."""

from dataclasses import dataclass

from msgspec import Struct

from .trace import TraceRequest

PATIENCE_SECONDS = 120.0
"""A client that has heard nothing for so long leaves."""


class Record(Struct, kw_only=True):
    """What became of one request of a trace."""

    request: TraceRequest
    number: int
    agent: str | None = None
    granted_at: float | None = None
    first_token_at: float | None = None
    ended_at: float | None = None
    attempts: int = 0
    left: bool = False
    error: str | None = None

    @property
    def first_token_seconds(self) -> float | None:
        """Time to the first token, from the arrival."""
        return None if self.first_token_at is None else self.first_token_at - self.request.at


@dataclass(slots=True)
class Replay:
    """What a replay showed."""

    records: list[Record]
    loads: int
    seconds: float
    busy_seconds: float
    most_in_flight: int = 0
