"""What survives a restart: SQLite or PostgreSQL, behind one thread."""

from .address import database_of, database_path, files_beside, without_password, write_for_owner
from .agents import AgentRow
from .audit import Change
from .backup import back_up, move, restored
from .database import DAMAGED, Database, DatabaseError, SharedDatabase
from .finished import Cursor, Filter, Finished, Status
from .history import History, StoredBucket, Wait
from .store import Store
from .usage import DIMENSIONS, Used

__all__ = [
    "DAMAGED",
    "DIMENSIONS",
    "AgentRow",
    "Change",
    "Cursor",
    "Database",
    "DatabaseError",
    "Filter",
    "Finished",
    "History",
    "SharedDatabase",
    "Status",
    "Store",
    "StoredBucket",
    "Used",
    "Wait",
    "back_up",
    "database_of",
    "database_path",
    "files_beside",
    "move",
    "restored",
    "without_password",
    "write_for_owner",
]
