"""The history of the fleet: each request's life, the numbers over time, the agents' events."""

from .advice import Advice, AdvicePiece
from .counters import Counters, Histogram
from .entry import Attempt, JournalEntry, RequestState, RequestView, short_name, tokens_of
from .events import AgentEvent
from .journal import Journal
from .observation import Limits, Observation
from .sampler import SavedSparklines, Sparklines, state_of
from .statistics import TIERS, Bucket, Point, Series, SeriesRow

__all__ = [
    "TIERS",
    "Advice",
    "AdvicePiece",
    "AgentEvent",
    "Attempt",
    "Bucket",
    "Counters",
    "Histogram",
    "Journal",
    "JournalEntry",
    "Limits",
    "Observation",
    "Point",
    "RequestState",
    "RequestView",
    "SavedSparklines",
    "Series",
    "SeriesRow",
    "Sparklines",
    "short_name",
    "state_of",
    "tokens_of",
]
