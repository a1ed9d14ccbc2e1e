"""`backup`, `restore` and `migrate-database`: what is in the coordinator's database, elsewhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from ollama_coordinator.db import back_up, database_of, move, restored
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
AsJson = Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")]


def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new file.")],
    database_url: Url = DATABASE,
    json: AsJson = False,
) -> None:
    """Write everything in the database to a file, also while the coordinator runs."""
    _done(lambda: (back_up(database_of(database_url), file), f"to {file}"), json=json)


def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `backup` wrote.")],
    database_url: Url = DATABASE,
    replace: Replace = False,
    json: AsJson = False,
) -> None:
    """Fill the database from a backup, of SQLite or PostgreSQL; no coordinator may use it."""

    def work() -> tuple[int, str]:
        return restored(file, database_of(database_url), replace=replace), f"from {file}"

    _done(work, json=json)


def migrate_database(
    source: Annotated[str, typer.Argument(metavar="FROM", help="As in DATABASE_URL.")],
    target: Annotated[str, typer.Argument(metavar="TO", help="As in DATABASE_URL.")],
    replace: Replace = False,
    json: AsJson = False,
) -> None:
    """Copy everything from one database to another, such as from SQLite to PostgreSQL."""

    def work() -> tuple[int, str]:
        stopped = database_of(source), database_of(target)
        return move(*stopped, replace=replace), f"to {stopped[1].name}"

    _done(work, json=json)


def _done(work: Callable[[], tuple[int, str]], *, json: bool) -> None:
    """Do it, and say how many rows were copied from or to where."""
    try:
        rows, where = work()
    except OllamaCoordinatorError as exc:
        if json:
            typer.echo(msgspec.json.encode({"error": str(exc)}))
        typer.echo(f"Error: {exc}", err=True)
        raise typer.Exit(1) from exc
    if json:
        typer.echo(msgspec.json.encode({"rows": rows}))
    else:
        typer.echo(f"{rows} rows copied {where}")
