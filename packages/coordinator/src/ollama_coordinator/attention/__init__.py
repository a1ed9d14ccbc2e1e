"""What needs a person: the one list of it, and the webhook that tells."""

from .concerns import Concern, Severity
from .watch import Attention, OpenConcern

__all__ = ["Attention", "Concern", "OpenConcern", "Severity"]
