"""What happens in the fleet, for people: each request's life, the numbers over time, the events."""

from .buckets import Bucket, Point
from .entry import Attempt, Entry, RequestView, State
from .events import AgentEvent, EventLog
from .journal import Ended, Following, Journal
from .observation import Limits, Observation
from .pulses import Kept, Pulses
from .sampler import Sampler
from .series import TIERS, Series, SeriesRow, Tier

__all__ = [
    "TIERS",
    "AgentEvent",
    "Attempt",
    "Bucket",
    "Ended",
    "Entry",
    "EventLog",
    "Following",
    "Journal",
    "Kept",
    "Limits",
    "Observation",
    "Point",
    "Pulses",
    "RequestView",
    "Sampler",
    "Series",
    "SeriesRow",
    "State",
    "Tier",
]
