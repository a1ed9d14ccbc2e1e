"""The schema, step by step; a released step never changes."""

import sqlite3
from contextlib import closing

from sqlite_utils import Database, Migrations

migrations = Migrations("ollama_coordinator")


def steps_of_the_future(db: Database) -> list[str]:
    """The steps that a newer version of this program has taken in a database."""
    with closing(sqlite3.connect(":memory:")) as connection:
        known = {step.name for step in migrations.pending(Database(connection))}
    return [step.name for step in migrations.applied(db) if step.name not in known]


@migrations()
def create_agents(db: Database) -> None:
    """The agents: what they registered with, what the operator set, which models they had."""
    db.table("agents").create(
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
        pk="id",
        not_null={"registration", "registered_at", "last_seen"},
    )


@migrations()
def create_documents(db: Database) -> None:
    """Single documents by name, such as what the scheduler has learned."""
    db.table("documents").create({"name": str, "body": str}, pk="name", not_null={"body"})


@migrations()
def create_requests(db: Database) -> None:
    """Finished requests, without what was asked or answered; every filter is served in order."""
    db.table("requests").create(
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
            "why": str,
        },
        pk="seq",
        not_null={"id", "status", "finished_ms"},
    )
    db.table("requests").create_index(["id"])
    db.table("requests").create_index(["finished_ms"])
    for column in ("model", "agent", "agent_id", "client", "status"):
        db.table("requests").create_index([column, "finished_ms"])


@migrations()
def create_buckets(db: Database) -> None:
    """The fleet's (no name) and the agents' numbers over time; `body` is JSON."""
    db.table("buckets").create(
        {"tier": int, "start": int, "name": str, "body": str}, pk=("tier", "name", "start")
    )
    db.table("buckets").create_index(["tier", "start"])


@migrations()
def add_lane(db: Database) -> None:
    """The lane of a finished request."""
    db.table("requests").add_column("lane", str)
