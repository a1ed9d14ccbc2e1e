"""`backup`, `restore` and `migrate-database`: what is in the coordinator's database, elsewhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from ollama_coordinator.db import Database, back_up, database_of, move, restored
from ollama_coordinator_common.error import OllamaCoordinatorError

from .client import DATABASE

Url = Annotated[
    str,
    typer.Option(
        "--database-url",
        envvar="DATABASE_URL",
        metavar="URL",
        help="The coordinator's database.",
        show_envvar=True,
    ),
]
Replace = Annotated[bool, typer.Option("--replace", help="Delete what is in it now.")]
SomeUrl = typer.Argument(metavar="URL", help="As in DATABASE_URL.")


def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new file.")],
    database_url: Url = DATABASE,
) -> None:
    """Write everything in the database to a file, also while the coordinator runs."""
    _done(lambda: back_up(_database(database_url), file), f"to {file}")


def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `backup` wrote.")],
    database_url: Url = DATABASE,
    replace: Replace = False,
) -> None:
    """Fill the database from a backup, of SQLite or PostgreSQL; no coordinator may use it."""
    _done(lambda: restored(file, _database(database_url), replace=replace), f"from {file}")


def migrate_database(
    source: Annotated[str, SomeUrl],
    target: Annotated[str, SomeUrl],
    replace: Replace = False,
) -> None:
    """Copy everything from one database to another, such as from SQLite to PostgreSQL."""
    stopped = _database(source), _database(target)
    _done(lambda: move(*stopped, replace=replace), f"to {stopped[1].name}")


def _database(url: str) -> Database:
    try:
        return database_of(url)
    except OllamaCoordinatorError as exc:
        raise _failure(exc) from exc


def _done(work: Callable[[], int], where: str) -> None:
    try:
        rows = work()
    except OllamaCoordinatorError as exc:
        raise _failure(exc) from exc
    typer.echo(f"{rows} rows copied {where}")


def _failure(error: OllamaCoordinatorError) -> typer.Exit:
    typer.echo(f"Error: {error}", err=True)
    return typer.Exit(1)
