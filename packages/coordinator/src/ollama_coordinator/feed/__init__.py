"""The live picture of the fleet for everyone who looks at the dashboard."""

from .feed import Feed
from .rows import Rows
from .snapshot import Snapshots

__all__ = ["Feed", "Rows", "Snapshots"]
