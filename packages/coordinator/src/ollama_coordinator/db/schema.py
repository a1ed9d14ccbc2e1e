"""The schema, step by step; each engine makes its tables of this one description.

A released step never changes. Text is compared by its code points in every engine.
"""

from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version

import msgspec
from msgspec import Struct

Type = type[str] | type[int] | type[float] | type[bytes]


class Table(Struct, frozen=True):
    """One table. A key that is a single `int` is numbered by the database, upwards.

    `indexes` are the columns of each index; the key needs none.
    """

    name: str
    columns: Mapping[str, Type]
    key: tuple[str, ...]
    required: frozenset[str] = frozenset()
    indexes: tuple[tuple[str, ...], ...] = ()

    @property
    def numbered(self) -> bool:
        """Whether the database numbers its rows."""
        return len(self.key) == 1 and self.columns[self.key[0]] is int


class Column(Struct, frozen=True):
    """A further column of a table that is there."""

    table: str
    name: str
    kind: Type


AGENTS = Table(
    "agents",
    {
        "id": str,
        "registration": str,
        "registered_at": str,
        "last_seen": str,
        "has_left": int,
        "settings": str,
        "tags": str,
        "blobs": str,
    },
    key=("id",),
    required=frozenset({"registration", "registered_at", "last_seen"}),
)
"""The agents: what they registered with, what the operator set, which models they had."""

DOCUMENTS = Table(
    "documents", {"name": str, "body": str}, key=("name",), required=frozenset({"body"})
)
"""Single documents by name, such as what the scheduler has learned."""

REQUESTS = Table(
    "requests",
    {
        "seq": int,
        "id": str,
        "status": str,
        "model": str,
        "path": str,
        "client": str,
        "arrived_ms": int,
        "finished_ms": int,
        "waited_seconds": float,
        "total_seconds": float,
        "http_status": int,
        "error": str,
        "agent_id": str,
        "agent": str,
        "attempts": int,
        "streamed": int,
        "prompt_tokens": int,
        "output_tokens": int,
        "load_seconds": float,
        "first_token_seconds": float,
        "tokens_per_second": float,
        "why": bytes,
    },
    key=("seq",),
    required=frozenset({"id", "status", "finished_ms"}),
    indexes=(
        ("id",),
        ("finished_ms",),
        *((column, "finished_ms") for column in ("model", "agent", "agent_id", "client", "status")),
    ),
)
"""Finished requests, without what was asked or answered; every filter is served in order."""

BUCKETS = Table(
    "buckets",
    {"tier": int, "start": int, "name": str, "body": str},
    key=("tier", "name", "start"),
    indexes=(("tier", "start"),),
)
"""The fleet's (no name) and the agents' numbers over time; `body` is JSON."""

COORDINATORS = Table(
    "coordinators",
    {
        "id": str,
        "url": str,
        "certificate": str,
        "version": str,
        "started_ms": int,
        "seen_ms": int,
        "epoch": int,
        "leads_since_ms": int,
    },
    key=("id",),
    required=frozenset({"url", "seen_ms", "epoch"}),
)
"""Which coordinators have the database; the one with the highest `epoch` leads, 0 never did."""

USAGE = Table(
    "usage_days",
    {
        "day": str,
        "person": str,
        "key_name": str,
        "model": str,
        "requests": int,
        "prompt_tokens": int,
        "output_tokens": int,
        "gpu_seconds": float,
    },
    key=("day", "person", "key_name", "model"),
)
"""What each person, key and model took on a day of UTC."""

AUDIT = Table(
    "audit",
    {
        "seq": int,
        "id": str,
        "at_ms": int,
        "caller": str,
        "key_name": str,
        "address": str,
        "action": str,
        "subject": str,
        "details": str,
        "http_status": int,
    },
    key=("seq",),
    required=frozenset({"id", "at_ms"}),
    indexes=(("id",), ("at_ms",)),
)
"""Who changed what, from where; `details` is JSON."""

STEPS: Mapping[str, Table | Column] = {
    "create_agents": AGENTS,
    "create_documents": DOCUMENTS,
    "create_requests": REQUESTS,
    "create_buckets": BUCKETS,
    "add_lane": Column("requests", "lane", str),
    "add_alias": Column("requests", "alias", str),
    "create_coordinators": COORDINATORS,
    "create_usage": USAGE,
    "create_audit": AUDIT,
    "add_used": Column("requests", "used", str),
}
"""The steps in their order, and what each one makes."""


def opened() -> str:
    """The document that every start writes: which version it was."""
    return msgspec.json.encode({"version": version("ollama-coordinator")}).decode()


ADDITIONS = ("create_", "add_")
"""How the names of steps begin that make a table, or a column that may be empty. A coordinator of
an earlier version serves on without; a step that changes anything else has another name."""


def newer(steps: list[str], document: str | None, *, serves: bool) -> str | None:
    """Why this program cannot use a database; `document` is what the last start wrote into it.

    One that `serves` can do without additions; a copy of the database cannot.
    """
    step = unknown(steps, ADDITIONS if serves else ())
    if step is None:
        return None
    wrote: object = None
    with suppress(msgspec.DecodeError):
        wrote = msgspec.json.decode(document or "{}", type=dict[str, object]).get("version")
    own = version("ollama-coordinator")
    # One of this version may have served on beside what a newer one had added.
    here = f"; version {wrote} wrote it, this is {own}" if wrote and wrote != own else ""
    return f"it has {step}, unknown here{here}"


def unknown(steps: list[str], harmless: tuple[str, ...]) -> str | None:
    """The last of a database's steps that a newer version of this program has taken, if any."""
    strange = (step for step in reversed(steps) if step not in STEPS)
    return next((step for step in strange if not step.startswith(harmless)), None)
