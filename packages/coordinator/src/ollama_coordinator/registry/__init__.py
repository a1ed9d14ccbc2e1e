"""The registered agents and their state; pure: takes the time and facts, returns what changed."""

from .agent import (
    MEMORY_SHARE_WITHOUT_GPU,
    NO_GPU,
    OVERHEAD_FACTOR,
    AgentSettings,
    AgentState,
    place_of,
    url_of,
)
from .agent_match import NotItsOllama, Registration, TwoMachines, UnknownAgent
from .inventory import AvailableRow, Inventory, LoadedRow
from .model_index import modified_at, newest, shown_capabilities, shown_content
from .registry import Registry

__all__ = [
    "MEMORY_SHARE_WITHOUT_GPU",
    "NO_GPU",
    "OVERHEAD_FACTOR",
    "AgentSettings",
    "AgentState",
    "AvailableRow",
    "Inventory",
    "LoadedRow",
    "NotItsOllama",
    "Registration",
    "Registry",
    "TwoMachines",
    "UnknownAgent",
    "modified_at",
    "newest",
    "place_of",
    "shown_capabilities",
    "shown_content",
    "url_of",
]
