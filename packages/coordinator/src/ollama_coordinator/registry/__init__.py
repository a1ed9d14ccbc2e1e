"""The registered agents and their state; pure: takes the time and facts, returns what changed."""

from .agent import AgentSettings, AgentState, url_of
from .agent_match import TwoMachines
from .inventory import AvailableRow, Inventory, LoadedRow
from .model_index import contents, modified_at, newest
from .registry import Registration, Registry, UnknownAgent

__all__ = [
    "AgentSettings",
    "AgentState",
    "AvailableRow",
    "Inventory",
    "LoadedRow",
    "Registration",
    "Registry",
    "TwoMachines",
    "UnknownAgent",
    "contents",
    "modified_at",
    "newest",
    "url_of",
]
