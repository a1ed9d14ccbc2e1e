"""What survives a restart: SQLite or PostgreSQL, behind one thread."""

from .address import database_of, database_path, files_beside, without_password
from .agents import AgentRow
from .database import Database, DatabaseError
from .finished import Cursor, Filter, Finished, Status
from .history import History, StoredBucket, Wait
from .store import Store

__all__ = [
    "AgentRow",
    "Cursor",
    "Database",
    "DatabaseError",
    "Filter",
    "Finished",
    "History",
    "Status",
    "Store",
    "StoredBucket",
    "Wait",
    "database_of",
    "database_path",
    "files_beside",
    "without_password",
]
