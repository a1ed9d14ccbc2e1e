"""The live picture of the fleet for everyone who looks at the dashboard."""

from .feed import Feed
from .picture import Picture
from .rows import Rows

__all__ = ["Feed", "Picture", "Rows"]
