"""Who exists and in what state; pure: time and facts in, what changed out."""

from .agent import AgentSettings, AgentState, Cooldown
from .inventory import AvailableRow, Inventory, LoadedRow
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
    "UnknownAgent",
]
