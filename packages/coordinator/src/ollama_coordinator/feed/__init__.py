"""The event stream of the dashboard."""

from .feed import Feed
from .snapshot import Snapshot, Snapshots

__all__ = ["Feed", "Snapshot", "Snapshots"]
