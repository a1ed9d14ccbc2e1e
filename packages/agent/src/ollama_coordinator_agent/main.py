"""The command line; the only reader of the environment and of the arguments."""

import asyncio
import os
from typing import Annotated

import typer
from rich.console import Console

from ollama_coordinator_common.commandline import is_typed, with_settings
from ollama_coordinator_common.error import OllamaCoordinatorError
from ollama_coordinator_common.settings import AgentConfig

from . import __version__, logs
from .assembly import assembled
from .display import render, show
from .settings import read
from .signals import cancelled_by_signals
from .status import examine

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    help="Offer this machine's Ollama to a fleet: look after it and report it to the coordinator.",
    epilog="Without a command it runs. OLLAMA_HOST, OLLAMA_MODELS and Ollama's other variables are"
    " passed on to an `ollama serve` that the agent starts.",
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"ollama-coordinator-agent {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
@with_settings(read, AgentConfig.settings(), typer.Option)
def default(
    context: typer.Context,
    settings: AgentConfig,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Offer this machine's Ollama to a fleet: look after it and report it to the coordinator."""
    if context.invoked_subcommand is None:
        _run(settings)
    elif any(is_typed(context, name) for name in context.params):
        typer.echo(f"Error: give options after `{context.invoked_subcommand}`", err=True)
        raise typer.Exit(2)


@app.command()
@with_settings(read, AgentConfig.settings(), typer.Option)
def run(settings: AgentConfig) -> None:
    """Register with the coordinator and stay registered until stopped."""
    _run(settings)


@app.command()
@with_settings(read, AgentConfig.settings(), typer.Option)
def status(settings: AgentConfig) -> None:
    """Show what the agent would report; the exit code is 1 if something is wrong."""
    logs.set_up("WARNING", None)
    snapshot = asyncio.run(examine(settings, os.environ))
    Console().print(render(snapshot))
    if snapshot.coordinator_trouble or snapshot.ollama_trouble:
        raise typer.Exit(1)


def _run(settings: AgentConfig) -> None:
    console = Console()
    live = console if console.is_terminal else None
    logs.set_up(settings.log_level, live)
    try:
        asyncio.run(_serve(settings, live))
    except OllamaCoordinatorError as exc:
        typer.echo(f"Error: {exc}", err=True)
        raise typer.Exit(1) from exc


async def _serve(settings: AgentConfig, live: Console | None) -> None:
    """Run until a signal; the live status, if any, ends after the goodbye."""
    with cancelled_by_signals():
        async with (
            assembled(settings, dict(os.environ)) as daemon,
            asyncio.TaskGroup() as tasks,
        ):
            if live is not None:
                tasks.create_task(show(live, daemon.snapshot))
            await daemon.run()
