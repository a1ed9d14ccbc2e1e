"""What survives a restart: SQLite behind one thread."""

from .agents import AgentRow
from .file import database_path, document_in
from .finished import Cursor, Filter, Finished, Status
from .history import History, StoredBucket, Wait
from .store import DatabaseError, Store

__all__ = [
    "AgentRow",
    "Cursor",
    "DatabaseError",
    "Filter",
    "Finished",
    "History",
    "Status",
    "Store",
    "StoredBucket",
    "Wait",
    "database_path",
    "document_in",
]
