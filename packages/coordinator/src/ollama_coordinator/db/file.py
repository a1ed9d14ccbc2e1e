"""The database's file: its name in a setting, and a look into it before it is opened."""

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote

from ollama_coordinator_common.error import ConfigError

LOOK_SECONDS = 0.2
"""How long a look waits for a locked file: opening it waits longer, and says what is wrong."""


def database_path(url: str) -> Path | None:
    """The file that a `DATABASE_URL` names; `None` for a database in memory.

    `sqlite://name.db` and `sqlite:///name.db` are files in the working directory,
    `sqlite:///var/lib/name.db` (or with a fourth slash) and `sqlite:///C:/name.db` are absolute,
    `sqlite://:memory:` is in memory.

    Raises:
        ConfigError: another scheme, or no file name.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme != "sqlite":
        expected = "only SQLite is supported; give sqlite://FILE or sqlite:///ABSOLUTE/FILE"
        raise ConfigError("DATABASE_URL", url, expected)
    name = unquote(rest.partition("?")[0])
    if name.strip("/") == ":memory:":
        return None
    if not name.strip("/") or name.endswith("/"):
        raise ConfigError("DATABASE_URL", url, "the file name is missing; give sqlite://FILE")
    if name.startswith("/"):
        inner = name.lstrip("/")
        is_drive = inner[1:2] == ":"
        # Nobody keeps a database in the root folder: three slashes and a bare name mean "here".
        name = inner if is_drive or "/" not in inner else f"/{inner}"
    return Path(name)


def document_in(path: Path | None, name: str) -> bytes | None:
    """A document of a database that is not open yet; `None` if there is none, or it is unreadable.

    Opening the database says what is wrong with it.
    """
    if path is None or not path.is_file():
        return None
    try:
        with closing(sqlite3.connect(path, timeout=LOOK_SECONDS)) as connection:
            sql = "SELECT body FROM documents WHERE name = ?"
            row = connection.execute(sql, [name]).fetchone()
    except sqlite3.Error:
        return None
    return row[0] if row else None
