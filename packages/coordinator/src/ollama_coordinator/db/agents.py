"""An agent as a row of the database."""

from datetime import datetime

import msgspec
from msgspec import Struct

from ollama_coordinator_common.protocol import RegisterRequest
from ollama_coordinator_common.types import AgentId

SELECT_AGENTS = "SELECT * FROM agents ORDER BY registered_at, id"

# Not sqlite-utils' upsert: it finds out whether SQLite knows ON CONFLICT by creating a table, takes
# a lock in that moment for a no, and from then on silently drops rows with NOT NULL columns.
PUT_AGENT = """
    INSERT INTO agents (
        id, registration, registered_at, last_seen, has_left, settings, tags, blobs
    ) VALUES (?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (id) DO UPDATE SET
        registration = excluded.registration, last_seen = excluded.last_seen,
        has_left = excluded.has_left, settings = excluded.settings,
        tags = excluded.tags, blobs = excluded.blobs
"""


class AgentRow(Struct, frozen=True):
    """One agent's row; `settings` and `blobs` are JSON, `tags` is Ollama's own list."""

    id: AgentId
    registration: RegisterRequest
    registered_at: datetime
    last_seen: datetime
    has_left: bool = False
    settings: bytes = b"{}"
    tags: bytes = b""
    blobs: bytes = b"{}"


def to_columns(row: AgentRow) -> list[object]:
    """The values of `PUT_AGENT`."""
    return [
        row.id,
        msgspec.json.encode(row.registration).decode(),
        row.registered_at.isoformat(),
        row.last_seen.isoformat(),
        int(row.has_left),
        row.settings.decode(),
        row.tags.decode(),
        row.blobs.decode(),
    ]


def from_columns(row: dict[str, object]) -> AgentRow:
    """An agent from its row.

    Raises:
        ValueError, msgspec.DecodeError: the row is damaged.
    """
    return AgentRow(
        id=AgentId(str(row["id"])),
        registration=msgspec.json.decode(str(row["registration"]), type=RegisterRequest),
        registered_at=datetime.fromisoformat(str(row["registered_at"])),
        last_seen=datetime.fromisoformat(str(row["last_seen"])),
        has_left=bool(row["has_left"]),
        settings=str(row["settings"] or "{}").encode(),
        tags=str(row["tags"] or "").encode(),
        blobs=str(row["blobs"] or "{}").encode(),
    )
