"""The command line; the only reader of the environment and of the arguments."""

import asyncio
import logging
from importlib.metadata import version as installed_version
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from ollama_coordinator_common.commandline import PLAIN, log_to, with_settings
from ollama_coordinator_common.error import OllamaCoordinatorError

from . import server
from .settings import Settings, read

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    help="Many Ollama machines behind one endpoint, as if it were one very large Ollama.",
    epilog="Without a command it serves.",
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"ollama-coordinator {installed_version('ollama-coordinator')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
@with_settings(read)
def default(
    context: typer.Context,
    settings: Settings,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Many Ollama machines behind one endpoint, as if it were one very large Ollama."""
    if context.invoked_subcommand is None:
        _serve(settings)


@app.command()
@with_settings(read)
def serve(settings: Settings) -> None:
    """Serve until stopped; this is also what happens without a command."""
    _serve(settings)


def _serve(settings: Settings) -> None:
    console = Console(stderr=True)
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, markup=False)
        log_to(handler, settings.log_level, "%(message)s")
    else:
        log_to(logging.StreamHandler(), settings.log_level, PLAIN)
    try:
        asyncio.run(server.run(settings.config))
    except OllamaCoordinatorError as exc:
        typer.echo(f"Error: {exc}", err=True)
        raise typer.Exit(1) from exc
