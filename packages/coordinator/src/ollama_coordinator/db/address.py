"""`DATABASE_URL`: which database it names, how it is shown, and which files are beside it."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from ollama_coordinator_common.error import ConfigError

from .database import Database

if TYPE_CHECKING:
    from .sqlite import SqliteDatabase

POSTGRES = ("postgresql", "postgres")

WORKING_FOLDER_NAME = Path("coordinator.db")
"""Beside which the files of a database on a server are: where SQLite's file is by default."""


def database_of(url: str) -> Database:
    """The database that a `DATABASE_URL` names; nothing is opened yet.

    Raises:
        ConfigError: the URL cannot work, or what it needs is not installed.
    """
    if url.partition(":")[0] not in POSTGRES:
        return file_database(database_path(url))
    try:
        from .postgres import PostgresDatabase
    except ImportError as exc:
        expected = "PostgreSQL needs an extra; install ollama-coordinator[postgres]"
        raise ConfigError("DATABASE_URL", without_password(url), expected) from exc
    return PostgresDatabase(url, without_password(url))


def file_database(path: Path | None) -> "SqliteDatabase":
    """The SQLite database in a file; nothing is opened yet."""
    from .sqlite import SqliteDatabase  # a command that only asks a coordinator starts without

    return SqliteDatabase(path)


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
        expected = "give sqlite://FILE, sqlite:///ABSOLUTE/FILE or postgresql://USER@HOST/DATABASE"
        raise ConfigError("DATABASE_URL", without_password(url), expected)
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


def files_beside(url: str) -> Path | None:
    """The path whose name begins those of the files beside a database; `None` for one in memory.

    Those of a PostgreSQL database are in the working folder.

    Raises:
        ConfigError: the URL cannot work.
    """
    return WORKING_FOLDER_NAME if url.partition(":")[0] in POSTGRES else database_path(url)


def write_for_owner(file: Path, content: bytes) -> None:
    """Write a file beside a database that its owner alone may read, in place of the one before.

    Raises:
        OSError: it cannot be written.
    """
    draft = file.with_name(f"{file.name}.new")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "wb") as opened:
        opened.write(content)
    draft.replace(file)


def without_password(url: str) -> str:
    """A URL as logs, answers and errors may show it, however badly it is written."""
    if url.startswith("sqlite:"):
        return url
    before, at, after = url.rpartition("@")
    if at:
        scheme, separator, login = before.rpartition("://")
        user, colon, _ = login.partition(":")
        before = f"{scheme}{separator}{user}" + ":***" * bool(colon)
    return re.sub(r"(password=)[^&\s]*", r"\1***", f"{before}{at}{after}")
