"""An agent as a row of the database."""

from datetime import datetime

import msgspec
from msgspec import Struct

from ollama_coordinator_common.protocol import RegisterRequest
from ollama_coordinator_common.types import AgentId

# Not the library's upsert: it finds out whether SQLite knows ON CONFLICT by creating a table, takes
# a lock in that moment for a no, and from then on silently drops rows with NOT NULL columns.
PUT_AGENT = """
    INSERT INTO agents (
        id, registration, registered_at, last_seen, has_left, settings, tags, blobs
    ) VALUES (
        :id, :registration, :registered_at, :last_seen, :has_left, :settings, :tags, :blobs
    )
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


def to_columns(row: AgentRow) -> dict[str, object]:
    """The parameters of `PUT_AGENT`."""
    return {
        "id": row.id,
        "registration": msgspec.json.encode(row.registration).decode(),
        "registered_at": row.registered_at.isoformat(),
        "last_seen": row.last_seen.isoformat(),
        "has_left": int(row.has_left),
        "settings": row.settings.decode(),
        "tags": row.tags.decode(),
        "blobs": row.blobs.decode(),
    }


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
