"""The history of the fleet: each request's life, the numbers over time, the agents' events."""

from .entry import Attempt, Ended, JournalEntry, RequestState, RequestView
from .events import AgentEvent, EventLog
from .journal import Journal
from .observation import Limits, Observation
from .sampler import Sampler, SavedSparklines, Sparklines
from .statistics import TIERS, Bucket, Point, Series, SeriesRow, Tier

__all__ = [
    "TIERS",
    "AgentEvent",
    "Attempt",
    "Bucket",
    "Ended",
    "EventLog",
    "Journal",
    "JournalEntry",
    "Limits",
    "Observation",
    "Point",
    "RequestState",
    "RequestView",
    "Sampler",
    "SavedSparklines",
    "Series",
    "SeriesRow",
    "Sparklines",
    "Tier",
]
