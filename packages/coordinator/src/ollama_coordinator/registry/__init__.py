"""Who exists and in what state; pure: time and facts in, what changed out."""

from .agent import AgentSettings, AgentState, Cooldown
from .identity import contents, modified_at, newest
from .inventory import AvailableRow, Inventory, LoadedRow
from .machines import TwoMachines
from .registry import Registration, Registry, UnknownAgent

__all__ = [
    "AgentSettings",
    "AgentState",
    "AvailableRow",
    "Cooldown",
    "Inventory",
    "LoadedRow",
    "Registration",
    "Registry",
    "TwoMachines",
    "UnknownAgent",
    "contents",
    "modified_at",
    "newest",
]
