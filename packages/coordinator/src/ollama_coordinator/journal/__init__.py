"""What happens in the fleet, for people: each request's life, the numbers over time, the events."""

from .entry import Attempt, JournalEntry, RequestState, RequestView
from .events import AgentEvent, EventLog
from .journal import Ended, Following, Journal
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
    "Following",
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
