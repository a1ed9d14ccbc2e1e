"""The same name with different content on different agents: which content the fleet serves.

Two rows are the same content when they share the digest of their weights, or that of their
manifest: older Ollamas write the manifest anew, so that one content has several manifest digests,
and an agent that does not report weights has only those.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime

from ollama_coordinator_common.types import AgentId

from .inventory import AvailableRow

LONG_AGO = datetime.fromtimestamp(0, UTC)

Copies = Mapping[AgentId, AvailableRow]


def modified_at(row: AvailableRow) -> datetime:
    """When a model was last changed on its agent; long ago where Ollama did not say."""
    at = row.model.modified_at
    return LONG_AGO if at is None else at if at.tzinfo else at.replace(tzinfo=UTC)


def contents(copies: Copies) -> list[dict[AgentId, AvailableRow]]:
    """The copies of one name, those of the same content together."""
    if _is_one(copies.values()):
        return [dict(copies)]
    groups: list[tuple[set[str], dict[AgentId, AvailableRow]]] = []
    for agent_id, row in copies.items():
        # Rows without any digest are taken for the same: nothing says that they differ.
        digests = {digest for digest in (row.blob, row.model.digest) if digest} or {""}
        members = {agent_id: row}
        apart = []
        for known, others in groups:
            if known.isdisjoint(digests):
                apart.append((known, others))
            else:
                digests |= known
                members = others | members
        groups = [*apart, (digests, members)]
    return [members for _, members in groups]


def _is_one(rows: Iterable[AvailableRow]) -> bool:
    """Whether one digest is that of every row: what nearly every model is, on any many agents."""
    digests = {row.model.digest for row in rows}
    blobs = {row.blob for row in rows}
    return (len(digests) == 1 and "" not in digests) or (len(blobs) == 1 and "" not in blobs)


def preferred(copies: Copies, living: Iterable[AgentId]) -> dict[AgentId, AvailableRow]:
    """The copies of the content to serve: what most living agents have, then most, then newest."""
    groups = contents(copies)
    if len(groups) < 2:
        return groups[0] if groups else {}
    alive = set(living)
    return max(
        groups,
        key=lambda group: (
            len(alive & group.keys()),
            len(group),
            max(modified_at(row) for row in group.values()),
            min(row.identity for row in group.values()),
        ),
    )


def newest(rows: Sequence[AvailableRow]) -> AvailableRow:
    """The row that stands for several of the same content."""
    return max(rows, key=modified_at)
