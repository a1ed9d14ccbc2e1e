"""What survives a restart: SQLite behind one thread."""

from .store import AgentRow, DatabaseError, Store

__all__ = ["AgentRow", "DatabaseError", "Store"]
