"""The schema, step by step; a step that has landed never changes."""

from sqlite_utils import Database, Migrations

migrations = Migrations("ollama_coordinator")


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
