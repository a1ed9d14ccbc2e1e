"""The command line; the only reader of the environment and of the arguments."""

import asyncio
import logging
import socket
from collections.abc import Callable, Coroutine
from functools import partial
from importlib.metadata import version as installed_version
from importlib.resources import files
from typing import Annotated, Any

import typer
from msgspec import structs
from rich.console import Console
from rich.logging import RichHandler

from ollama_coordinator_common.commandline import (
    JSON,
    PLAIN,
    is_given,
    is_typed,
    last_words,
    log_json,
    log_to,
    with_settings,
)
from ollama_coordinator_common.error import OllamaCoordinatorError
from ollama_coordinator_common.settings import CoordinatorConfig

from .aio import loop_of
from .commands import database, fleet, joining, operate, scheduling
from .commands.keys import keys
from .commands.top import top
from .service import read, service

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
@with_settings(read, CoordinatorConfig.settings(), typer.Option)
def default(
    context: typer.Context,
    settings: CoordinatorConfig | None,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Many Ollama machines behind one endpoint, as if it were one very large Ollama."""
    if settings is not None:
        _serve(settings, context)
    elif any(is_typed(context, name) for name in context.params):
        typer.echo(f"Error: give options after `{context.invoked_subcommand}`", err=True)
        raise typer.Exit(2)


app.add_typer(fleet.models, name="models")
app.add_typer(keys, name="keys")
app.add_typer(joining.tokens, name="join-token")
app.add_typer(joining.requests, name="join-request")
app.add_typer(operate.agents, name="agents")
app.add_typer(operate.requests, name="requests")
app.add_typer(operate.settings, name="settings")
app.add_typer(service, name="service")
app.command()(operate.history)
app.command()(operate.usage)
app.command()(operate.audit)
app.command()(fleet.attention)
app.command()(scheduling.explain)
app.command()(scheduling.advise)
app.command()(scheduling.replay)
app.command()(fleet.ps)
app.command()(top)
app.command()(database.backup)
app.command()(database.restore)
app.command("migrate-database")(database.migrate_database)


@app.command()
def grafana() -> None:
    """Print a Grafana dashboard of `GET /metrics`: import it, and choose a data source."""
    typer.echo(_text("grafana.json"), nl=False)


@app.command()
def alerts() -> None:
    """Print alert rules over `GET /metrics`, for Prometheus' `rule_files`."""
    typer.echo(_text("alerts.yml"), nl=False)


def _text(name: str) -> str:
    return (files("ollama_coordinator") / "prometheus" / name).read_text("utf-8")


@app.command()
@with_settings(read, CoordinatorConfig.settings(), typer.Option)
def serve(context: typer.Context, settings: CoordinatorConfig) -> None:
    """Serve until stopped; this is also what happens without a command."""
    _serve(settings, context)


def _serve(settings: CoordinatorConfig, context: typer.Context) -> None:
    from . import server, workers

    given = frozenset(name for name in context.params if is_given(context, name))
    config = structs.replace(settings, given=given)
    if config.workers > 1:
        _run(config, partial(workers.supervise, config, _work))
    else:
        _run(config, partial(server.run, config))


def _work(config: CoordinatorConfig, listening: list[socket.socket]) -> None:
    """Serve as one process of several, on sockets that all of them have."""
    from . import server

    try:
        _run(config, partial(server.run, config, listening))
    except typer.Exit as exc:
        raise SystemExit(exc.exit_code) from exc


def _run(config: CoordinatorConfig, serving: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run what serves, with logs as the settings want them."""
    console = Console(stderr=True)
    handler: logging.Handler
    if config.log_format == JSON:
        log_json(config.log_level)
    elif console.is_terminal:
        handler = RichHandler(console=console, show_path=False, markup=False)
        log_to(handler, config.log_level, "%(message)s")
    else:
        log_to(logging.StreamHandler(), config.log_level, PLAIN)
    try:
        with asyncio.Runner(loop_factory=loop_of(config.loop, config.tls)) as runner:
            runner.run(serving())
    except OllamaCoordinatorError as exc:
        last_words(str(exc), config.log_format)
        raise typer.Exit(1) from exc
