"""What the fleet has of each model: contents, holders, conflicts, and where it is in memory."""

from datetime import datetime

from msgspec import Struct

from ollama_coordinator.registry import (
    AvailableRow,
    Registry,
    contents,
    modified_at,
    newest,
)
from ollama_coordinator_common.types import AgentId


class Content(Struct, frozen=True):
    """One content of a name. `is_preferred`: requests are routed to its holders only."""

    digest: str
    blob: str
    size: int
    modified_at: datetime
    is_preferred: bool
    holders: list[AgentId]


class FleetModel(Struct, frozen=True):
    """One row of `GET /api/models`; `conflict`: its holders do not have the same content."""

    name: str
    digest: str
    size: int
    modified_at: datetime
    conflict: bool
    holders: list[AgentId]
    loaded_on: list[AgentId]
    contents: list[Content]


def fleet_model(registry: Registry, key: str) -> FleetModel:
    """One model of the fleet, which somebody has."""
    copies = registry.copies(key)
    holders = [agent.id for agent in registry.holders(key)]
    groups = contents(copies)
    row = newest([copies[agent_id] for agent_id in holders])
    return FleetModel(
        name=row.model.name,
        digest=row.model.digest,
        size=row.model.size,
        modified_at=modified_at(row),
        conflict=len(groups) > 1,
        holders=holders,
        loaded_on=[a for a in copies if registry.get(a).inventory.is_loaded(key)],
        contents=[_content(group, is_preferred=holders[0] in group) for group in groups],
    )


def _content(group: dict[AgentId, AvailableRow], *, is_preferred: bool) -> Content:
    row = newest(list(group.values()))
    return Content(
        digest=row.model.digest,
        blob=next((other.blob for other in group.values() if other.blob), ""),
        size=row.model.size,
        modified_at=modified_at(row),
        is_preferred=is_preferred,
        holders=sorted(group),
    )
